"""Checkpoints from elsewhere -> parameters, and back: safetensors and GGUF, no pickle.

One table maps our parameters to Hugging Face tensor names; GGUF's names are translated
to those first. All names and shapes are checked from file headers before any weight is
read. Then each device's shard is read on its own, so the host never holds more than
one shard of one parameter.

Hugging Face stores projections as [out, in] and one tensor per layer; ours are
[in, out] and stacked over layers on the first axis. Gemma's norms multiply by 1 + what
is stored; ours by what they hold, as llama.cpp's.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import gguf
import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mixcpt_jax.core import paths
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.models import headers
from mixcpt_jax.models.headers import Header
from mixcpt_jax.models.tokenizer import Tokenizer, gguf_header, open_gguf
from mixcpt_jax.models.transformer import (
    LinearRopeScaling,
    Llama3RopeScaling,
    ModelConfig,
    Params,
    rope_frequencies,
)
from mixcpt_jax.runtime import finite

_TENSORS = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "unembedding": "lm_head.weight",
    "layers/attention_norm": "model.layers.{}.input_layernorm.weight",
    "layers/query": "model.layers.{}.self_attn.q_proj.weight",
    "layers/key": "model.layers.{}.self_attn.k_proj.weight",
    "layers/value": "model.layers.{}.self_attn.v_proj.weight",
    "layers/query_bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers/key_bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers/value_bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers/query_norm": "model.layers.{}.self_attn.q_norm.weight",
    "layers/key_norm": "model.layers.{}.self_attn.k_norm.weight",
    "layers/output": "model.layers.{}.self_attn.o_proj.weight",
    "layers/mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers/gate": "model.layers.{}.mlp.gate_proj.weight",
    "layers/up": "model.layers.{}.mlp.up_proj.weight",
    "layers/down": "model.layers.{}.mlp.down_proj.weight",
}

# Where Gemma's names differ.
_GEMMA_TENSORS = {
    "layers/post_attention_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp_norm": "model.layers.{}.pre_feedforward_layernorm.weight",
    "layers/post_mlp_norm": "model.layers.{}.post_feedforward_layernorm.weight",
}

_GGUF_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}

# GGUF's name of an architecture -> the family.
_GGUF_FAMILIES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}

_GEMMA = ("gemma2", "gemma3_text")

# Settings of config.json that change the function, and the one value that is computed.
_FIXED = {
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "use_bidirectional_attention": False,
}
_FIXED_OF = {
    "gemma2": {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma3_text": {
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": None,
    },
}

# Keys of GGUF that change the function, and the values with which they do not: 0 is
# none to llama.cpp.
_NEUTRAL = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
}
# Families that have some of them.
_READ = {
    "gemma2": ("attn_logit_softcapping", "final_logit_softcapping"),
    "gemma3_text": ("final_logit_softcapping",),
}

# Without it nobody takes a folder for a model.
_MARKER = "config.json"
_INDEX = "model.safetensors.index.json"
_MOST_LAYERS = 10_000
_GENERATION = "generation_config.json"
# The key of an export's config.json that lists its files.
_WRITTEN = "exported_files"
# In the folder of an export that is being written.
_LEFTOVER = "may_be_deleted"
_REMEDY = (
    "a Hugging Face folder or a .gguf file is wanted. Nothing is downloaded: a model of "
    "the hub becomes a folder by `hf download NAME --local-dir FOLDER`"
)

Index = tuple[slice, ...]


class _Tensor(NamedTuple):
    """A tensor in a file: what its header says, and how to read a part of it."""

    file: str
    name: str
    shape: tuple[int, ...]
    read: Callable[[Index], np.ndarray]


def read_model_config(path: str) -> ModelConfig:
    """Reads a checkpoint's architecture.

    Args:
      path: a Hugging Face folder (its `config.json`, of model type llama, mistral,
        qwen2, qwen3, gemma2 or gemma3_text), a `.json` file like that one, or a `.gguf`
        file (of architecture llama, qwen2, qwen3, gemma2 or gemma3).

    Raises:
      InputError: the file is missing or damaged, or describes a network that `model.py`
        does not compute; names the file, the key, its value and what is supported.
    """
    if path.endswith(".gguf"):
        file = paths.require_file(path)
        return _config_from_gguf(open_gguf(file), file)
    if path.endswith(".json"):
        return _config_from_hf(paths.require_file(path))
    refuse_adapter(path)
    file = f"{path.rstrip('/')}/{_MARKER}"
    return _config_from_hf(paths.require_file(file, _REMEDY))


def refuse_adapter(path: str) -> None:
    """Checks that a folder does not hold an adapter, alone or beside a model.

    What reads a folder of both differs: some merge the adapter, some leave it out.

    Raises:
      InputError: it holds one; names its base and what to do.
    """
    folder = paths.resolve(path)
    found = [*folder.glob("adapter_config.json"), *folder.glob("adapter_model.*")]
    if not found:
        return
    settings = headers.read_if_there(folder / "adapter_config.json")
    base = settings.text("base_model_name_or_path", "a model that it does not name")
    merge = (
        f"`PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), "
        f"{str(folder)!r}).merge_and_unload().save_pretrained(new)`"
    )
    if (folder / _MARKER).exists():
        raise InputError(
            f"{folder}: holds an adapter ({found[0].name}) beside a model; move the "
            f"adapter's files away to use the model alone, or merge them by {merge}"
        )
    raise InputError(
        f"{folder}: holds an adapter of {base} and no model ({found[0].name}); merge the "
        f"two by {merge} and name the new folder"
    )


def load_params(path: str, abstract_params: Params) -> Params:
    """Streams a checkpoint into arrays, each cast and sharded as its template says.

    Args:
      path: as for `read_model_config`. Of files in a bucket there are copies on the
        local disk (under TMPDIR) while they are read.
      abstract_params: nested dict of `jax.ShapeDtypeStruct`s. One without a sharding
        goes to the first device.

    Raises:
      InputError: a file is missing or damaged, or a tensor is missing, left over,
        misshapen or holds a NaN or an infinity; names the tensor and the file.
    """
    family = read_model_config(path).family
    if path.endswith(".gguf"):
        tensors = _open_gguf(paths.require_file(path))
    else:
        tensors = _open_safetensors(paths.resolve(path), family)
    _check_tensors(path, tensors, abstract_params, family)

    def load(key_path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        key = _key(key_path)
        sources = [tensors[name] for name in _tensor_names(key, leaf.shape, family)]

        def read(index: Index, shape: tuple[int, ...]) -> np.ndarray:
            shard = np.empty(shape, leaf.dtype)
            if _is_stacked(key):
                parts, wanted, index = shard, sources[index[0]], index[1:]
            else:
                parts, wanted = shard[None], sources
            for part, source in zip(parts, wanted, strict=True):
                if _is_transposed(key):
                    part[...] = source.read(index[::-1]).T
                else:
                    part[...] = source.read(index)
            return shard

        return _make_array(leaf, read)

    params = jax.tree.map_with_path(load, abstract_params)
    if broken := finite.find_broken(params):
        tensor = tensors[_name_of(broken, family)]
        raise InputError(
            f"{tensor.file}: tensor {tensor.name} holds values that are not finite "
            "numbers; its training has diverged or its conversion overflowed: use other "
            "weights"
        )
    return params


def identity(path: str) -> str:
    """Sixteen hex digits that tell a checkpoint's weights from others.

    A hash of each file's size and header, and of each tensor: of all its bytes where the
    files have at most 512 MiB together, else of samples, 64 KiB at its beginning, at its
    end and after every 16 MiB in between. That reads some 100 MB of 16 GB. Training,
    merging and quantising change every sample; an edit of single rows of a large tensor
    may lie between two. Names of files and folders do not count: a copy is the same.

    Args:
      path: as for `read_model_config`.

    Raises:
      InputError: a file is missing or damaged.
    """
    digest = hashlib.blake2b(digest_size=8)
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
    files = sorted({*_weight_map(folder).values()} or {"model.safetensors"})
    headers_of = {
        file: _read_safetensors_header(file) for file in (folder / n for n in files)
    }
    ranges_of = _ranges_of(sum(file.stat().length for file in headers_of))
    for file, (header, data_begin) in headers_of.items():
        digest.update(f"{file.stat().length}".encode())
        digest.update(header)
        ranges = [
            sample
            for begin, end in sorted(_tensor_bounds(file, header))
            for sample in ranges_of(data_begin + begin, data_begin + end)
        ]
        for sample in paths.read_ranges(file, ranges) if ranges else ():
            digest.update(sample)
    return digest.hexdigest()


_MOST_BYTES_WHOLE = 2**29
_SAMPLE_BYTES = 2**16
_BYTES_BETWEEN_SAMPLES = 2**24


def _ranges_of(num_bytes: int) -> Callable[[int, int], Iterable[tuple[int, int]]]:
    """What of a tensor is hashed, of files of so many bytes."""
    return _samples if num_bytes > _MOST_BYTES_WHOLE else lambda *whole: [whole]


def _samples(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Ranges of bytes that are spread over a tensor from its first to its last."""
    count = 2 + (end - begin) // _BYTES_BETWEEN_SAMPLES
    room = end - begin - _SAMPLE_BYTES
    if room <= (count - 1) * _SAMPLE_BYTES:
        yield begin, end
        return
    for i in range(count):
        start = begin + room * i // (count - 1)
        yield start, start + _SAMPLE_BYTES


