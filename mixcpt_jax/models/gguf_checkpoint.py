"""GGUF files: reads the architecture from the header, and dequantizes tensors in parts."""

import dataclasses
import functools
from typing import Any

import gguf
import numpy as np
from etils import epath

from mixcpt_jax.core.errors import InputError
from mixcpt_jax.models import families
from mixcpt_jax.models.families import FAMILIES, Index, Tensor
from mixcpt_jax.models.gguf_file import gguf_header, open_gguf
from mixcpt_jax.models.headers import Header
from mixcpt_jax.models.transformer import (
    LinearRopeScaling,
    Llama3RopeScaling,
    ModelConfig,
    rope_frequencies,
)

_TENSORS_OF_GGUF = {
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

# GGUF's name of an architecture -> the family.
_FAMILIES = {family.gguf: name for name, family in FAMILIES.items() if family.gguf}

_SIZES = {
    "hidden_size": "embedding_length",
    "mlp_size": "feed_forward_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "head_size": "attention.key_length",
    "max_positions": "context_length",
}

# GGUF keys that can change the network's function, with the values that leave it unchanged;
# in llama.cpp, 0 means none.
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


def open_tensors(file: epath.Path) -> dict[str, Tensor]:
    """Opens a file's tensors by their Hugging Face names; reads only the header."""
    reader = open_gguf(file)
    config = read_config(reader, file)
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
        tensors[name] = Tensor(str(file), tensor.name, shape, read)
    return tensors


def _gguf_to_hf_name(name: str, family: str) -> str:
    names = dict(_TENSORS_OF_GGUF)
    if FAMILIES[family].network.get("post_norms"):
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
    """Dequantizes only the rows of `index`, and only the blocks needed in each.

    RoPE rotates the two halves of each head into each other, and llama.cpp stores them
    interleaved; this restores Hugging Face's row order.
    """
    *rows, columns = index  # A vector has no rows.
    if interleaved_heads is not None:
        order = np.arange(len(tensor.data)).reshape(interleaved_heads, -1, 2)
        rows = [order.swapaxes(1, 2).reshape(-1)[rows[0]]]
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    start, stop, _ = columns.indices(int(tensor.shape[0]))
    first, last = start // block_size, -(-stop // block_size)
    # Items are elements for float types and bytes for quantized types.
    items = block_bytes // tensor.data.dtype.itemsize
    blocks = tensor.data[(*rows, slice(first * items, last * items))]
    try:
        values = gguf.dequantize(np.ascontiguousarray(blocks), tensor.tensor_type)
    except NotImplementedError as error:
        raise InputError(
            f"{file}: tensor {tensor.name} is quantized as "
            f"{tensor.tensor_type.name}, which is not supported; use another file"
        ) from error
    offset = first * block_size
    return values[..., start - offset : stop - offset]


def read_config(reader: gguf.GGUFReader, file: epath.Path) -> ModelConfig:
    """The architecture in a GGUF header.

    Raises:
      InputError: the header is damaged, or the network is not supported.
    """
    general = gguf_header(reader, file)
    general.require("general.architecture", tuple(_FAMILIES))
    name = general.text("general.architecture")
    family, header = _FAMILIES[name], general.within(f"{name}.")
    read = {setting.key for setting in FAMILIES[family].settings}
    for key in _NEUTRAL.keys() - read:
        if header.get(key) not in (None, *_NEUTRAL[key]):
            values = " or ".join(map(str, _NEUTRAL[key]))
            raise header.unsupported(key, f"{values}, which changes nothing")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise InputError(f"{file}: tensor token_embd.weight is missing")
    vocab_size = int(tensors["token_embd.weight"].shape[-1])
    if header.integer("vocab_size", vocab_size) != vocab_size:
        raise header.wrong("vocab_size", f"the embedding's {vocab_size}")
    sizes = families.read_sizes(header, _SIZES)
    for key in ("attention.value_length", "rope.dimension_count"):
        if header.integer(key, sizes["head_size"]) != sizes["head_size"]:
            raise header.unsupported(key, sizes["head_size"])
    theta = FAMILIES[family].defaults.get("rope_theta", 1e4)
    epsilon = header.number("attention.layer_norm_rms_epsilon", most=1)
    config = ModelConfig(
        family=family,
        vocab_size=vocab_size,
        **sizes,
        rope_theta=header.number("rope.freq_base", theta, least=1),
        # Stored as float32; its shortest decimal form is the authors' number.
        norm_epsilon=float(str(np.float32(epsilon))),
        tie_embeddings="output.weight" not in tensors,
        **FAMILIES[family].network,
        **_gemma(name, header, sizes),
    )
    frequencies = tensors.get("rope_freqs.weight")
    scaling = _rope_scaling(header, config, frequencies)
    return dataclasses.replace(config, rope_scaling=scaling)


def _rope_scaling(
    header: Header, config: ModelConfig, frequencies: gguf.ReaderTensor | None
) -> Llama3RopeScaling | LinearRopeScaling | None:
    # As in llama.cpp: older files store the factor under another key, and a factor without
    # a type is linear.
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


def _gemma(name: str, header: Header, sizes: dict[str, int]) -> dict[str, Any]:
    """Gemma's settings; some are constants in llama.cpp and not in the file."""
    if name not in ("gemma2", "gemma3"):
        return {}
    num_layers = sizes["num_layers"]
    default_period = 2 if name == "gemma2" else 6
    period = header.integer("attention.sliding_window_pattern", default_period)
    settings = {
        "sliding_window": header.integer("attention.sliding_window", 4096),
        "global_layers": tuple(range(period - 1, num_layers, period)),
    }
    if num_layers == {"gemma2": 46, "gemma3": 62}[name]:
        # The 27B models scale queries by hidden size / heads, which is not their head size.
        scale = sizes["hidden_size"] // sizes["num_heads"]
        settings["query_scale"] = None if scale == sizes["head_size"] else scale
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
    """Recovers the settings from the divisors that llama.cpp stores instead."""
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
