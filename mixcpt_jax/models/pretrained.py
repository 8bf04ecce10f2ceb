"""Pretrained checkpoints of any supported format -> parameters.

All names and shapes are checked from file headers before any weight is read. Then the shard
of each device is read separately, so the host never holds more than one shard of one
parameter.
"""

import collections
import hashlib
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from mixcpt_jax.core import paths
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import hub
from mixcpt_jax.models import families, gguf_checkpoint, huggingface
from mixcpt_jax.models.families import Index, Tensor
from mixcpt_jax.models.gguf_file import open_gguf
from mixcpt_jax.models.huggingface import MARKER
from mixcpt_jax.models.huggingface_export import save_pretrained as save_pretrained
from mixcpt_jax.models.transformer import ModelConfig, Params
from mixcpt_jax.runtime import finite

_REMEDY = (
    "give a Hugging Face folder, a .gguf file, or a model of the Hub as ORG/NAME or "
    "hf://ORG/NAME"
)


def read_model_config(path: str) -> ModelConfig:
    """Reads a checkpoint's architecture.

    Args:
      path: a Hugging Face folder (its `config.json`, of a model type in
        `families.FAMILIES`, or of a model around one that reads images too), a `.json`
        file like that one, or a `.gguf` file. Each may be on the Hub, see `data.hub`.

    Raises:
      InputError: the file is missing or damaged, or describes a network that
        `transformer` does not compute; names the file, the key, its value and what is
        supported.
    """
    path = hub.local_model(path)
    if path.endswith(".gguf"):
        file = paths.require_file(path)
        return gguf_checkpoint.read_config(open_gguf(file), file)
    if path.endswith(".json"):
        return huggingface.read_config(paths.require_file(path))
    huggingface.refuse_adapter(path)
    file = f"{path.rstrip('/')}/{MARKER}"
    return huggingface.read_config(paths.require_file(file, _REMEDY))