def _read_safetensors_header(file: epath.Path) -> tuple[bytes, int]:
    """The header, JSON, and where the tensors behind it begin."""
    if not file.exists():
        raise InputError(f"{file}: no such file; download it again")
    (size,) = paths.read_ranges(file, [(0, 8)])
    end = 8 + int.from_bytes(size, "little")
    if len(size) < 8 or end > file.stat().length:
        raise InputError(f"{file}: not a whole safetensors file; download it again")
    (header,) = paths.read_ranges(file, [(8, end)])
    return header, end


def _tensor_bounds(file: epath.Path, header: bytes) -> Iterator[tuple[int, int]]:
    """(begin, end) of each tensor, in bytes after the header."""
    try:
        entries = json.loads(header)
        for name, entry in entries.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                yield int(begin), int(end)
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise InputError(
            f"{file}: not a whole safetensors file ({error!r}); download it again"
        ) from error


def save_pretrained(
    folder: str,
    params: Params,
    config: ModelConfig,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: str = "bfloat16",
    stop_ids: Iterable[int] = (),
    max_shard_bytes: int = 5 * 2**30,
    start: str = "",
) -> None:
    """Writes a folder that transformers' `from_pretrained` loads.

    It is written to `{folder}.incomplete` and renamed at the end, so a folder of this
    name is always whole; one from an earlier export is replaced. In a bucket, where
    folders have no names of their own, `config.json` is deleted first and comes back
    last. Every process of a multi-host run must call this; the first one writes.

    Args:
      folder: on a local disk or in a bucket.
      params: the parameters, sharded in any way.
      config: their architecture.
      tokenizer: saved alongside; its BOS and EOS go into `config.json` too.
      dtype: what weights are cast to: "bfloat16", "float16" or "float32".
      stop_ids: where generation ends, for `generation_config.json`.
      max_shard_bytes: weights are split into files of at most this size (or of one
        tensor). The host holds one such file at a time.
      start: the checkpoint that the parameters were trained from. Of its folder the
        licence goes along, and what `generation_config.json` says besides special tokens.

    Raises:
      InputError: `folder` exists and holds something other than an export, or holds
        `start` or lies in it; or a tensor holds a value that `dtype` has no number for.
        Then nothing is written or deleted.
    """
    target = paths.resolve(folder)
    check_target(target, start)
    if broken := finite.find_broken(params, dtype):
        raise InputError(
            f"{folder}: tensor {_name_of(broken, config.family)} reaches "
            f"{broken.largest:.6g}, which {dtype} cannot hold; export bfloat16 or float32 "
            "(export.dtype)"
        )
    tensors = _hf_tensors(params, config.family, dtype)
    if jax.process_index() != 0:
        for _ in tensors:  # Takes part in gathering them.
            pass
        return
    with _new_folder(target) as new:
        _write_safetensors(new, tensors, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(str(new))
        started_from = _files_beside(start)
        generation = _generation_config(
            started_from.get(_GENERATION), tokenizer, sorted(stop_ids)
        )
        if generation:
            _write_json(new / _GENERATION, generation)
        for name, file in started_from.items():
            if _LICENCE.fullmatch(name):
                paths.copy_file(file, new / name)
        raw = _config_to_hf(config, tokenizer, dtype)
        names = sorted({_MARKER, *(file.name for file in new.iterdir())})
        _write_json(new / _MARKER, raw | {_WRITTEN: names})


def _files_beside(start: str) -> dict[str, epath.Path]:
    """The files of a checkpoint's folder by name; of a GGUF file there are none."""
    folder = paths.resolve(start)
    files = folder.iterdir() if start and folder.is_dir() else ()
    return {file.name: file for file in files if file.is_file()}


def _generation_config(
    file: epath.Path | None, tokenizer: Tokenizer | None, stop_ids: list[int]
) -> dict[str, Any]:
    """What `file` says, but for the special tokens, which are the tokenizer's."""
    values = dict(headers.read(file).values) if file else {}
    # It was derived from the config, and would be again.
    values.pop("_from_model_config", None)
    ids = {"eos_token_id": stop_ids or None}
    if file and tokenizer is not None:
        ids |= {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    return values | {name: i for name, i in ids.items() if i is not None}


@contextlib.contextmanager
def _new_folder(target: epath.Path) -> Iterator[epath.Path]:
    """A folder on a local disk to write to, which takes the place of `target`."""
    if paths.is_remote(target):
        with tempfile.TemporaryDirectory(prefix="mixcpt-export-") as folder:
            new = epath.Path(folder)
            yield new
            _upload(new, target)
        return
    place = _incomplete(target)
    place.rmtree(missing_ok=True)
    place.mkdir(parents=True)
    (place / _LEFTOVER).touch()
    (new := place / "new").mkdir()
    yield new
    _check_replaceable(target)
    if target.exists():
        target.rename(place / "old")
    new.rename(target)
    place.rmtree()


def _incomplete(target: epath.Path) -> epath.Path:
    return target.parent / f"{target.name}.incomplete"


def _upload(folder: epath.Path, target: epath.Path) -> None:
    _check_replaceable(target)
    (target / _MARKER).unlink(missing_ok=True)
    for file in target.iterdir() if target.exists() else ():
        file.unlink()
    for file in sorted(folder.iterdir(), key=lambda file: file.name == _MARKER):
        paths.copy_file(file, target / file.name)


def _key(key_path) -> str:
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def _is_stacked(key: str) -> bool:
    return key.startswith("layers/")


def _is_transposed(key: str) -> bool:
    # True of norms and biases too: transposing a vector does nothing.
    return key != "embedding"


def _norm_offset(name: str, family: str) -> int:
    """What a norm multiplies by more than its Hugging Face tensor holds."""
    return int(name.endswith("norm.weight") and family in _GEMMA)


def _tensor_names(key: str, shape: tuple[int, ...], family: str) -> list[str]:
    """The Hugging Face tensors that make up one of our parameters."""
    name = (_TENSORS | (_GEMMA_TENSORS if family in _GEMMA else {}))[key]
    return [name.format(i) for i in range(shape[0])] if _is_stacked(key) else [name]


def _name_of(broken: finite.Broken, family: str) -> str:
    """The Hugging Face tensor that is broken."""
    layer = broken.layer or 0
    return _tensor_names(broken.key, (layer + 1,), family)[layer]


def _make_array(
    leaf: jax.ShapeDtypeStruct, read: Callable[[Index, tuple[int, ...]], np.ndarray]
) -> jax.Array:
    """Like `jax.make_array_from_callback`, with one shard on the host at a time.

    That function reads all local shards before it moves the first one to its device,
    and reads a shard once for each of its replicas.
    """
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    indices = sharding.addressable_devices_indices_map(leaf.shape)
    replicas = collections.defaultdict(list)
    for device, index in indices.items():
        replicas[str(index)].append(device)  # Slices have no hash in Python 3.11.
    arrays = []
    for devices in replicas.values():
        shard = read(indices[devices[0]], sharding.shard_shape(leaf.shape))
        arrays += [jax.device_put(shard, device) for device in devices]
        jax.block_until_ready(arrays)  # Else shards queue up on the host.
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def _check_tensors(
    path: str, tensors: dict[str, _Tensor], abstract_params: Params, family: str
) -> None:
    """Compares headers with what is wanted, before any weight is read."""
    wanted = {}
    for key_path, leaf in jax.tree.leaves_with_path(abstract_params):
        key = _key(key_path)
        shape = leaf.shape[1:] if _is_stacked(key) else leaf.shape
        if _is_transposed(key):
            shape = shape[::-1]
        wanted |= dict.fromkeys(_tensor_names(key, leaf.shape, family), shape)
    for name, shape in wanted.items():
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
        if name in wanted or name.endswith("rotary_emb.inv_freq"):
            continue  # RoPE's frequencies are computed here.
        if name == _TENSORS["unembedding"]:
            _check_repeats(tensor, tensors[_TENSORS["embedding"]])
        else:
            raise InputError(
                f"{tensor.file}: tensor {name} {tensor.shape} has no place in this "
                "model; the weights do not belong to this config"
            )


def _check_repeats(head: _Tensor, embedding: _Tensor) -> None:
    """A tied model may repeat its embedding, and nothing else, under the head's name."""
    is_same = head.shape == embedding.shape
    num_rows = head.shape[0] if is_same else 0
    for first in range(0, num_rows, 2**12):
        index = (slice(first, min(first + 2**12, num_rows)), slice(None))
        is_same = is_same and np.array_equal(head.read(index), embedding.read(index))
    if not is_same:
        raise InputError(
            f"{head.file}: tensor {_TENSORS['unembedding']} differs from the embedding, "
            f"and {_MARKER} says that the two are tied; set tie_word_embeddings to false "
            "there to use it, or take the tensor out"
        )


def _open_safetensors(folder: epath.Path, family: str) -> dict[str, _Tensor]:
    weight_map = _weight_map(folder)
    files = sorted(set(weight_map.values())) if weight_map else ["model.safetensors"]
    _tell_of_others(folder, files)
    tensors = {}
    for file in (folder / name for name in files):
        try:
            with paths.on_local_disk(file) as local:
                handle = safe_open(local, framework="numpy")
        except FileNotFoundError as error:
            raise InputError(f"{file}: no such file; download it again") from error
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file}: not a whole safetensors file ({error}); download it again"
            ) from error
        for name in handle.offset_keys():
            if weight_map and name not in weight_map:
                raise InputError(
                    f"{file}: tensor {name} is not in {_INDEX}; the two are not of one "
                    "save, download both again"
                )
            if weight_map and weight_map[name] != file.name:
                continue  # A copy; the index says which of them counts.
            view = handle.get_slice(name)
            if view.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                raise InputError(
                    f"{file}: tensor {name} is {view.get_dtype()}; quantised weights "
                    "are read from GGUF files only"
                )
            read = functools.partial(_read_view, view, _norm_offset(name, family))
            tensors[name] = _Tensor(str(file), name, tuple(view.get_shape()), read)
    for name in weight_map.keys() - tensors.keys():
        raise InputError(
            f"{folder / _INDEX}: tensor {name} is not in {weight_map[name]}, which it "
            "names; the two are not of one save, download both again"
        )
    return tensors


