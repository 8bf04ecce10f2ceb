"""The decoder of the Llama and Qwen2 families, and the only file that imports flax.

NNX describes the network; the rest of the package sees a `graphdef` and plain nested
dicts of arrays, so teacher and student are two such dicts under one graphdef. The
forward pass ends at the last hidden states: the loss applies the unembedding, because
it never needs all logits at once.

Shape suffixes:
  B batch rows         L row length        T = B * L tokens
  D hidden size        F MLP size          V vocabulary
  H query heads        G key-value heads   K head size
  N layers
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from mixcpt_jax.attention import attend
from mixcpt_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's stretching of RoPE's long wavelengths (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class LinearRopeScaling:
    """Positions divided by `factor` (`rope_type: linear`)."""

    factor: float


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that determines the function a checkpoint computes.

    Attributes:
      family: "llama", "mistral" or "qwen2": the `model_type` written on export.
      max_positions: the longest context the weights were trained for, in tokens.
      sliding_window: how many tokens back attention reaches, or None for all.
      qkv_bias: biases on the query, key and value projections (Qwen2).
    """

    family: str
    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_positions: int
    rope_theta: float
    rope_scaling: Llama3RopeScaling | LinearRopeScaling | None = None
    sliding_window: int | None = None
    norm_epsilon: float = 1e-5
    qkv_bias: bool = False
    tie_embeddings: bool = False


REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def rope_frequencies(config: ModelConfig) -> jax.Array:
    """Angular frequency of each of the K/2 rotated pairs, radians per position."""
    half = jnp.arange(0, config.head_size, 2, dtype=jnp.float32) / config.head_size
    frequencies = config.rope_theta**-half
    match config.rope_scaling:
        case None:
            return frequencies
        case LinearRopeScaling(factor):
            return frequencies / factor
        case Llama3RopeScaling(factor, low, high, original):
            # Short wavelengths stay, long ones are stretched by `factor`, those
            # between are interpolated (Llama 3.1 model card's reference code).
            wavelengths = 2 * math.pi / frequencies
            smooth = jnp.clip((original / wavelengths - low) / (high - low), 0, 1)
            return frequencies * (smooth + (1 - smooth) / factor)


