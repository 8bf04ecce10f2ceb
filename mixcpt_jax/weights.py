"""Checkpoints from elsewhere -> parameters, and back: safetensors and GGUF, no pickle.

One table maps our parameters to Hugging Face tensor names; GGUF's names are translated
to those first. All names and shapes are checked from file headers before any weight is
read. Then each device's shard is read on its own, so the host never holds more than
one shard of one parameter.

Hugging Face stores projections as [out, in] and one tensor per layer; ours are
[in, out] and stacked over layers on the first axis.
"""

import collections
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mixcpt_jax import paths
from mixcpt_jax.errors import InputError
from mixcpt_jax.model import (
    LinearRopeScaling,
    Llama3RopeScaling,
    ModelConfig,
    Params,
    rope_frequencies,
)
from mixcpt_jax.tokenizer import Tokenizer, open_gguf

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
    "layers/output": "model.layers.{}.self_attn.o_proj.weight",
    "layers/mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers/gate": "model.layers.{}.mlp.gate_proj.weight",
    "layers/up": "model.layers.{}.mlp.up_proj.weight",
    "layers/down": "model.layers.{}.mlp.down_proj.weight",
}

_GGUF_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}

# Settings of config.json that change the function, and the one value we compute.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}

Index = tuple[slice, ...]


class _Tensor(NamedTuple):
    """A tensor in a file: what its header says, and how to read a part of it."""

    file: str
    shape: tuple[int, ...]
    read: Callable[[Index], np.ndarray]


def read_model_config(path: str) -> ModelConfig:
    """Reads a checkpoint's architecture.

    Args:
      path: a Hugging Face folder (its `config.json`, of model type llama, mistral or
        qwen2) or a `.gguf` file (of architecture llama or qwen2).

    Raises:
      InputError: the file is missing or damaged, or describes a network that `model.py`
        does not compute; names the file, the key, its value and what is supported.
    """
    if path.endswith(".gguf"):
        file = paths.require_file(path)
        return _config_from_gguf(open_gguf(file), file)
    return _config_from_hf(paths.require_file(f"{path.rstrip('/')}/config.json"))