def _read_view(view: Any, offset: int, index: Index) -> np.ndarray:
    """Part of a safetensors file's tensor; a sum is float32."""
    return np.float32(view[index]) + offset if offset else view[index]


def _weight_map(folder: epath.Path) -> dict[str, str]:
    """Tensor -> the file that holds it; empty where `model.safetensors` holds all."""
    if not folder.exists():
        raise InputError(f"{folder}: no such folder")
    whole, index = folder / "model.safetensors", folder / _INDEX
    if index.exists():
        names = headers.read(index).mapping("weight_map")
        for tensor, name in names.items():
            paths.child(folder, name, f"{index}: weight_map of tensor {tensor!a:.80}")
        if not names:
            raise InputError(f"{index}: weight_map names no file; download it again")
        if whole.exists() and whole.name not in names.values():
            raise InputError(
                f"{folder}: holds {whole.name} and {index.name}, which does not name "
                "it: weights of two saves; move away what belongs to the older one"
            )
        return names
    if whole.exists():
        return {}
    if pickles := [*folder.glob("*.bin"), *folder.glob("*.pt*")]:
        raise InputError(
            f"{folder}: holds pickled weights ({pickles[0].name}), which can run code "
            "and are refused. If you trust them, convert them once: `transformers."
            "AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)`"
        )
    others = ", ".join(sorted(file.name for file in folder.glob("*.safetensors")))
    remedy = f" ({others} is not read); convert it to those" if others else ""
    raise InputError(f"{folder}: holds neither {whole.name} nor {index.name}{remedy}")


