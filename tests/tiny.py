"""The architecture of the tiny models that several tests write to disk."""

from mixcpt_jax.models import transformer

NUM_TOKENS = 512


def architecture(**settings) -> transformer.ModelConfig:
    """A Llama of two layers with the tiny tokenizer's vocabulary, but for `settings`."""
    return transformer.ModelConfig(
        **dict(
            family="llama",
            vocab_size=NUM_TOKENS,
            hidden_size=32,
            mlp_size=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_size=8,
            max_positions=256,
            rope_theta=1e4,
        )
        | settings
    )