def load_params(path: str, abstract_params: Params) -> Params:
    """Streams a checkpoint into arrays, each cast and sharded as its template says.

    Args:
      path: as for `read_model_config`; on a local disk.
      abstract_params: nested dict of `jax.ShapeDtypeStruct`s. One without a sharding
        goes to the first device.

    Raises:
      InputError: a file is missing or damaged, or a tensor is missing, left over or
        misshapen; names the tensor and the file.
    """
    if path.endswith(".gguf"):
        tensors = _open_gguf(paths.require_file(path))
    else:
        tensors = _open_safetensors(paths.resolve(path))
    _check_tensors(path, tensors, abstract_params)

    def load(key_path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        key = _key(key_path)
        sources = [tensors[name] for name in _tensor_names(key, leaf.shape)]

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

    return jax.tree.map_with_path(load, abstract_params)


def save_pretrained(
    folder: str,
    params: Params,
    config: ModelConfig,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: str = "bfloat16",
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Writes a folder that transformers' `from_pretrained` loads.

    It is written under a temporary name and renamed at the end, so a folder of this
    name is always whole; one from an earlier export is replaced. Every process of a
    multi-host run must call this; the first one writes.

    Args:
      folder: on a local disk.
      params: the parameters, sharded in any way.
      config: their architecture.
      tokenizer: saved alongside; its BOS and EOS go into `config.json` too.
      dtype: what weights are cast to: "bfloat16", "float16" or "float32".
      max_shard_bytes: weights are split into files of at most this size (or of one
        tensor). The host holds one such file at a time.

    Raises:
      InputError: `folder` exists and holds something other than an export.
    """
    target = _require_local(paths.resolve(folder))
    _check_replaceable(target)
    tensors = _hf_tensors(params, dtype)
    if jax.process_index() != 0:
        for _ in tensors:  # Takes part in gathering them.
            pass
        return
    temporary = target.parent / f"{target.name}.incomplete"
    temporary.rmtree(missing_ok=True)
    temporary.mkdir(parents=True)
    _write_safetensors(temporary, tensors, max_shard_bytes)
    if tokenizer is not None:
        tokenizer.save(str(temporary))
    _write_json(temporary / "config.json", _config_to_hf(config, tokenizer, dtype))
    outdated = target.parent / f"{target.name}.outdated"
    outdated.rmtree(missing_ok=True)
    if target.exists():
        target.rename(outdated)
    temporary.rename(target)
    outdated.rmtree(missing_ok=True)


def _key(key_path) -> str:
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def _is_stacked(key: str) -> bool:
    return key.startswith("layers/")


def _is_transposed(key: str) -> bool:
    # True of norms and biases too: transposing a vector does nothing.
    return key != "embedding"


def _tensor_names(key: str, shape: tuple[int, ...]) -> list[str]:
    """The Hugging Face tensors that make up one of our parameters."""
    name = _TENSORS[key]
    return [name.format(i) for i in range(shape[0])] if _is_stacked(key) else [name]


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
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def _check_tensors(
    path: str, tensors: dict[str, _Tensor], abstract_params: Params
) -> None:
    """Compares headers with what is wanted, before any weight is read."""
    wanted = {}
    for key_path, leaf in jax.tree.leaves_with_path(abstract_params):
        key = _key(key_path)
        shape = leaf.shape[1:] if _is_stacked(key) else leaf.shape
        if _is_transposed(key):
            shape = shape[::-1]
        wanted |= dict.fromkeys(_tensor_names(key, leaf.shape), shape)
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
        # A tied model may repeat its embedding; RoPE's frequencies are computed here.
        known = name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")
        if name not in wanted and not known:
            raise InputError(
                f"{tensor.file}: tensor {name} {tensor.shape} has no place in this "
                "model; the weights do not belong to this config"
            )


def _open_safetensors(folder: epath.Path) -> dict[str, _Tensor]:
    _require_local(folder)
    tensors = {}
    for file in _safetensors_files(folder):
        try:
            handle = safe_open(file, framework="numpy")
        except FileNotFoundError as error:
            raise InputError(f"{file}: no such file; download it again") from error
        except SafetensorError as error:
            raise InputError(
                f"{file}: not a whole safetensors file ({error}); download it again"
            ) from error
        for name in handle.keys():  # noqa: SIM118: not a dict
            view = handle.get_slice(name)
            if view.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                raise InputError(
                    f"{file}: tensor {name} is {view.get_dtype()}; quantised weights "
                    "are read from GGUF files only"
                )
            tensors[name] = _Tensor(str(file), tuple(view.get_shape()), view.__getitem__)
    return tensors


def _safetensors_files(folder: epath.Path) -> list[epath.Path]:
    if not folder.exists():
        raise InputError(f"{folder}: no such folder")
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if index.exists():
        try:
            files = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index}: not an index of weights ({error!r})") from error
        return [folder / name for name in sorted(files)]
    if pickles := [*folder.glob("*.bin"), *folder.glob("*.pt*")]:
        raise InputError(
            f"{folder}: holds pickled weights ({pickles[0].name}), which can run code "
            "and are refused. If you trust them, convert them once: `transformers."
            "AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)`"
        )
    raise InputError(
        f"{folder}: holds neither model.safetensors nor model.safetensors.index.json"
    )


def _open_gguf(file: epath.Path) -> dict[str, _Tensor]:
    reader = open_gguf(file)
    config = _config_from_gguf(reader, file)
    tensors = {}
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            continue  # Part of the config.
        name = _gguf_to_hf_name(tensor.name)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        order = None
        if config.family == "llama" and ".q_proj." in name:
            order = _rope_order(shape[0], config.num_heads)
        if config.family == "llama" and ".k_proj." in name:
            order = _rope_order(shape[0], config.num_kv_heads)
        read = functools.partial(_read_gguf, file, tensor, order)
        tensors[name] = _Tensor(str(file), shape, read)
    return tensors


def _gguf_to_hf_name(name: str) -> str:
    match name.split("."):
        case ["blk", layer, part, kind] if part in _GGUF_TENSORS:
            return f"model.layers.{layer}.{_GGUF_TENSORS[part]}.{kind}"
        case [part, kind] if part in _GGUF_TENSORS:
            return f"{_GGUF_TENSORS[part]}.{kind}"
    return name


def _rope_order(rows: int, heads: int) -> np.ndarray:
    """Where each row went: llama.cpp interleaves the two halves that RoPE rotates."""
    pairs = np.arange(rows).reshape(heads, -1, 2)
    return pairs.swapaxes(1, 2).reshape(-1)


def _read_gguf(
    file: epath.Path,
    tensor: gguf.ReaderTensor,
    order: np.ndarray | None,
    index: Index,
) -> np.ndarray:
    """Dequantises only the rows, and within them only the blocks, that are wanted."""
    rows = index[0] if order is None else order[index[0]]
    data = tensor.data
    if len(index) == 1:
        wanted, columns = data[rows], slice(None)
    else:
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        start, stop, _ = index[1].indices(int(tensor.shape[0]))
        first, last = start // block_size, -(-stop // block_size)
        # One item is one element of a float type, one byte of a quantised type.
        items = block_bytes // data.dtype.itemsize
        wanted = data[rows, first * items : last * items]
        columns = slice(start - first * block_size, stop - first * block_size)
    try:
        values = gguf.quants.dequantize(
            np.ascontiguousarray(wanted), tensor.tensor_type
        )
    except NotImplementedError as error:
        raise InputError(
            f"{file}: tensor {tensor.name} is quantised as "
            f"{tensor.tensor_type.name}, which cannot be read; use another file"
        ) from error
    return values[..., columns]


def _config_from_hf(file: epath.Path) -> ModelConfig:
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file}: not JSON ({error})") from error
    require = functools.partial(_require, raw, file)
    family = require("model_type")
    if family not in _ARCHITECTURES:
        raise _unsupported(file, "model_type", family, ", ".join(_ARCHITECTURES))
    for key, supported in _FIXED.items():
        if raw.get(key, supported) != supported:
            raise _unsupported(file, key, raw[key], supported)
    num_heads = require("num_attention_heads")
    hidden_size = require("hidden_size")
    # Transformers 5 gathers everything about RoPE under a new name.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    return ModelConfig(
        family=family,
        vocab_size=require("vocab_size"),
        hidden_size=hidden_size,
        mlp_size=require("intermediate_size"),
        num_layers=require("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=raw.get("num_key_value_heads") or num_heads,
        head_size=raw.get("head_dim") or hidden_size // num_heads,
        max_positions=require("max_position_embeddings"),
        rope_theta=rope.get("rope_theta") or raw.get("rope_theta", 10000.0),
        rope_scaling=_rope_scaling_from_hf(rope, file),
        sliding_window=_sliding_window_from_hf(raw, file),
        norm_epsilon=raw.get("rms_norm_eps", 1e-6),
        qkv_bias=family == "qwen2",
        tie_embeddings=raw.get("tie_word_embeddings", False),
    )


def _rope_scaling_from_hf(
    rope: dict[str, Any], file: epath.Path
) -> Llama3RopeScaling | LinearRopeScaling | None:
    require = functools.partial(_require, rope, file)
    kind = rope.get("rope_type") or rope.get("type", "default")
    match kind:
        case "default":
            return None
        case "linear":
            return LinearRopeScaling(require("factor"))
        case "llama3":
            return Llama3RopeScaling(
                factor=require("factor"),
                low_freq_factor=require("low_freq_factor"),
                high_freq_factor=require("high_freq_factor"),
                original_max_positions=require("original_max_position_embeddings"),
            )
    raise _unsupported(file, "rope_type", kind, "default, linear, llama3")


def _sliding_window_from_hf(raw: dict[str, Any], file: epath.Path) -> int | None:
    match raw["model_type"]:
        case "mistral":
            return raw.get("sliding_window", 4096)
        case "qwen2" if raw.get("use_sliding_window", False):
            # Layers from `max_window_layers` on have the window; ours are all alike.
            full_layers = raw.get("max_window_layers", 28)
            if full_layers >= raw["num_hidden_layers"]:
                return None
            if full_layers > 0:
                raise _unsupported(
                    file,
                    "max_window_layers",
                    full_layers,
                    "0, num_hidden_layers, or use_sliding_window false",
                )
            return raw.get("sliding_window", 4096)
    return None


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
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        # Transformers 5 reads this older spelling of RoPE's settings too.
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_scaling,
        "sliding_window": config.sliding_window,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
    }
    if config.family == "qwen2":
        raw["use_sliding_window"] = config.sliding_window is not None
        raw["max_window_layers"] = 0
    if tokenizer is not None:
        raw["bos_token_id"] = tokenizer.bos_id
        raw["eos_token_id"] = tokenizer.eos_id
    return raw


def _config_from_gguf(reader: gguf.GGUFReader, file: epath.Path) -> ModelConfig:
    fields = {name: field.contents() for name, field in _scalars(reader).items()}
    family = fields.get("general.architecture")
    if family not in ("llama", "qwen2"):
        raise _unsupported(file, "general.architecture", family, "llama, qwen2")
    optional = {
        name.removeprefix(f"{family}."): value for name, value in fields.items()
    }
    require = functools.partial(_require, optional, file)
    if optional.get("expert_count"):
        raise _unsupported(file, "expert_count", optional["expert_count"], 0)
    shapes = {t.name: tuple(map(int, reversed(t.shape))) for t in reader.tensors}
    if "token_embd.weight" not in shapes:
        raise InputError(f"{file}: tensor token_embd.weight is missing")
    hidden_size = require("embedding_length")
    num_heads = require("attention.head_count")
    head_size = optional.get("attention.key_length", hidden_size // num_heads)
    rotated = optional.get("rope.dimension_count", head_size)
    if rotated != head_size:
        raise _unsupported(file, "rope.dimension_count", rotated, head_size)
    config = ModelConfig(
        family=family,
        vocab_size=shapes["token_embd.weight"][0],
        hidden_size=hidden_size,
        mlp_size=require("feed_forward_length"),
        num_layers=require("block_count"),
        num_heads=num_heads,
        num_kv_heads=optional.get("attention.head_count_kv", num_heads),
        head_size=head_size,
        max_positions=require("context_length"),
        rope_theta=optional.get("rope.freq_base", 10000.0),
        # Written as float32; the shortest decimal is what the model's authors wrote.
        norm_epsilon=float(str(np.float32(require("attention.layer_norm_rms_epsilon")))),
        qkv_bias=family == "qwen2",
        tie_embeddings="output.weight" not in shapes,
    )
    return config