def load_params(path: str, abstract_params: Params) -> Params:
    """Streams a checkpoint into arrays, each cast and sharded as its template says.

    Args:
      path: as for `read_model_config`. Files in a bucket are copied to the local disk
        (under TMPDIR) while they are read.
      abstract_params: nested dict of `jax.ShapeDtypeStruct`s. One without a sharding
        goes to the first device.

    Raises:
      InputError: a file is missing or damaged, or a tensor is missing, left over,
        misshapen or holds a NaN or an infinity; names the tensor and the file.
    """
    path = _with_weights(path)
    config = read_model_config(path)
    family = config.family
    if path.endswith(".gguf"):
        tensors = gguf_checkpoint.open_tensors(paths.require_file(path))
    else:
        tensors = huggingface.open_tensors(paths.resolve(path), config)
    _check_tensors(path, tensors, abstract_params, family)

    def load(key_path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        key = families.key_of(key_path)
        names = families.tensor_names(key, leaf.shape, family)

        def read(index: Index, shape: tuple[int, ...]) -> np.ndarray:
            shard = np.empty(shape, leaf.dtype)
            names_of_shard, index = names[index[: names.ndim]], index[names.ndim :]
            for place, name in np.ndenumerate(names_of_shard):
                if families.is_transposed(key):
                    shard[place] = tensors[name].read(index[::-1]).T
                else:
                    shard[place] = tensors[name].read(index)
            return shard

        return _make_array(leaf, read)

    params = jax.tree.map_with_path(load, abstract_params)
    if broken := finite.find_broken(params):
        tensor = tensors[families.name_of(broken, family)]
        raise InputError(
            f"{tensor.file}: tensor {tensor.name} holds values that are not finite "
            "numbers; its training has diverged or its conversion overflowed: use other "
            "weights"
        )
    return params


def identity(path: str) -> str:
    """Sixteen hex digits that identify a checkpoint's weights.

    A hash of each file's size and header, and of each tensor: of all its bytes if the files
    are at most 512 MiB in total, else of 64 KiB samples at its beginning, at its end and
    after every 16 MiB in between. This reads about 100 MB of 16 GB. Training, merging and
    quantizing change every sample; an edit of single rows of a large tensor may lie between
    two samples and go undetected. Names of files and folders are ignored, so a copy has the
    same identity.

    Args:
      path: as for `read_model_config`.

    Raises:
      InputError: a file is missing or damaged.
    """
    digest = hashlib.blake2b(digest_size=8)
    path = _with_weights(path)
    if path.endswith(".gguf"):
        reader = open_gguf(paths.require_file(path))
        content, header_end = reader.data, int(reader.data_offset)
        ranges_of = _ranges_of(len(content))
        digest.update(f"{len(content)}".encode())
        digest.update(content[:header_end])
        for tensor in reader.tensors:
            begin = int(tensor.data_offset)
            for start, end in ranges_of(begin, begin + int(tensor.n_bytes)):
                digest.update(content[start:end])
        return digest.hexdigest()
    folder = paths.resolve(path)
    files = sorted(
        {*huggingface.weight_map_of(folder).values()} or {"model.safetensors"}
    )
    headers_of = {
        file: huggingface.read_safetensors_header(file)
        for file in (folder / n for n in files)
    }
    ranges_of = _ranges_of(sum(file.stat().length for file in headers_of))
    for file, (header, data_begin) in headers_of.items():
        digest.update(f"{file.stat().length}".encode())
        digest.update(header)
        ranges = [
            sample
            for begin, end in sorted(huggingface.tensor_bounds(file, header))
            for sample in ranges_of(data_begin + begin, data_begin + end)
        ]
        for sample in paths.read_ranges(file, ranges) if ranges else ():
            digest.update(sample)
    return digest.hexdigest()


def exists(path: str) -> bool:
    """Whether a checkpoint is there, or can be downloaded."""
    try:
        return paths.exists(hub.local_model(path))
    except InputError:
        return False


def _with_weights(path: str) -> str:
    """The local path of a checkpoint; downloads its weights if it is on the Hub."""
    local = hub.local_model(path)
    folder = paths.resolve(local)
    if local == path or not folder.is_dir():
        return local
    names = {"model.safetensors"}
    if (folder / huggingface.INDEX).exists():
        names = {*huggingface.weight_map_of(folder).values()}
    return hub.local_model(path, *names)


_MOST_BYTES_WHOLE = 2**29
_SAMPLE_BYTES = 2**16
_BYTES_BETWEEN_SAMPLES = 2**24


def _ranges_of(num_bytes: int) -> Callable[[int, int], Iterable[tuple[int, int]]]:
    """The ranges of a tensor to hash, for files of this total size."""
    return _samples if num_bytes > _MOST_BYTES_WHOLE else lambda *whole: [whole]


def _samples(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Byte ranges spread over a tensor from its first byte to its last."""
    count = 2 + (end - begin) // _BYTES_BETWEEN_SAMPLES
    room = end - begin - _SAMPLE_BYTES
    if room <= (count - 1) * _SAMPLE_BYTES:
        yield begin, end
        return
    for i in range(count):
        start = begin + room * i // (count - 1)
        yield start, start + _SAMPLE_BYTES


def _make_array(
    leaf: jax.ShapeDtypeStruct, read: Callable[[Index, tuple[int, ...]], np.ndarray]
) -> jax.Array:
    """Like `jax.make_array_from_callback`, but with one shard on the host at a time.

    That function reads all local shards before it moves the first one to its device,
    and reads a shard once for each of its replicas.
    """
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    indices = sharding.addressable_devices_indices_map(leaf.shape)
    replicas = collections.defaultdict(list)
    for device, index in indices.items():
        replicas[str(index)].append(device)  # Slices are not hashable in Python 3.11.
    arrays = []
    for devices in replicas.values():
        shard = read(indices[devices[0]], sharding.shard_shape(leaf.shape))
        arrays += [jax.device_put(shard, device) for device in devices]
        jax.block_until_ready(arrays)  # Otherwise shards queue up on the host.
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def _check_tensors(
    path: str, tensors: dict[str, Tensor], abstract_params: Params, family: str
) -> None:
    """Compares headers with the template, before any weight is read."""
    expected = {}
    for key_path, leaf in jax.tree.leaves_with_path(abstract_params):
        key = families.key_of(key_path)
        names = families.tensor_names(key, leaf.shape, family)
        shape = leaf.shape[names.ndim :]
        if families.is_transposed(key):
            shape = shape[::-1]
        expected |= dict.fromkeys(names.ravel().tolist(), shape)
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(
                f"{path}: tensor {name} is missing; "
                "the weights do not belong to this config, or part of them is lost"
            )
        if tensors[name].shape != shape:
            raise InputError(
                f"{tensors[name].file}: tensor {name} has shape "
                f"{tensors[name].shape}; the config asks for {shape}"
            )
    for name, tensor in tensors.items():
        if name in expected or name.endswith("rotary_emb.inv_freq"):
            continue  # RoPE's frequencies are computed here.
        if name == families.TENSORS["unembedding"]:
            _check_repeats(tensor, tensors[families.TENSORS["embedding"]])
        else:
            raise InputError(
                f"{tensor.file}: tensor {name} {tensor.shape} has no place in this "
                "model; the weights do not belong to this config"
            )


def _check_repeats(head: Tensor, embedding: Tensor) -> None:
    """A tied model may repeat its embedding, and nothing else, under the head's name."""
    is_same = head.shape == embedding.shape
    num_rows = head.shape[0] if is_same else 0
    for first in range(0, num_rows, 2**12):
        index = (slice(first, min(first + 2**12, num_rows)), slice(None))
        is_same = is_same and np.array_equal(head.read(index), embedding.read(index))
    if not is_same:
        raise InputError(
            f"{head.file}: tensor {families.TENSORS['unembedding']} differs from the "
            f"embedding, and {MARKER} says that the two are tied; set "
            "tie_word_embeddings to false there to use it, or remove the tensor"
        )