def _tell_of_others(folder: epath.Path, files: list[str]) -> None:
    """Warns of weights in a folder that are no part of the model that is read."""
    others = {file.name for file in folder.glob("*.safetensors")} - set(files)
    if others and jax.process_index() == 0:
        logging.warning(
            "%s: weights are read from %s; not read: %s",
            folder,
            files[0] if len(files) == 1 else f"the {len(files)} files of {_INDEX}",
            ", ".join(sorted(others)),
        )


def _open_gguf(file: epath.Path) -> dict[str, _Tensor]:
    reader = open_gguf(file)
    config = _config_from_gguf(reader, file)
    tensors = {}
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            continue  # Part of the config.
        name = _gguf_to_hf_name(tensor.name, config.family)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        interleaved_heads = None
        if config.family == "llama" and ".q_proj." in name:
            interleaved_heads = config.num_heads
        if config.family == "llama" and ".k_proj." in name:
            interleaved_heads = config.num_kv_heads
        read = functools.partial(_read_gguf, file, tensor, interleaved_heads)
        tensors[name] = _Tensor(str(file), tensor.name, shape, read)
    return tensors


def _gguf_to_hf_name(name: str, family: str) -> str:
    names = dict(_GGUF_TENSORS)
    if family in _GEMMA:
        names["ffn_norm"] = "pre_feedforward_layernorm"
    match name.split("."):
        case ["blk", layer, part, kind] if part in names:
            return f"model.layers.{layer}.{names[part]}.{kind}"
        case [part, kind] if part in names:
            return f"{names[part]}.{kind}"
    return name


