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
from mixcpt_jax.models.transformer import ModelConfig
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

# In a mixture of experts there is a tensor per layer and expert.
_EXPERT_TENSORS = {
    "layers/router": "model.layers.{}.mlp.gate.weight",
    "layers/gate": "model.layers.{}.mlp.experts.{}.gate_proj.weight",
    "layers/up": "model.layers.{}.mlp.experts.{}.up_proj.weight",
    "layers/down": "model.layers.{}.mlp.experts.{}.down_proj.weight",
}


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


class Setting(NamedTuple):
    """A number in `config.json` that sets a field of `ModelConfig`.

    Attributes:
      key: of the file. An absent number leaves the field at its default.
      field: of `ModelConfig`.
      power: the field is the number to this power.
      is_of_rope: the key lies among RoPE's settings, and must be there.
    """

    key: str
    field: str
    power: float = 1
    is_of_rope: bool = False


# Header and number of layers -> a truth value for each layer.
_OfLayers = Callable[[Header, int], list[bool]]


class Windows(NamedTuple):
    """How a `config.json` says which layers have the sliding window.

    Attributes:
      local: which have it, in files without `layer_types`.
      is_by_layer: whether the files have `layer_types`.
      has_switch: whether no layer has the window unless `use_sliding_window` is true.
    """

    local: _OfLayers
    is_by_layer: bool = True
    has_switch: bool = False


def _every_layer(header: Header, num_layers: int) -> list[bool]:
    return [True] * num_layers


def _from_max_window_layers(header: Header, num_layers: int) -> list[bool]:
    first_local = header.integer("max_window_layers", least=0)
    return [i >= first_local for i in range(num_layers)]


def _all_but_one_in(period: int) -> _OfLayers:
    return lambda header, num_layers: [(i + 1) % period != 0 for i in range(num_layers)]


def _by_pattern(header: Header, num_layers: int) -> list[bool]:
    period = header.integer("sliding_window_pattern")
    return _all_but_one_in(period)(header, num_layers)


class Nope(NamedTuple):
    """How a `config.json` says which layers lack RoPE.

    Attributes:
      layers: which lack it.
      keys: the keys that describe a network, for an export.
    """

    layers: _OfLayers
    keys: Callable[[ModelConfig], dict[str, Any]]


def _smollm3_layers(header: Header, num_layers: int) -> list[bool]:
    period = header.integer("no_rope_layer_interval")
    usual = [int(has_rope) for has_rope in _all_but_one_in(period)(header, num_layers)]
    # The name says the opposite: 1 is a layer with RoPE.
    listed = header.many(
        "no_rope_layers", (0, 1).__contains__, "a list of 0 and 1", usual
    )
    if len(listed) < num_layers:
        raise header.wrong("no_rope_layers", f"a list of {num_layers}")
    return [not has_rope for has_rope in listed[:num_layers]]


def _smollm3_keys(config: ModelConfig) -> dict[str, Any]:
    layers = range(config.num_layers)
    return {"no_rope_layers": [int(i not in config.nope_layers) for i in layers]}


def _granite4_layers(header: Header, num_layers: int) -> list[bool]:
    kinds = ("attention", "full_attention")
    header.many("layer_types", kinds.__contains__, "a list of attention; not Mamba's")
    return [header.text("position_embedding_type", None) != "rope"] * num_layers


def _granite4_keys(config: ModelConfig) -> dict[str, Any]:
    return {
        "layer_types": ["attention"] * config.num_layers,
        "position_embedding_type": None if config.nope_layers else "rope",
    }


class Experts(NamedTuple):
    """The keys of a `config.json` that describe a mixture of experts.

    Attributes:
      usual: the number of experts, if the file leaves it out.
      number: its key; transformers 5 writes the second one.
      per_token, normalize: of the two other fields of `ModelConfig`.
    """

    usual: int
    number: tuple[str, ...] = ("num_experts", "num_local_experts")
    per_token: str = "num_experts_per_tok"
    normalize: str = "norm_topk_prob"


