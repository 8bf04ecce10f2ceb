"""Common to all checkpoint formats: tensor names, and the settings a family implies.

One table maps our parameters to Hugging Face tensor names; GGUF names are first translated
to these.

Hugging Face stores projections as [out, in] and one tensor per layer; ours are
[in, out] and stacked over layers on the first axis. Gemma's norms multiply by 1 + the
stored value; ours multiply by the stored value, as in llama.cpp.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from mixcpt_jax.core.errors import InputError
from mixcpt_jax.models.headers import Header
from mixcpt_jax.models.transformer import ModelConfig
from mixcpt_jax.runtime import finite

TENSORS = {
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
GEMMA = ("gemma2", "gemma3_text")
MOST_LAYERS = 10_000
Index = tuple[slice, ...]


class Tensor(NamedTuple):
    """A tensor in a file: its description in the header, and how to read a part of it."""

    file: str
    name: str
    shape: tuple[int, ...]
    read: Callable[[Index], np.ndarray]


def key_of(key_path) -> str:
    """A key such as "layers/query", from a path in our parameters."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def is_stacked(key: str) -> bool:
    return key.startswith("layers/")


def is_transposed(key: str) -> bool:
    # Also true for norms and biases: transposing a vector does nothing.
    return key != "embedding"


def norm_offset(name: str, family: str) -> int:
    """The number to add to a norm's Hugging Face tensor to get its scale."""
    return int(name.endswith("norm.weight") and family in GEMMA)


def tensor_names(key: str, shape: tuple[int, ...], family: str) -> list[str]:
    """The Hugging Face tensors of one of our parameters."""
    name = (TENSORS | (_GEMMA_TENSORS if family in GEMMA else {}))[key]
    return [name.format(i) for i in range(shape[0])] if is_stacked(key) else [name]


def name_of(broken: finite.Broken, family: str) -> str:
    """The Hugging Face tensor that is broken."""
    layer = broken.layer or 0
    return tensor_names(broken.key, (layer + 1,), family)[layer]


def check_heads(config: ModelConfig, header: Header, heads: str, kv_heads: str):
    """Checks the numbers of heads, which a header holds under two keys."""
    if config.num_heads % config.num_kv_heads:
        raise header.wrong(kv_heads, f"a divisor of {heads}, {config.num_heads}")
    if config.head_size < 2 or config.head_size % 2:
        raise InputError(
            f"{header.file}: heads have size {config.head_size}; RoPE takes an even one, "
            f"see {header.prefix}{heads}"
        )


def implied(family: str) -> dict[str, Any]:
    """The settings of a family's network that its files do not state."""
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