def rotate(x_BxLxHxK: jax.Array, angles_BxLxK2: jax.Array) -> jax.Array:
    """Applies RoPE with the halves convention: pair i is (x[i], x[i + K/2])."""
    cos = jnp.cos(angles_BxLxK2)[:, :, None, :]
    sin = jnp.sin(angles_BxLxK2)[:, :, None, :]
    a, b = jnp.split(x_BxLxHxK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.astype(x_BxLxHxK.dtype)


def rms_norm(x: jax.Array, scale_D: jax.Array, epsilon: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + epsilon)
    scale = scale_D.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    return normed.astype(x.dtype) * scale


class Layer(nnx.Module):
    """Pre-norm attention and SwiGLU, each with a residual connection."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        d, f = config.hidden_size, config.mlp_size
        heads = config.num_heads * config.head_size
        kv_heads = config.num_kv_heads * config.head_size
        # Residual branches start small so that depth does not blow up the stream.
        branch_std = 0.02 / math.sqrt(2 * config.num_layers)

        def kernel(rows: int, columns: int, std: float = 0.02) -> nnx.Param:
            return nnx.Param(std * jax.random.normal(rngs.params(), (rows, columns)))

        self.attention_norm = nnx.Param(jnp.ones(d))
        self.query = kernel(d, heads)
        self.key = kernel(d, kv_heads)
        self.value = kernel(d, kv_heads)
        self.output = kernel(heads, d, branch_std)
        if config.qkv_bias:
            self.query_bias = nnx.Param(jnp.zeros(heads))
            self.key_bias = nnx.Param(jnp.zeros(kv_heads))
            self.value_bias = nnx.Param(jnp.zeros(kv_heads))
        self.mlp_norm = nnx.Param(jnp.ones(d))
        self.gate = kernel(d, f)
        self.up = kernel(d, f)
        self.down = kernel(f, d, branch_std)

    def __call__(self, x_BxLxD, angles_BxLxK2, segment_ids_BxL):
        x = x_BxLxD + self._attend(x_BxLxD, angles_BxLxK2, segment_ids_BxL)
        x = constrain(x, "batch", "length", "activation")
        x = x + self._mlp(x)
        return constrain(x, "batch", "length", "activation")

    def _attend(self, x_BxLxD, angles_BxLxK2, segment_ids_BxL):
        config = self.config
        batch, length, hidden = x_BxLxD.shape
        x_TxD = self._flat_norm(x_BxLxD, self.attention_norm)
        bias = config.qkv_bias

        def project(kernel, bias_param, heads, axis):
            y = x_TxD @ kernel[...].astype(self.dtype)
            if bias_param is not None:
                y = y + bias_param[...].astype(self.dtype)[None]
            y = y.reshape(batch, length, heads, config.head_size)
            return constrain(y, "batch", "length", axis, None)

        query = project(
            self.query, self.query_bias if bias else None, config.num_heads, "heads"
        )
        key = project(
            self.key, self.key_bias if bias else None, config.num_kv_heads, "kv_heads"
        )
        value = project(
            self.value,
            self.value_bias if bias else None,
            config.num_kv_heads,
            "kv_heads",
        )
        mixed_BxLxHxK = attend(
            rotate(query, angles_BxLxK2),
            rotate(key, angles_BxLxK2),
            value,
            segment_ids_BxL,
            config.sliding_window,
        )
        out_TxD = mixed_BxLxHxK.reshape(batch * length, -1) @ self.output[...].astype(
            self.dtype
        )
        return out_TxD.reshape(batch, length, hidden)

    def _mlp(self, x_BxLxD):
        x_TxD = self._flat_norm(x_BxLxD, self.mlp_norm)
        gate_TxF = jax.nn.silu(x_TxD @ self.gate[...].astype(self.dtype))
        up_TxF = x_TxD @ self.up[...].astype(self.dtype)
        down_TxD = (gate_TxF * up_TxF) @ self.down[...].astype(self.dtype)
        return down_TxD.reshape(x_BxLxD.shape)

    def _flat_norm(self, x_BxLxD, scale):
        """Norm, then one row per token: XLA on CPU runs 2-D products 1.5-3x faster."""
        normed = rms_norm(x_BxLxD, scale[...], self.config.norm_epsilon)
        return normed.reshape(-1, x_BxLxD.shape[-1])


class Decoder(nnx.Module):
    """Token ids to last hidden states; parameters of all layers are stacked."""

    def __init__(
        self, config: ModelConfig, dtype: jnp.dtype, remat: str, *, rngs: nnx.Rngs
    ):
        self.config, self.dtype, self.remat = config, dtype, remat
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stack(rngs):
            return Layer(config, dtype, rngs=rngs)

        self.layers = stack(rngs)
        self.final_norm = nnx.Param(jnp.ones(config.hidden_size))
        if not config.tie_embeddings:
            self.unembedding = nnx.Param(
                0.02 * jax.random.normal(rngs.params(), shape[::-1])
            )

    def __call__(self, tokens_BxL, positions_BxL, segment_ids_BxL):
        x_BxLxD = self.embedding[...].astype(self.dtype)[tokens_BxL]
        x_BxLxD = constrain(x_BxLxD, "batch", "length", "activation")
        frequencies_K2 = rope_frequencies(self.config)
        angles = positions_BxL[:, :, None] * frequencies_K2[None, None, :]
        layer_graphdef, layer_params = nnx.split(self.layers)

        def layer(x, params):
            # Without the barrier XLA casts the parameters of all layers at once, ahead
            # of the loop, and keeps the copies.
            params = jax.lax.optimization_barrier(params)
            return nnx.merge(layer_graphdef, params)(x, angles, segment_ids_BxL), None

        policy = REMAT_POLICIES[self.remat]
        if policy is not None:
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        x_BxLxD, _ = jax.lax.scan(layer, x_BxLxD, layer_params)
        return rms_norm(x_BxLxD, self.final_norm[...], self.config.norm_epsilon)


Params = dict
Forward = Callable[[Params, jax.Array, jax.Array, jax.Array], jax.Array]


def make_forward(
    config: ModelConfig, dtype=jnp.float32, remat: str = "none"
) -> Forward:
    """The network as a pure function of its parameters.

    Args:
      config: the architecture.
      dtype: what activations and products are computed in. Parameters are cast to it
        where they are used; norms, RoPE and softmax are float32 inside.
      remat: what the backward pass recomputes: "none", "dots" (all but the matrix
        products) or "full" (each layer from its input).

    Returns:
      `forward(params, tokens_BxL, positions_BxL, segment_ids_BxL) -> hidden_BxLxD`.
      Tokens attend within their own segment only.
    """
    graphdef = nnx.graphdef(_abstract_decoder(config, dtype, remat))

    def forward(params, tokens_BxL, positions_BxL, segment_ids_BxL):
        return nnx.merge(graphdef, params)(tokens_BxL, positions_BxL, segment_ids_BxL)

    return forward


def unembedding(params: Params) -> tuple[jax.Array, bool]:
    """The matrix from hidden states to logits as it is stored.

    Returns:
      `[D, V]` and False, or when the embeddings are tied `[V, D]` and True.
    """
    if "unembedding" in params:
        return params["unembedding"], False
    return params["embedding"], True


def logits(params: Params, hidden: jax.Array) -> jax.Array:
    """`[..., D]` to dense `[..., V]`, for few tokens; training never does this."""
    matrix, vocab_first = unembedding(params)
    return hidden @ (matrix.T if vocab_first else matrix).astype(hidden.dtype)


def init_params(config: ModelConfig, key: jax.Array, dtype=jnp.float32) -> Params:
    """Random parameters; jit it with `out_shardings` to have them born sharded."""
    decoder = Decoder(config, dtype, "none", rngs=nnx.Rngs(params=key))
    params = nnx.to_pure_dict(nnx.state(decoder))
    return jax.tree.map(lambda x: x.astype(dtype), params)


def abstract_params(config: ModelConfig, dtype=jnp.float32) -> Params:
    """Shapes and dtypes of the parameters, as `jax.ShapeDtypeStruct`s."""
    state = nnx.to_pure_dict(nnx.state(_abstract_decoder(config, dtype, "none")))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), state)


def param_axes(config: ModelConfig) -> Params:
    """The logical axes of every parameter, in a tree shaped like the parameters."""
    axes = {
        "embedding": ("vocab", "hidden"),
        "layers": {
            "attention_norm": ("layers", None),
            "query": ("layers", "hidden", "heads"),
            "key": ("layers", "hidden", "kv_heads"),
            "value": ("layers", "hidden", "kv_heads"),
            "output": ("layers", "heads", "hidden"),
            "mlp_norm": ("layers", None),
            "gate": ("layers", "hidden", "mlp"),
            "up": ("layers", "hidden", "mlp"),
            "down": ("layers", "mlp", "hidden"),
        },
        "final_norm": (None,),
    }
    if config.qkv_bias:
        axes["layers"] |= {
            "query_bias": ("layers", "heads"),
            "key_bias": ("layers", "kv_heads"),
            "value_bias": ("layers", "kv_heads"),
        }
    if not config.tie_embeddings:
        axes["unembedding"] = ("hidden", "vocab")
    return axes


def _abstract_decoder(config: ModelConfig, dtype, remat: str) -> Decoder:
    return nnx.eval_shape(
        lambda: Decoder(config, jnp.dtype(dtype), remat, rngs=nnx.Rngs(0))
    )