def _read_gguf(
    file: epath.Path,
    tensor: gguf.ReaderTensor,
    interleaved_heads: int | None,
    index: Index,
) -> np.ndarray:
    """Dequantises only the rows, and within them only the blocks, that are wanted.

    llama.cpp interleaves the two halves of each head that RoPE rotates into each other;
    the rows of such a tensor are put back into Hugging Face's order.
    """
    *rows, columns = index  # A vector has no rows.
    if interleaved_heads is not None:
        order = np.arange(len(tensor.data)).reshape(interleaved_heads, -1, 2)
        rows = [order.swapaxes(1, 2).reshape(-1)[rows[0]]]
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    start, stop, _ = columns.indices(int(tensor.shape[0]))
    first, last = start // block_size, -(-stop // block_size)
    # Items are elements of float types, bytes of quantised types.
    items = block_bytes // tensor.data.dtype.itemsize
    blocks = tensor.data[(*rows, slice(first * items, last * items))]
    try:
        values = gguf.dequantize(np.ascontiguousarray(blocks), tensor.tensor_type)
    except NotImplementedError as error:
        raise InputError(
            f"{file}: tensor {tensor.name} is quantised as "
            f"{tensor.tensor_type.name}, which cannot be read; use another file"
        ) from error
    offset = first * block_size
    return values[..., start - offset : stop - offset]


def _config_from_hf(file: epath.Path) -> ModelConfig:
    header = headers.read(file)
    family = header.get("model_type")
    if family == "gemma3":
        raise InputError(
            f"{file}: model_type is 'gemma3', which reads images too; supported is its "
            "text model by itself: save that (Gemma3ForCausalLM, gemma3_text)"
        )
    header.require("model_type", tuple(_ARCHITECTURES))
    fixed = _FIXED | _FIXED_OF.get(family, {"hidden_act": "silu"})
    for key, supported in fixed.items():
        # Null counts as absent, as in transformers.
        if header.get(key) not in (None, supported):
            raise header.unsupported(key, supported)
    hidden_size = header.integer("hidden_size")
    num_heads = header.integer("num_attention_heads")
    num_layers = header.integer("num_hidden_layers", most=_MOST_LAYERS)
    head_size = header.integer("head_dim", _head_size(family, hidden_size, num_heads))
    # Transformers 5 gathers everything about RoPE under a new name, and by kinds of
    # layers where they differ.
    ropes, older = (header.mapping(k, {}) for k in ("rope_parameters", "rope_scaling"))
    if ropes and any(ropes.get(key) != value for key, value in older.items()):
        raise InputError(
            f"{file}: rope_scaling is {older} and rope_parameters is {ropes}; take one out"
        )
    ropes = Header(file, ropes or older)
    local_rope = Header(file, ropes.mapping("sliding_attention", {}))
    rope = Header(file, ropes.mapping("full_attention", {}) or ropes.values)
    default_theta = 1e6 if family == "gemma3_text" else 1e4
    theta = header.number("rope_theta", default_theta, least=1)
    theta = rope.number("rope_theta", theta, least=1)
    if _rope_scaling_from_hf(local_rope) is not None:
        raise local_rope.unsupported("rope_type", "default in local layers")
    window, global_layers = _windows_from_hf(header, num_layers)
    settings = {}
    if family == "gemma3_text" and window is not None:
        local_theta = header.number("rope_local_base_freq", 1e4, least=1)
        settings["local_rope_theta"] = local_rope.number(
            "rope_theta", local_theta, least=1
        )
    if family in _GEMMA:
        query_scale = header.number("query_pre_attn_scalar", 256)
        settings["query_scale"] = None if query_scale == head_size else query_scale
        # Absent they have defaults in Gemma 2; null there are none.
        for name, key, default in (
            ("attention_soft_cap", "attn_logit_softcapping", 50.0),
            ("final_soft_cap", "final_logit_softcapping", 30.0),
        ):
            is_default = family == "gemma2" and key not in header.values
            settings[name] = header.number(key, default if is_default else None)
    vocab_size = header.integer("vocab_size")
    _check_special_ids(header, vocab_size)
    config = ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        mlp_size=header.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=header.integer("num_key_value_heads", num_heads),
        head_size=head_size,
        max_positions=header.integer("max_position_embeddings"),
        rope_theta=theta,
        rope_scaling=_rope_scaling_from_hf(rope),
        sliding_window=window,
        global_layers=global_layers,
        norm_epsilon=header.number("rms_norm_eps", 1e-6, most=1),
        tie_embeddings=header.flag("tie_word_embeddings", family in _GEMMA),
        **_implied(family),
        **settings,
    )
    _check_heads(config, header, "num_attention_heads", "num_key_value_heads")
    return config