class Family(NamedTuple):
    """How the checkpoints of a family differ from Llama's.

    Attributes:
      architecture: transformers' class, written to `config.json`.
      network: the fields of `ModelConfig` that the files do not state.
      sizes: where keys differ from `SIZES`.
      defaults: the keys that a `config.json` may leave out, and their values then. An
        explicit null is not replaced.
      fixed: the keys that change the network's function, and their only supported value.
      settings: the keys of numbers that Llama does not have.
      windows: None: no layer has a sliding window.
      nope: None: all layers have RoPE.
      experts: None: each layer has one MLP.
      local_theta: the key of RoPE's base in local layers, whose RoPE is not scaled; empty:
        all layers have the same RoPE.
      tensors: where names differ from `TENSORS`.
      fused: the tensors that hold the rows of several of our parameters, in this order.
      norm_offset: added to a norm's tensor to get its scale.
      gguf: GGUF's name of the architecture; empty: not read from GGUF files.
    """

    architecture: str
    network: Mapping[str, Any] = {}
    sizes: Mapping[str, str] = {}
    defaults: Mapping[str, Any] = {}
    fixed: Mapping[str, Any] = {"hidden_act": "silu"}
    settings: tuple[Setting, ...] = ()
    windows: Windows | None = None
    nope: Nope | None = None
    experts: Experts | None = None
    local_theta: str = ""
    tensors: Mapping[str, str] = {}
    fused: Mapping[str, tuple[str, ...]] = {}
    norm_offset: int = 0
    gguf: str = ""


_QWEN_WINDOWS = Windows(_from_max_window_layers, has_switch=True)
_QWEN_DEFAULTS = {"sliding_window": 4096, "max_window_layers": 28}
_POST_NORMS = {
    "layers/post_attention_norm": TENSORS["layers/mlp_norm"],
    "layers/post_mlp_norm": "model.layers.{}.post_feedforward_layernorm.weight",
}
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
    tensors=_POST_NORMS
    | {"layers/mlp_norm": "model.layers.{}.pre_feedforward_layernorm.weight"},
    norm_offset=1,
)
_OLMO = Family(
    architecture="",
    network={
        "qk_norm": True,
        "qk_norm_over_heads": True,
        "pre_norms": False,
        "post_norms": True,
    },
    defaults={"rms_norm_eps": 1e-5},
    tensors=_POST_NORMS,
)
_GRANITE = Family(
    architecture="",
    defaults={"attention_multiplier": 1.0},
    settings=(
        Setting("attention_multiplier", "query_scale", power=-2),
        Setting("embedding_multiplier", "embedding_multiplier"),
        Setting("residual_multiplier", "residual_multiplier"),
        Setting("logits_scaling", "logits_scaling"),
    ),
)
_GATE_AND_UP = "layers/gate", "layers/up"

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
            # The models of 4B to 27B leave these out.
            "vocab_size": 262_208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131_072,
        },
        fixed=_GEMMA.fixed | {"attn_logit_softcapping": None},
        windows=Windows(_by_pattern),
        local_theta="rope_local_base_freq",
        gguf="gemma3",
    ),
    "ministral": Family(
        "MinistralForCausalLM",
        defaults={"sliding_window": 4096},
        windows=Windows(_every_layer),
    ),
    "ministral3": Family(
        "Ministral3ForCausalLM",
        defaults={"rms_norm_eps": 1e-5, "head_dim": 128},
        settings=(Setting("llama_4_scaling_beta", "query_growth", is_of_rope=True),),
        windows=Windows(_every_layer, is_by_layer=False),
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        defaults={
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
        },
        windows=Windows(_smollm3_layers, has_switch=True),
        nope=Nope(_smollm3_layers, _smollm3_keys),
    ),
    "olmo2": _OLMO._replace(architecture="Olmo2ForCausalLM"),
    "olmo3": _OLMO._replace(
        architecture="Olmo3ForCausalLM",
        defaults=_OLMO.defaults | {"rope_theta": 5e5, "sliding_window": 4096},
        windows=Windows(_all_but_one_in(4)),
        local_theta="rope_theta",
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        settings=(Setting("partial_rotary_factor", "rope_fraction"),),
        windows=Windows(_every_layer, is_by_layer=False),
        fused={
            "model.layers.{}.self_attn.qkv_proj.weight": (
                "layers/query",
                "layers/key",
                "layers/value",
            ),
            "model.layers.{}.mlp.gate_up_proj.weight": _GATE_AND_UP,
        },
    ),
    # All layers of its models have experts, so one scan runs over them.
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        network={"qk_norm": True},
        sizes={"mlp_size": "moe_intermediate_size"},
        defaults={
            "sliding_window": 4096,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
        },
        fixed={"hidden_act": "silu", "decoder_sparse_step": 1, "mlp_only_layers": []},
        windows=Windows(_every_layer, is_by_layer=False, has_switch=True),
        experts=Experts(128),
        tensors=_EXPERT_TENSORS,
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        network={"qk_norm": True, "qk_norm_over_heads": True},
        defaults={"rms_norm_eps": 1e-5, "num_experts_per_tok": 8},
        settings=(Setting("clip_qkv", "qkv_clip"),),
        experts=Experts(64),
        tensors=_EXPERT_TENSORS,
    ),
    "granite": _GRANITE._replace(architecture="GraniteForCausalLM"),
    # Granite 4: its dense models are hybrids without Mamba layers and experts.
    "granitemoehybrid": _GRANITE._replace(
        architecture="GraniteMoeHybridForCausalLM",
        sizes={"mlp_size": "shared_intermediate_size"},
        defaults=_GRANITE.defaults | {"num_local_experts": 8},
        fixed=_GRANITE.fixed | {"num_local_experts": 0},
        nope=Nope(_granite4_layers, _granite4_keys),
        tensors={"layers/down": "model.layers.{}.shared_mlp.output_linear.weight"},
        fused={"model.layers.{}.shared_mlp.input_linear.weight": _GATE_AND_UP},
    ),
}

