"""The model families: one table of how their checkpoints differ from Llama's.

Both checkpoint formats read it. A family that needs no new part in `transformer` is a row
of `FAMILIES`: its fixed settings, what its `config.json` leaves out, the keys that only it
has, and the names of its tensors. GGUF names are first translated to Hugging Face's.

Hugging Face stores projections as [out, in] and one tensor per layer; ours are
[in, out] and stacked over layers on the first axis. Gemma's norms multiply by 1 + the
stored value; ours multiply by the stored value, as in llama.cpp.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from mixcpt_jax.core.errors import InputError
from mixcpt_jax.models.headers import Header
from mixcpt_jax.runtime import finite

# Llama's names of our parameters.
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


class Setting(NamedTuple):
    """A number in `config.json` that sets a field of `ModelConfig`.

    Attributes:
      key: of the file. An absent number leaves the field at its default.
      field: of `ModelConfig`.
    """

    key: str
    field: str


class Windows(NamedTuple):
    """How a `config.json` says which layers have the sliding window.

    Attributes:
      local: `(header, num_layers) -> [is_local]`, for files without `layer_types`.
      is_by_layer: whether the files have `layer_types`.
      has_switch: whether no layer has the window unless `use_sliding_window` is true.
    """

    local: Callable[[Header, int], list[bool]]
    is_by_layer: bool = True
    has_switch: bool = False


def _every_layer(header: Header, num_layers: int) -> list[bool]:
    return [True] * num_layers


def _from_max_window_layers(header: Header, num_layers: int) -> list[bool]:
    first_local = header.integer("max_window_layers", least=0)
    return [i >= first_local for i in range(num_layers)]


def _all_but_one_in(period: int) -> Callable[[Header, int], list[bool]]:
    return lambda header, num_layers: [(i + 1) % period != 0 for i in range(num_layers)]


def _by_pattern(header: Header, num_layers: int) -> list[bool]:
    period = header.integer("sliding_window_pattern")
    return _all_but_one_in(period)(header, num_layers)


class Family(NamedTuple):
    """How the checkpoints of a family differ from Llama's.

    Attributes:
      architecture: transformers' class, written to `config.json`.
      network: the fields of `ModelConfig` that the files do not state.
      defaults: the keys that a `config.json` may leave out, and their values then. An
        explicit null is not replaced.
      fixed: the keys that change the network's function, and their only supported value.
      settings: the keys of numbers that Llama does not have.
      windows: None: no layer has a sliding window.
      local_theta: the key of RoPE's base in local layers, whose RoPE is not scaled; empty:
        all layers have the same RoPE.
      tensors: where names differ from `TENSORS`.
      norm_offset: added to a norm's tensor to get its scale.
      gguf: GGUF's name of the architecture; empty: not read from GGUF files.
    """

    architecture: str
    network: Mapping[str, Any] = {}
    defaults: Mapping[str, Any] = {}
    fixed: Mapping[str, Any] = {"hidden_act": "silu"}
    settings: tuple[Setting, ...] = ()
    windows: Windows | None = None
    local_theta: str = ""
    tensors: Mapping[str, str] = {}
    norm_offset: int = 0
    gguf: str = ""


_QWEN_WINDOWS = Windows(_from_max_window_layers, has_switch=True)
_QWEN_DEFAULTS = {"sliding_window": 4096, "max_window_layers": 28}
_GEMMA = Family(
    architecture="",
    network={"post_norms": True, "activation": "gelu_tanh", "scale_embeddings": True},
    defaults={
        "head_dim": 256,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
    },
    fixed={"hidden_activation": "gelu_pytorch_tanh"},
    settings=(
        Setting("query_pre_attn_scalar", "query_scale"),
        Setting("final_logit_softcapping", "final_soft_cap"),
    ),
    tensors={
        "layers/post_attention_norm": TENSORS["layers/mlp_norm"],
        "layers/mlp_norm": "model.layers.{}.pre_feedforward_layernorm.weight",
        "layers/post_mlp_norm": "model.layers.{}.post_feedforward_layernorm.weight",
    },
    norm_offset=1,
)

# By `model_type`.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", gguf="llama"),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={"sliding_window": 4096},
        windows=Windows(_every_layer, is_by_layer=False),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        network={"qkv_bias": True},
        defaults=_QWEN_DEFAULTS,
        windows=_QWEN_WINDOWS,
        gguf="qwen2",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        network={"qk_norm": True},
        defaults=_QWEN_DEFAULTS | {"head_dim": 128},
        windows=_QWEN_WINDOWS,
        gguf="qwen3",
    ),
    "gemma2": _GEMMA._replace(
        architecture="Gemma2ForCausalLM",
        defaults=_GEMMA.defaults
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        settings=(
            *_GEMMA.settings,
            Setting("attn_logit_softcapping", "attention_soft_cap"),
        ),
        windows=Windows(_all_but_one_in(2)),
        gguf="gemma2",
    ),
    "gemma3_text": _GEMMA._replace(
        architecture="Gemma3ForCausalLM",
        network=_GEMMA.network | {"qk_norm": True},
        defaults=_GEMMA.defaults
        | {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window_pattern": 6,
        },
        fixed=_GEMMA.fixed | {"attn_logit_softcapping": None},
        windows=Windows(_by_pattern),
        local_theta="rope_local_base_freq",
        gguf="gemma3",
    ),
}

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
    return FAMILIES[family].norm_offset if name.endswith("norm.weight") else 0


def tensor_names(key: str, shape: tuple[int, ...], family: str) -> list[str]:
    """The Hugging Face tensors of one of our parameters."""
    name = {**TENSORS, **FAMILIES[family].tensors}[key]
    return [name.format(i) for i in range(shape[0])] if is_stacked(key) else [name]


def name_of(broken: finite.Broken, family: str) -> str:
    """The Hugging Face tensor that is broken."""
    layer = broken.layer or 0
    return tensor_names(broken.key, (layer + 1,), family)[layer]


# The sizes that all formats state -> their keys in `config.json`.
SIZES = {
    "hidden_size": "hidden_size",
    "mlp_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "max_positions": "max_position_embeddings",
}


def read_sizes(header: Header, keys: Mapping[str, str]) -> dict[str, int]:
    """The sizes of a network, checked.

    Args:
      header: of a checkpoint.
      keys: as `SIZES`.
    """
    sizes = {
        name: header.integer(keys[name])
        for name in ("hidden_size", "mlp_size", "num_heads", "max_positions")
    }
    sizes["num_layers"] = header.integer(keys["num_layers"], most=MOST_LAYERS)
    num_heads, kv_heads = sizes["num_heads"], keys["num_kv_heads"]
    sizes["num_kv_heads"] = header.integer(kv_heads, num_heads)
    if num_heads % sizes["num_kv_heads"]:
        raise header.wrong(kv_heads, f"a divisor of {keys['num_heads']}, {num_heads}")
    head_size = header.integer(keys["head_size"], sizes["hidden_size"] // num_heads)
    if head_size < 2 or head_size % 2:
        raise InputError(
            f"{header.file}: heads have size {head_size}; RoPE takes an even one, "
            f"see {header.prefix}{keys['num_heads']}"
        )
    return sizes | {"head_size": head_size}