def _check_special_ids(header: Header, vocab_size: int) -> None:
    """They are the tokenizer's affair; ones that no row is for belong to another model."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(header.get(name), list):
            header.many(
                name,
                lambda i: headers.is_integer(i) and 0 <= i < vocab_size,
                f"a list of integers from 0 to {vocab_size - 1}",
            )
        else:
            header.integer(name, None, least=0, most=vocab_size - 1)


def _check_heads(config: ModelConfig, header: Header, heads: str, kv_heads: str):
    if config.num_heads % config.num_kv_heads:
        raise header.wrong(kv_heads, f"a divisor of {heads}, {config.num_heads},")
    if config.head_size < 2 or config.head_size % 2:
        raise InputError(
            f"{header.file}: heads have size {config.head_size}; RoPE takes an even one, "
            f"see {header.prefix}{heads}"
        )


def _implied(family: str) -> dict[str, Any]:
    """What a family's network has and its files do not say."""
    gemma = {"post_norms": True, "activation": "gelu_tanh", "scale_embeddings": True}
    match family:
        case "qwen2":
            return {"qkv_bias": True}
        case "qwen3":
            return {"qk_norm": True}
        case "gemma2":
            return gemma
        case "gemma3_text":
            return gemma | {"qk_norm": True}
    return {}


def _head_size(family: str, hidden_size: int, num_heads: int) -> int:
    """What the head size is where a file does not say it."""
    match family:
        case "qwen3":
            return 128
        case "gemma2" | "gemma3_text":
            return 256
    return hidden_size // num_heads


def _rope_scaling_from_hf(
    rope: Header,
) -> Llama3RopeScaling | LinearRopeScaling | None:
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise rope.unsupported("partial_rotary_factor", 1.0)
    kind = rope.text("rope_type", None) or rope.text("type", None)
    match kind:
        case None if settings := rope.values.keys() - _ROPE_OF_ANY_KIND:
            raise InputError(
                f"{rope.file}: rope_type is missing beside {', '.join(sorted(settings))}; "
                "say which kind of scaling of RoPE it is"
            )
        case None | "default":
            return None
        case "linear":
            return LinearRopeScaling(rope.number("factor"))
        case "llama3":
            scaling = Llama3RopeScaling(
                factor=rope.number("factor"),
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
                original_max_positions=rope.integer("original_max_position_embeddings"),
            )
            if scaling.high_freq_factor <= scaling.low_freq_factor:
                low = scaling.low_freq_factor
                raise rope.wrong(
                    "high_freq_factor", f"more than low_freq_factor, {low},"
                )
            return scaling
    key = "rope_type" if rope.get("rope_type") else "type"
    raise rope.unsupported(key, "default, linear, llama3")


_ROPE_OF_ANY_KIND = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}


def _windows_from_hf(
    header: Header, num_layers: int
) -> tuple[int | None, tuple[int, ...]]:
    """The sliding window, and the layers that do not have it."""
    layers = range(num_layers)
    # Null there is none.
    default = 4096 if "sliding_window" not in header.values else None
    match header.get("model_type"):
        case "llama":
            return None, ()
        case "mistral":
            return header.integer("sliding_window", default), ()
        case "qwen2" | "qwen3":
            if not header.flag("use_sliding_window", False):
                return None, ()
            first_local = header.integer("max_window_layers", 28, least=0)
            local = [i >= first_local for i in layers]
        case "gemma2":
            local = [i % 2 == 0 for i in layers]
        case "gemma3_text":
            period = header.integer("sliding_window_pattern", 6)
            local = [(i + 1) % period != 0 for i in layers]
    known = ("full_attention", "sliding_attention")
    kinds = header.get("layer_types")
    if kinds is not None:
        wanted = f"{num_layers} of {', '.join(known)}"
        is_right = isinstance(kinds, list) and all(kind in known for kind in kinds)
        if not is_right or len(kinds) != num_layers:
            raise header.unsupported("layer_types", wanted)
        local = [kind == known[1] for kind in kinds]
    window = header.integer("sliding_window", default)
    if window is None or not any(local):
        return None, ()
    return window, tuple(i for i in layers if not local[i])