# Known model types whose networks are not implemented -> what is missing.
_ONE_SHAPE = "its layers with full attention have wider heads than the others"
MISSING = dict.fromkeys(
    ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), _ONE_SHAPE
) | {
    "gpt_oss": "it has attention sinks, biases and a clamped activation in experts, and "
    "MXFP4 weights",
}

# Models that read images too -> the `model_type` of their text model, if they leave it out.
WRAPPERS = {"gemma3": "gemma3_text", "mistral3": "mistral"}

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


def num_stacked(key: str, family: str) -> int:
    """The number of leading dimensions of a parameter that index Hugging Face tensors.

    They are the layers, and the experts of a layer.
    """
    return _name(key, family).count("{}")


def is_transposed(key: str) -> bool:
    # Also true for norms and biases: transposing a vector does nothing.
    return key != "embedding"


def norm_offset(name: str, family: str) -> int:
    """The number to add to a norm's Hugging Face tensor to get its scale.

    `name` is the tensor's or that of our parameter.
    """
    is_norm = name.removesuffix(".weight").endswith("norm")
    return FAMILIES[family].norm_offset if is_norm else 0


def tensor_names(key: str, shape: tuple[int, ...], family: str) -> np.ndarray:
    """The Hugging Face tensors of one of our parameters, in its stacked dimensions."""
    name, stacked = _name(key, family), shape[: num_stacked(key, family)]
    names = [name.format(*index) for index in np.ndindex(stacked)]
    return np.array(names).reshape(stacked)


def _name(key: str, family: str) -> str:
    return {**TENSORS, **FAMILIES[family].tensors}[key]


def name_of(broken: finite.Broken, family: str) -> str:
    """The Hugging Face tensor that is broken."""
    return _name(broken.key, family).format(broken.layer, broken.expert)


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
