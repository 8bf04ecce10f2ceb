"""Small models of every family, as transformers makes them, with random weights.

`MODELS` has a model per code path of the checkpoint reader; together they cover all model
types of `families.FAMILIES`. Only `make` needs torch and transformers.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Model(NamedTuple):
    """A kind of model, and the settings in which it differs from `SHARED`."""

    model_type: str
    settings: Mapping[str, Any] = {}


SHARED = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
}
_GEMMA3 = {
    "num_hidden_layers": 7,
    "sliding_window": 8,
    "query_pre_attn_scalar": 16,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
_MINISTRAL3 = {
    "tie_word_embeddings": True,
    "rope_parameters": YARN
    | {
        "original_max_position_embeddings": 16,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}
_OLMO3 = {"num_hidden_layers": 5, "sliding_window": 8}
_GRANITE = {
    "attention_multiplier": 0.125,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 0.5,
}
_GRANITE_4 = _GRANITE | {
    "num_local_experts": 0,
    "shared_intermediate_size": 96,
    "layer_types": ["attention"] * 3,
}
_IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

MODELS = {
    "Llama 2": Model("llama", {"num_key_value_heads": 4}),
    "Llama 3": Model(
        "llama",
        {"rope_parameters": _LLAMA3_ROPE, "head_dim": 32, "tie_word_embeddings": True},
    ),
    "Llama, linear RoPE": Model(
        "llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}
    ),
    "Llama, dynamic RoPE": Model(
        "llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}
    ),
    "Mistral": Model("mistral", {"sliding_window": 8}),
    "Mistral, no window": Model("mistral", {"sliding_window": None}),
    "Ministral": Model("ministral", {"sliding_window": 8}),
    "Ministral 3": Model("ministral3", _MINISTRAL3),
    "Mistral 3, with images": Model(
        "mistral3",
        {
            "text_config": SHARED | _MINISTRAL3 | {"model_type": "ministral3"},
            "vision_config": _IMAGES | {"model_type": "pixtral", "head_dim": 8},
        },
    ),
    "Qwen2": Model("qwen2"),
    "Qwen2, window": Model(
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen3": Model("qwen3", {"head_dim": 32}),
    "Qwen3, YaRN": Model("qwen3", {"rope_parameters": YARN}),
    "Gemma 2": Model(
        "gemma2",
        {
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 9.0,
        },
    ),
    "Gemma 3": Model("gemma3_text", _GEMMA3),
    "Gemma 3, with images": Model(
        "gemma3",
        {
            "text_config": SHARED | _GEMMA3,
            "vision_config": _IMAGES,
            "mm_tokens_per_image": 4,
        },
    ),
    "SmolLM3": Model("smollm3", {"num_hidden_layers": 4}),
    "SmolLM3, YaRN and window": Model(
        "smollm3",
        {
            "rope_parameters": YARN,
            "use_sliding_window": True,
            "sliding_window": 8,
            "no_rope_layers": [1, 0, 1],
        },
    ),
    "OLMo 2": Model("olmo2"),
    "OLMo 3": Model("olmo3", _OLMO3),
    "OLMo 3, YaRN": Model(
        "olmo3",
        _OLMO3
        | {
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ),
    "Phi-3": Model("phi3", {"sliding_window": 8}),
    "Phi-4-mini": Model(
        "phi3",
        {
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                "long_factor": [2.0] * 6,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "Qwen3-MoE": Model(
        "qwen3_moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 96,
            "norm_topk_prob": True,
        },
    ),
    "OLMoE": Model(
        "olmoe",
        {"num_experts": 6, "num_experts_per_tok": 2, "clip_qkv": 0.75},
    ),
    "Granite 3": Model("granite", _GRANITE),
    "Granite 4": Model(
        "granitemoehybrid",
        _GRANITE_4 | {"position_embedding_type": "rope"},
    ),
    "Granite 4, no RoPE": Model("granitemoehybrid", _GRANITE_4),
}


def config_of(transformers: Any, model: Model, **settings: Any) -> Any:
    """The config of a model, of the module `transformers`; settings as for `make`."""
    has_images = "text_config" in model.settings
    settings = (
        model.settings if has_images else {**SHARED, **model.settings, **settings}
    )
    return transformers.AutoConfig.for_model(model.model_type, **settings)


def make(model: Model, **settings: Any) -> Any:
    """A model of transformers, in float32.

    Its weights are large enough for each of them to show in the logits.

    Args:
      model: of `MODELS`.
      settings: replace those of a model without images.
    """
    import torch
    import transformers

    auto = transformers.AutoModelForCausalLM
    if "text_config" in model.settings:
        auto = transformers.AutoModelForImageTextToText
    config = config_of(transformers, model, **settings)
    theirs = auto.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    is_gemma = model.model_type.startswith("gemma")
    with torch.no_grad():
        for name, param in theirs.named_parameters():
            noise = 0.2 * torch.randn(param.shape, generator=generator)
            # Coarse enough for float32 to add Gemma's 1 exactly.
            noise = torch.round(noise * 2**12) / 2**12
            param.copy_(noise + ("norm" in name and not is_gemma))
    return theirs