def _config_to_hf(
    config: ModelConfig, tokenizer: Tokenizer | None, dtype: str
) -> dict[str, Any]:
    match config.rope_scaling:
        case None:
            rope_scaling = None
        case LinearRopeScaling(factor):
            rope_scaling = {"rope_type": "linear", "type": "linear", "factor": factor}
        case Llama3RopeScaling(factor, low, high, original):
            rope_scaling = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    activation = _FIXED_OF.get(config.family, {}).get("hidden_activation", "silu")
    raw = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": activation,
        "max_position_embeddings": config.max_positions,
        # Transformers 5 reads this older spelling of RoPE's settings too.
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_scaling,
        "sliding_window": config.sliding_window,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
    }
    if config.family not in ("llama", "mistral"):
        raw["layer_types"] = [
            "full_attention" if window is None else "sliding_attention"
            for window in config.windows
        ]
    if config.family in ("qwen2", "qwen3"):
        raw["use_sliding_window"] = config.sliding_window is not None
        raw["max_window_layers"] = len(config.global_layers)
    if config.family in _GEMMA:
        raw |= {
            "hidden_activation": activation,
            "query_pre_attn_scalar": config.query_scale or config.head_size,
            "attn_logit_softcapping": config.attention_soft_cap,
            "final_logit_softcapping": config.final_soft_cap,
        }
    if config.local_rope_theta is not None:
        raw["rope_local_base_freq"] = config.local_rope_theta
    if tokenizer is not None:
        raw["bos_token_id"] = tokenizer.bos_id
        raw["eos_token_id"] = tokenizer.eos_id
    return raw


def _config_from_gguf(reader: gguf.GGUFReader, file: epath.Path) -> ModelConfig:
    general = gguf_header(reader, file)
    general.require("general.architecture", tuple(_GGUF_FAMILIES))
    name = general.text("general.architecture")
    family, header = _GGUF_FAMILIES[name], general.within(f"{name}.")
    for key in _NEUTRAL.keys() - _READ.get(family, ()):
        if header.get(key) not in (None, *_NEUTRAL[key]):
            values = " or ".join(map(str, _NEUTRAL[key]))
            raise header.unsupported(key, f"{values}, which changes nothing")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise InputError(f"{file}: tensor token_embd.weight is missing")
    vocab_size = int(tensors["token_embd.weight"].shape[-1])
    if header.integer("vocab_size", vocab_size) != vocab_size:
        raise header.wrong("vocab_size", f"the embedding's {vocab_size}")
    hidden_size = header.integer("embedding_length")
    num_heads = header.integer("attention.head_count")
    num_layers = header.integer("block_count", most=_MOST_LAYERS)
    head_size = header.integer("attention.key_length", hidden_size // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if header.integer(key, head_size) != head_size:
            raise header.unsupported(key, head_size)
    default_theta = 1e6 if name == "gemma3" else 1e4
    theta = header.number("rope.freq_base", default_theta, least=1)
    epsilon = header.number("attention.layer_norm_rms_epsilon", most=1)
    config = ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        mlp_size=header.integer("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=header.integer("attention.head_count_kv", num_heads),
        head_size=head_size,
        max_positions=header.integer("context_length"),
        rope_theta=theta,
        # Stored as float32; its shortest decimal is the number the authors wrote.
        norm_epsilon=float(str(np.float32(epsilon))),
        tie_embeddings="output.weight" not in tensors,
        **_implied(family),
        **_gemma_from_gguf(name, header, num_layers, head_size),
    )
    _check_heads(config, header, "attention.head_count", "attention.head_count_kv")
    frequencies = tensors.get("rope_freqs.weight")
    scaling = _rope_scaling_from_gguf(header, config, frequencies)
    return dataclasses.replace(config, rope_scaling=scaling)


def _rope_scaling_from_gguf(
    header: Header, config: ModelConfig, frequencies: gguf.ReaderTensor | None
) -> Llama3RopeScaling | LinearRopeScaling | None:
    # Older files spell the factor otherwise; one without a kind is linear: llama.cpp.
    factors = [
        factor
        for key in ("rope.scaling.factor", "rope.scale_linear")
        if (factor := header.number(key, None)) is not None
    ]
    default = "linear" if any(factor != 1 for factor in factors) else "none"
    match header.text("rope.scaling.type", default):
        case "linear":
            if frequencies is not None or len(set(factors)) > 1:
                raise InputError(
                    f"{header.file}: scales RoPE in several ways, by factors {factors}"
                    f"{' and rope_freqs.weight' if frequencies is not None else ''}; "
                    "use the model's safetensors instead"
                )
            return LinearRopeScaling(header.number("rope.scaling.factor", *factors[:1]))
        case "none" if frequencies is not None:
            return _llama3_scaling(config, frequencies.data, header.file)
        case "none":
            return None
    raise header.unsupported("rope.scaling.type", "none, linear")


def _gemma_from_gguf(
    name: str, header: Header, num_layers: int, head_size: int
) -> dict[str, Any]:
    """What is peculiar to Gemma; llama.cpp knows some of it by heart."""
    if name not in ("gemma2", "gemma3"):
        return {}
    default_period = 2 if name == "gemma2" else 6
    period = header.integer("attention.sliding_window_pattern", default_period)
    settings = {
        "sliding_window": header.integer("attention.sliding_window", 4096),
        "global_layers": tuple(range(period - 1, num_layers, period)),
    }
    if num_layers == {"gemma2": 46, "gemma3": 62}[name]:
        # The 27B models divide by what heads would have if all were of one width.
        scale = header.integer("embedding_length") // header.integer(
            "attention.head_count"
        )
        settings["query_scale"] = None if scale == head_size else scale
    if name == "gemma3":
        settings["local_rope_theta"] = header.number("rope.freq_base_swa", 1e4, least=1)
        if header.get("final_logit_softcapping"):  # 0: none
            settings["final_soft_cap"] = header.number("final_logit_softcapping")
        return settings
    return settings | {
        "attention_soft_cap": header.number("attn_logit_softcapping", 50.0),
        "final_soft_cap": header.number("final_logit_softcapping", 30.0),
    }


def _llama3_scaling(
    config: ModelConfig, factors: np.ndarray, file: epath.Path
) -> Llama3RopeScaling:
    """Finds the settings behind the divisors that llama.cpp stores in their place."""
    scaling = Llama3RopeScaling(
        factor=float(factors.max()),
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=8192,
    )
    scaled = rope_frequencies(dataclasses.replace(config, rope_scaling=scaling))
    expected = rope_frequencies(config) / scaled
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise InputError(
            f"{file}: tensor rope_freqs.weight is not Llama 3.1's scaling (factors 1 "
            "and 4, 8192 original positions); use the model's safetensors instead"
        )
    return scaling


def _hf_tensors(
    params: Params, family: str, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Brings one Hugging Face tensor after another to the host."""
    for key_path, leaf in jax.tree.leaves_with_path(params):
        key = _key(key_path)
        for i, name in enumerate(_tensor_names(key, leaf.shape, family)):
            array = _layer(leaf, i) if _is_stacked(key) else leaf
            array = _cast(array, _norm_offset(name, family), dtype)
            if array.is_fully_addressable:
                array = np.asarray(array)
            else:
                array = multihost_utils.process_allgather(array, tiled=True)
            yield name, np.ascontiguousarray(array.T if _is_transposed(key) else array)


# Jitted, because arrays that span hosts refuse eager operations.
@jax.jit
def _layer(stack: jax.Array, layer: int) -> jax.Array:
    return stack[layer]


@functools.partial(jax.jit, static_argnames="dtype")
def _cast(array: jax.Array, offset: int, dtype: str) -> jax.Array:
    return (array - offset).astype(dtype)


def _write_safetensors(
    folder: epath.Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    max_bytes: int,
) -> None:
    """Writes `model.safetensors`, or numbered files and the index over them."""
    shards: list[list[str]] = []
    pending, total_bytes = {}, 0

    def flush():
        file = folder / f"{len(shards)}.safetensors"
        save_file(pending, file, metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        pending_bytes = sum(t.nbytes for t in pending.values())
        if pending and pending_bytes + tensor.nbytes > max_bytes:
            flush()
        pending[name] = tensor
        total_bytes += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{i}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total_bytes}, "weight_map": weight_map},
    )


def _write_json(file: epath.Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


_LICENCE = re.compile(r"(licen[cs]e|notice|copying|use_policy)[\w.-]*", re.IGNORECASE)


def check_target(folder: epath.Path, *models: str) -> None:
    """Checks that writing an export to a folder deletes nothing but an earlier export.

    Args:
      folder: of the export.
      models: paths of what is read to make it.

    Raises:
      InputError: the folder, or what is left beside it of an interrupted export, holds
        what no export wrote; or it holds a model, or lies in one.
    """
    target = _real(folder)
    for path in filter(None, models):
        model = _real(paths.resolve(path))
        if model == target or model in target.parents or target in model.parents:
            raise InputError(
                f"{folder}: the export would change {path}, which it is made of; name "
                "another folder"
            )
    _check_replaceable(folder)
    leftover = _incomplete(folder)
    if _is_there(leftover) and not (leftover / _LEFTOVER).exists():
        raise InputError(
            f"{leftover}: is no leftover of an export, which needs this name; move it away"
        )


def _real(path: epath.Path) -> pathlib.PurePath:
    """A path without links and dots."""
    return pathlib.PurePath(
        str(path) if paths.is_remote(path) else os.path.realpath(path)
    )


def _is_there(path: epath.Path) -> bool:
    """Whether a local disk has it, if only as a link to nothing."""
    return not paths.is_remote(path) and os.path.lexists(path)


def _check_replaceable(folder: epath.Path) -> None:
    """Nothing is deleted that an export did not write."""
    if _is_there(folder) and not folder.is_dir():
        raise InputError(f"{folder}: is no folder; name another one")
    if not folder.exists():
        return
    marker = folder / _MARKER
    config = headers.read(marker).values if marker.exists() else {}
    written = config.get(_WRITTEN)
    # What loads a model and saves it keeps keys that it does not know.
    if not isinstance(written, list) or "transformers_version" in config:
        written = []
    for file in folder.iterdir():
        if file.name not in written or file.is_dir():
            raise InputError(
                f"{folder}: holds {file.name}, which is not part of an export and "
                "would be lost; name another folder"
            )


FOLDER = "hf"
