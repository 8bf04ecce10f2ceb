"""The decoder of all model families; the only file that imports flax.

NNX describes the network; the rest of the package sees a `graphdef` and plain nested
dicts of arrays, so teacher and student are two such dicts that share a graphdef. The
forward pass ends at the last hidden states. The loss applies the unembedding itself,
because it never needs all logits at once.

Shape suffixes:
  B batch rows         L row length        T = B * L tokens
  D hidden size        F MLP size          V vocabulary
  H query heads        G key-value heads   K head size
  N layers             S cache slots       R rank of an adapter
  E experts
  P pairs of entries of a head that RoPE rotates
  I, O inputs and outputs of a kernel      HK, GK = H * K, G * K
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mixcpt_jax.models import experts
from mixcpt_jax.models.attention import attend, attend_to_cache
from mixcpt_jax.runtime.sharding import (
    by_columns,
    constrain,
    platform,
    scatter_gradient,
)

if TYPE_CHECKING:
    from mixcpt_jax.models.lora import Lora


@dataclasses.dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's scaling of RoPE's long wavelengths (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class LinearRopeScaling:
    """Positions divided by `factor` (`rope_type: linear`)."""

    factor: float


@dataclasses.dataclass(frozen=True)
class DynamicRopeScaling:
    """A larger RoPE base for positions beyond the context (`rope_type: dynamic`).

    Positions here lie within the context, where nothing changes; only an export needs it.
    """

    factor: float


@dataclasses.dataclass(frozen=True)
class YarnRopeScaling:
    """YaRN (Peng et al., arXiv 2309.00071; `rope_type: yarn`).

    Attributes:
      factor: of the wavelengths that turn less than `beta_slow` times over the original
        context. Those that turn more than `beta_fast` times keep their length.
      original_max_positions: the original context.
      attention_factor: multiplies the rotated queries and keys.
    """

    factor: float
    original_max_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclasses.dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE within the original context (Ding et al., arXiv 2402.13753).

    Longer texts would need other divisors, `long_factor`, for all their tokens. So the
    context ends at `original_max_positions`.

    Attributes:
      short_factor: the divisor of each frequency.
      long_factor, max_positions: only for an export.
      original_max_positions: the original context.
      attention_factor: multiplies the rotated queries and keys.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_positions: int
    max_positions: int
    attention_factor: float


RopeScaling = (
    LinearRopeScaling
    | DynamicRopeScaling
    | YarnRopeScaling
    | LongRopeScaling
    | Llama3RopeScaling
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that determines the function a checkpoint computes.

    Attributes:
      family: a key of `families.FAMILIES`, the `model_type` written on export.
      max_positions: the longest context the weights were trained for, in tokens.
      sliding_window: the number of tokens that attention reaches back, or None for all.
      global_layers: layers that attend to all tokens although there is a window. The others
        are called local.
      local_rope_theta: RoPE base of the local layers, whose RoPE is not scaled; None: the
        same as in the others.
      nope_layers: layers without RoPE (SmolLM3).
      rope_fraction: the fraction of each head that RoPE rotates (Phi).
      query_growth: queries at position `p` are multiplied by
        `1 + query_growth * log(1 + floor(p / rope_scaling.original_max_positions))`
        (Ministral 3).
      qkv_bias: biases on the query, key and value projections (Qwen2).
      qk_norm: queries and keys are normed, head by head, before RoPE (Qwen3, Gemma 3).
      qk_norm_over_heads: that norm is over all heads together (OLMo).
      qkv_clip: the largest magnitude of queries, keys and values, before RoPE (OLMoE).
      num_experts: MLPs of a layer, of `mlp_size` each, of which a router chooses some for
        each token; 0: one MLP for all tokens.
      experts_per_token: how many it chooses.
      normalize_routing: the weights of a token's experts are divided by their sum.
      pre_norms: the inputs of attention and MLP are normed (all but OLMo).
      post_norms: the outputs of attention and MLP are normed before they are added
        (Gemma, OLMo).
      activation: of the MLP's gate, "silu" or "gelu_tanh".
      scale_embeddings: embeddings are multiplied by `sqrt(hidden_size)` (Gemma).
      embedding_multiplier: of the embeddings (Granite).
      residual_multiplier: of the outputs of attention and MLP (Granite).
      logits_scaling: the last hidden states, and so the logits, are divided by it
        (Granite).
      query_scale: scores are divided by its square root; None: `head_size`.
      attention_soft_cap: scores become `cap * tanh(scores / cap)` (Gemma 2).
      final_soft_cap: logits become `cap * tanh(logits / cap)` (Gemma 2).
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
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    global_layers: tuple[int, ...] = ()
    local_rope_theta: float | None = None
    nope_layers: tuple[int, ...] = ()
    rope_fraction: float = 1.0
    query_growth: float | None = None
    norm_epsilon: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    qk_norm_over_heads: bool = False
    qkv_clip: float | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    normalize_routing: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    activation: str = "silu"
    scale_embeddings: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    query_scale: float | None = None
    attention_soft_cap: float | None = None
    final_soft_cap: float | None = None
    tie_embeddings: bool = False

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer in tokens, or None for all."""
        return tuple(
            None if layer in self.global_layers else self.sliding_window
            for layer in range(self.num_layers)
        )

    @property
    def active_mlp_size(self) -> int:
        """The columns of the MLPs that process a token in a layer."""
        return self.mlp_size * (self.experts_per_token or 1)

    @property
    def fingerprint(self) -> str:
        """A hash, 16 hex digits, of all settings that differ from the default."""
        settings = (
            (field.name, getattr(self, field.name), field.default)
            for field in dataclasses.fields(self)
        )
        changed = [(name, value) for name, value, usual in settings if value != usual]
        digest = hashlib.blake2b(repr(changed).encode(), digest_size=8)
        return digest.hexdigest()


def gelu_tanh(x: jax.Array) -> jax.Array:
    """Computed in float32: in bfloat16 its constants would be off by 0.1%."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": gelu_tanh}

REMAT_POLICIES = {
    "none": None,
    # Match by name, not by primitive: an adapter's own products are not worth saving.
    "dots": jax.checkpoint_policies.save_only_these_names("projection"),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def remat_policy(remat: str) -> Callable | None:
    """What the backward pass keeps of a layer; None: everything.

    Only on a TPU does "offload" move anything; elsewhere it is "full".
    """
    is_moved = remat != "offload" or platform() == "tpu"
    return REMAT_POLICIES[remat if is_moved else "full"]


def rope_size(config: ModelConfig) -> int:
    """The number of entries of each head that RoPE rotates, 2 P."""
    return int(config.head_size * config.rope_fraction)


def rope_frequencies(config: ModelConfig) -> jax.Array:
    """Angular frequency of each of the P rotated pairs, radians per position."""
    size, theta = rope_size(config), config.rope_theta
    frequencies = theta ** -(jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    match config.rope_scaling:
        case None | DynamicRopeScaling():
            return frequencies
        case LinearRopeScaling(factor):
            return frequencies / factor
        case LongRopeScaling(short_factor):
            return frequencies / jnp.array(short_factor, jnp.float32)
        case YarnRopeScaling(factor, original, _, fast, slow):
            # The pairs, not rounded, that turn so often over the original context.
            first, last = (
                size
                * math.log(original / (turns * 2 * math.pi))
                / (2 * math.log(theta))
                for turns in (fast, slow)
            )
            first, last = max(math.floor(first), 0), min(math.ceil(last), size - 1)
            ramp = (jnp.arange(size // 2) - first) / max(last - first, 1e-3)
            ramp = jnp.clip(ramp, 0, 1)
            return frequencies * (1 - ramp + ramp / factor)
        case Llama3RopeScaling(factor, low, high, original):
            # Short wavelengths are unchanged, long ones are multiplied by `factor`, and
            # those between are interpolated (reference code of Llama 3.1's model card).
            wavelengths = 2 * math.pi / frequencies
            smooth = jnp.clip((original / wavelengths - low) / (high - low), 0, 1)
            return frequencies * (smooth + (1 - smooth) / factor)


class Rope(NamedTuple):
    """What the positions of tokens do to their queries and keys in a layer.

    Attributes:
      cos_BxLxP, sin_BxLxP: of the angles, times the attention factor.
      growth_BxL: multiplies the queries; None: nothing does.
    """

    cos_BxLxP: jax.Array
    sin_BxLxP: jax.Array
    growth_BxL: jax.Array | None = None


def rope(config: ModelConfig, positions_BxL: jax.Array) -> Rope:
    """RoPE of a layer with full attention."""
    angles_BxLxP = positions_BxL[:, :, None] * rope_frequencies(config)[None, None, :]
    factor = getattr(config.rope_scaling, "attention_factor", 1.0)
    growth_BxL = None
    if config.query_growth is not None:
        contexts_BxL = positions_BxL // config.rope_scaling.original_max_positions
        growth_BxL = 1 + config.query_growth * jnp.log1p(contexts_BxL)
    return Rope(
        factor * jnp.cos(angles_BxLxP), factor * jnp.sin(angles_BxLxP), growth_BxL
    )


def rotate(x_BxLxHxK: jax.Array, rope: Rope) -> jax.Array:
    """Rotates pair i, which is (x[i], x[i + P]), and leaves the rest of a head as it is."""
    cos, sin = rope.cos_BxLxP[:, :, None, :], rope.sin_BxLxP[:, :, None, :]
    size = 2 * cos.shape[-1]
    whole, rest = x_BxLxHxK[..., :size], x_BxLxHxK[..., size:]
    if platform() == "tpu":
        cos, sin = (jnp.concatenate([half, half], axis=-1) for half in (cos, sin))
        rotated = whole.astype(jnp.float32) * cos + _swap_halves(whole) * sin
    else:
        a, b = jnp.split(whole.astype(jnp.float32), 2, axis=-1)
        rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x_BxLxHxK.dtype), rest], axis=-1)


def _swap_halves(x: jax.Array) -> jax.Array:
    """The halves (a, b) of the last axis as (-b, a), in float32.

    A product, which a TPU fuses with what uses it, where a concatenation of halves of its
    128 lanes costs copies. It is exact: each sum has one term, and the factor is 1 or -1.
    """
    half = x.shape[-1] // 2
    swap = np.zeros((2 * half, 2 * half), np.float32)
    places = np.arange(half)
    swap[half + places, places] = -1
    swap[places, half + places] = 1
    return jax.lax.dot_general(
        x,
        jnp.asarray(swap, x.dtype),
        (((x.ndim - 1,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def scaled(x: jax.Array, factor: jax.Array | float) -> jax.Array:
    """The product, rounded once to the dtype of `x`."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def rms_norm(x: jax.Array, scale_D: jax.Array, epsilon: float) -> jax.Array:
    """Computes in float32, returns the dtype of `x`; the scale's gradient is float32."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + epsilon)
    scale = scale_D.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (normed * scale).astype(x.dtype)


Params = dict
Cache = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Forward:
    """A network as a pure function of its parameters, from `make_forward`.

    It holds the soft cap of the logits, because its callers apply the unembedding.

    Attributes:
      hidden: `(params, tokens_BxL, positions_BxL, segment_ids_BxL) -> hidden_BxLxD`;
        calling the object calls it.
      final_soft_cap: logits become `cap * tanh(logits / cap)`; None: no cap.
      with_routing: like `hidden`, but returns `(hidden_BxLxD, experts.Routing)`; None: the
        network has no experts.
    """

    hidden: Callable[[Params, jax.Array, jax.Array, jax.Array], jax.Array]
    final_soft_cap: float | None = None
    with_routing: Callable[..., tuple[jax.Array, experts.Routing]] | None = None

    def __call__(self, params, tokens_BxL, positions_BxL, segment_ids_BxL):
        return self.hidden(params, tokens_BxL, positions_BxL, segment_ids_BxL)


Decode = Callable[[Params, Cache, jax.Array, jax.Array], tuple[jax.Array, Cache]]

_CACHE_AXES = ("batch", "layers", None, "kv_heads")


class Adapter(nnx.Param):
    """A factor of a low-rank update, trained while the kernels are frozen."""


class Layer(nnx.Module):
    """Pre-norm attention and gated MLP, each with a residual connection.

    The caller runs attention between `project_heads` and `finish`: over the row in
    training, over a cache in decoding.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: jnp.dtype,
        lora: "Lora | None",
        *,
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype, self.lora = config, dtype, lora
        d, f = config.hidden_size, config.mlp_size
        heads = config.num_heads * config.head_size
        kv_heads = config.num_kv_heads * config.head_size
        # Residual branches start small so that the residual stream does not grow with
        # depth.
        branch_std = 0.02 / math.sqrt(2 * config.num_layers)

        def kernel(*shape: int, std: float = 0.02) -> nnx.Param:
            return nnx.Param(std * jax.random.normal(rngs.params(), shape))

        if config.pre_norms:
            self.attention_norm = nnx.Param(jnp.ones(d))
            self.mlp_norm = nnx.Param(jnp.ones(d))
        self.query = kernel(d, heads)
        self.key = kernel(d, kv_heads)
        self.value = kernel(d, kv_heads)
        self.output = kernel(heads, d, std=branch_std)
        if config.qkv_bias:
            self.query_bias = nnx.Param(jnp.zeros(heads))
            self.key_bias = nnx.Param(jnp.zeros(kv_heads))
            self.value_bias = nnx.Param(jnp.zeros(kv_heads))
        if config.qk_norm:
            whole, size = config.qk_norm_over_heads, config.head_size
            self.query_norm = nnx.Param(jnp.ones(heads if whole else size))
            self.key_norm = nnx.Param(jnp.ones(kv_heads if whole else size))
        if config.post_norms:
            self.post_attention_norm = nnx.Param(jnp.ones(d))
            self.post_mlp_norm = nnx.Param(jnp.ones(d))
        if config.num_experts:
            self.router = kernel(d, config.num_experts)
        of_each = (config.num_experts,) if config.num_experts else ()
        self.gate = kernel(*of_each, d, f)
        self.up = kernel(*of_each, d, f)
        self.down = kernel(*of_each, f, d, std=branch_std)
        if lora is not None:
            # Only placeholders in the tree; `lora.init_adapters` creates the arrays.
            for name in lora.targets:
                rows, columns = getattr(self, name).shape
                a, b = jnp.zeros((rows, lora.rank)), jnp.zeros((lora.rank, columns))
                setattr(self, f"{name}_lora_a", Adapter(a))
                setattr(self, f"{name}_lora_b", Adapter(b))

    def project_heads(self, x_BxLxD, rope: Rope):
        """Queries `[B, L, H, K]`, keys and values `[B, L, G, K]`, rotated."""
        config = self.config
        x_TxD = self._flat_norm(x_BxLxD, "attention_norm")

        def heads(name, number, axis):
            y_TxHK = self._project(name, x_TxD)
            if hasattr(self, f"{name}_norm"):
                # Of one head or of all, as the norm is.
                scale = getattr(self, f"{name}_norm")[...]
                y_TxHK = y_TxHK.reshape(len(y_TxHK), -1, scale.size)
                y_TxHK = rms_norm(y_TxHK, scale, config.norm_epsilon)
            if config.qkv_clip is not None:
                y_TxHK = jnp.clip(y_TxHK, -config.qkv_clip, config.qkv_clip)
            y_BxLxHxK = y_TxHK.reshape(*x_BxLxD.shape[:2], number, config.head_size)
            return constrain(y_BxLxHxK, "batch", "length", axis, None)

        query = rotate(heads("query", config.num_heads, "heads"), rope)
        key = rotate(heads("key", config.num_kv_heads, "kv_heads"), rope)
        if rope.growth_BxL is not None:
            query = scaled(query, rope.growth_BxL[:, :, None, None])
        return query, key, heads("value", config.num_kv_heads, "kv_heads")

    def finish(self, x_BxLxD, mixed_BxLxHxK):
        """The layer's output and the choices of its router, if it has one.

        Args:
          x_BxLxD: the layer's input.
          mixed_BxLxHxK: the output of attention.
        """
        mixed_TxHK = mixed_BxLxHxK.reshape(-1, self.output.shape[0])
        x = self._add(x_BxLxD, self._project("output", mixed_TxHK), "attention")
        x_TxD = self._flat_norm(x, "mlp_norm")
        y_TxD, choices = (self._experts if self.config.num_experts else self._mlp)(
            x_TxD
        )
        return self._add(x, y_TxD, "mlp"), choices

    def _experts(self, x_TxD):
        config = self.config
        choices = experts.choose(
            x_TxD,
            self.router[...],
            config.experts_per_token,
            config.normalize_routing,
        )
        kernels = experts.Kernels(self.gate[...], self.up[...], self.down[...])
        y_TxD = experts.mix(x_TxD, choices, kernels, ACTIVATIONS[config.activation])
        return y_TxD, choices

    def _mlp(self, x_TxD):
        activation = ACTIVATIONS[self.config.activation]
        gate_TxF = activation(self._project("gate", x_TxD))
        up_TxF = self._project("up", x_TxD)
        return self._project("down", gate_TxF * up_TxF), None

    def _add(self, x_BxLxD, branch_TxD, name):
        """Adds the output of a branch to its input."""
        config = self.config
        if config.post_norms:
            branch_TxD = self._flat_norm(branch_TxD, f"post_{name}_norm")
        if config.residual_multiplier != 1:
            branch_TxD = scaled(branch_TxD, config.residual_multiplier)
        x_BxLxD = x_BxLxD + branch_TxD.reshape(x_BxLxD.shape)
        return constrain(x_BxLxD, "batch", "length", "activation")

    def _project(self, name, x_TxI):
        """The product with a kernel, plus the adapter's product and the bias, if any."""

        def param(suffix=""):
            return getattr(self, name + suffix)[...]

        kernel_axes = param_axes(self.config)["layers"][name][1:]
        kernel_IxO = scatter_gradient(param().astype(self.dtype), kernel_axes)
        y_TxO = x_TxI @ kernel_IxO
        if self.lora is not None and name in self.lora.targets:
            # Never merge the kernel: its gradient would be as large as the kernel.
            narrow_TxR = x_TxI @ param("_lora_a").astype(self.dtype)
            b_RxO = param("_lora_b").astype(jnp.float32) * self.lora.scale
            y_TxO = y_TxO + narrow_TxR @ b_RxO.astype(self.dtype)
        if hasattr(self, f"{name}_bias"):
            # Broadcast over tokens before the cast, so that the gradient, a sum over
            # tokens, is float32.
            bias_TxO = jnp.broadcast_to(param("_bias")[None], y_TxO.shape)
            y_TxO = y_TxO + bias_TxO.astype(self.dtype)
        return checkpoint_name(y_TxO, "projection")

    def _flat_norm(self, x, name):
        """The norm of this name, if the layer has it, then one row per token.

        XLA on CPU runs 2-D products 1.5 to 3 times faster.
        """
        if hasattr(self, name):
            x = rms_norm(x, getattr(self, name)[...], self.config.norm_epsilon)
        return x.reshape(-1, x.shape[-1])


class Kind(NamedTuple):
    """What differs between layers besides their parameters; arrays `[N]` or scalars.

    Attributes:
      is_local: whether it has the window.
      has_rope: whether it has RoPE.
    """

    is_local: jax.Array
    has_rope: jax.Array


class Decoder(nnx.Module):
    """Token ids to last hidden states; parameters of all layers are stacked."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: jnp.dtype,
        remat: str,
        lora: "Lora | None",
        *,
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype, self.remat = config, dtype, remat
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stack(rngs):
            return Layer(config, dtype, lora, rngs=rngs)

        self.layers = stack(rngs)
        self.final_norm = nnx.Param(jnp.ones(config.hidden_size))
        if not config.tie_embeddings:
            self.unembedding = nnx.Param(
                0.02 * jax.random.normal(rngs.params(), shape[::-1])
            )

    def __call__(self, tokens_BxL, positions_BxL, segment_ids_BxL):
        x_BxLxD = self._embed(tokens_BxL)
        rope_of = self._rope(positions_BxL)
        layer_graphdef, *layer_params = nnx.split(self.layers, Adapter, ...)

        def run(x_BxLxD, layer_input):
            x_BxLxD = checkpoint_name(x_BxLxD, "layer_input")
            kind, params = layer_input
            # Without barriers XLA casts the parameters of all layers at once, before the
            # loop, and keeps the copies. Adapters have a separate barrier, because if
            # anything that passes a barrier is differentiated, everything is.
            layer = nnx.merge(
                layer_graphdef, *map(jax.lax.optimization_barrier, params)
            )
            operands = (
                *layer.project_heads(x_BxLxD, rope_of(kind)),
                segment_ids_BxL,
            )
            mixed_BxLxHxK = self._mix(attend, kind, *operands)
            x_BxLxD, choices = layer.finish(x_BxLxD, mixed_BxLxHxK)
            if choices is None:
                return x_BxLxD, None
            return x_BxLxD, experts.survey(choices, segment_ids_BxL.reshape(-1) > 0)

        policy = remat_policy(self.remat)
        if policy is not None:
            run = jax.checkpoint(run, policy=policy, prevent_cse=False)
        x_BxLxD, routing = jax.lax.scan(run, x_BxLxD, (self._kinds(), layer_params))
        return self._last_hidden(x_BxLxD), routing

    def decode(self, cache: Cache, tokens_BxL, positions_BxL):
        """See `make_decode`."""
        x_BxLxD = self._embed(tokens_BxL)
        rope_of = self._rope(positions_BxL)
        layer_graphdef, layer_params = nnx.split(self.layers)

        def run(carry, layer_input):
            x_BxLxD, cache = carry
            index, kind, params = layer_input
            layer = nnx.merge(layer_graphdef, params)
            query, key, value = layer.project_heads(x_BxLxD, rope_of(kind))
            cache = {
                "key": _write(cache["key"], index, positions_BxL, key),
                "value": _write(cache["value"], index, positions_BxL, value),
            }
            seen = cache["key"][:, index], cache["value"][:, index]
            operands = query, *seen, positions_BxL
            mixed_BxLxHxK = self._mix(attend_to_cache, kind, *operands)
            x_BxLxD, _ = layer.finish(x_BxLxD, mixed_BxLxHxK)
            return (x_BxLxD, cache), None

        # The cache is a carry, not scanned over, so it is updated in place.
        indices_N = jnp.arange(self.config.num_layers)
        (x_BxLxD, cache), _ = jax.lax.scan(
            run, (x_BxLxD, cache), (indices_N, self._kinds(), layer_params)
        )
        return self._last_hidden(x_BxLxD), cache

    def _embed(self, tokens_BxL):
        """The first layer's input."""
        # Gather before the cast, so that gradients are summed per token in the dtype of the
        # table.
        x_BxLxD = by_columns(self.embedding[...][tokens_BxL].astype(self.dtype))
        if self.config.scale_embeddings:
            # The factor is rounded, as it was when the models were trained.
            x_BxLxD *= jnp.asarray(math.sqrt(self.config.hidden_size), self.dtype)
        if self.config.embedding_multiplier != 1:
            x_BxLxD = scaled(x_BxLxD, self.config.embedding_multiplier)
        return constrain(x_BxLxD, "batch", "length", "activation")

    def _last_hidden(self, x_BxLxD):
        """The last layer's output, normed and scaled as the unembedding needs it."""
        scale_D = self.final_norm[...].astype(jnp.float32) / self.config.logits_scaling
        return rms_norm(x_BxLxD, scale_D, self.config.norm_epsilon)

    def _kinds(self) -> Kind:
        """The kind of each layer."""
        layers = range(self.config.num_layers)
        return Kind(
            jnp.array([window is not None for window in self.config.windows]),
            jnp.array([layer not in self.config.nope_layers for layer in layers]),
        )

    def _rope(self, positions_BxL) -> Callable[[Kind], Rope]:
        """`kind -> Rope` of such a layer."""
        config = self.config
        everywhere = rope(config, positions_BxL)
        local = everywhere
        if config.local_rope_theta is not None:
            local_config = dataclasses.replace(
                config,
                rope_theta=config.local_rope_theta,
                rope_scaling=None,
                query_growth=None,
            )
            local = rope(local_config, positions_BxL)

        def rope_of(kind):
            cos, sin, growth = everywhere
            if config.local_rope_theta is not None:
                cos = jnp.where(kind.is_local, local.cos_BxLxP, cos)
                sin = jnp.where(kind.is_local, local.sin_BxLxP, sin)
            if config.nope_layers:
                cos = jnp.where(kind.has_rope, cos, 1.0)
                sin = jnp.where(kind.has_rope, sin, 0.0)
            return Rope(cos, sin, growth)

        return rope_of

    def _mix(self, attention, kind, *operands):
        """Applies `attention` to the operands within the layer's window."""
        config = self.config

        def within(window):
            return functools.partial(
                attention,
                sliding_window=window,
                query_scale=config.query_scale,
                soft_cap=config.attention_soft_cap,
            )

        kinds = set(config.windows)
        if len(kinds) == 1:
            return within(kinds.pop())(*operands)
        # One program per kind of layer, because the mask is part of a TPU kernel.
        local, everywhere = within(config.sliding_window), within(None)
        return jax.lax.cond(kind.is_local, local, everywhere, *operands)


def make_forward(
    config: ModelConfig,
    dtype=jnp.float32,
    remat: str = "none",
    lora: "Lora | None" = None,
) -> Forward:
    """The network as a pure function of its parameters.

    Args:
      config: the architecture.
      dtype: of activations and products. Parameters are cast to it where they are used;
        norms, RoPE and softmax are computed in float32.
      remat: what the backward pass recomputes: "none", "dots" (all but the
        projections), "full" (each layer from its input) or "offload" (the same, with
        the inputs in the host's memory; see `remat_policy`).
      lora: the adapters that the parameters hold, see `lora.with_adapters`.

    Returns:
      `forward(params, tokens_BxL, positions_BxL, segment_ids_BxL) -> hidden_BxLxD`.
      Tokens attend within their own segment only.
    """
    graphdef = nnx.graphdef(_abstract_decoder(config, dtype, remat, lora))

    def with_routing(params, tokens_BxL, positions_BxL, segment_ids_BxL):
        return nnx.merge(graphdef, params)(tokens_BxL, positions_BxL, segment_ids_BxL)

    def hidden(*operands):
        return with_routing(*operands)[0]

    return Forward(
        hidden, config.final_soft_cap, with_routing if config.num_experts else None
    )


def make_decode(
    config: ModelConfig, dtype=jnp.float32, lora: "Lora | None" = None
) -> Decode:
    """The network on the next tokens of rows whose earlier tokens are in a cache.

    The slot of a key and value is the position of its token. Each token attends to the
    slots up to its own, within the sliding window; later slots are never read. So prompts
    may be padded on the right: their positions are 0, 1, ..., and the real token of a slot
    overwrites padding before any token reads it.

    Args:
      config: the architecture.
      dtype: as for `make_forward`.
      lora: as for `make_forward`.

    Returns:
      `decode(params, cache, tokens_BxL, positions_BxL) -> (hidden_BxLxD, cache)`. The
      positions of a row differ from each other; the cache is from `init_cache`.
    """
    graphdef = nnx.graphdef(_abstract_decoder(config, dtype, "none", lora))

    def decode(params, cache, tokens_BxL, positions_BxL):
        return nnx.merge(graphdef, params).decode(cache, tokens_BxL, positions_BxL)

    return decode


def init_cache(
    config: ModelConfig, batch: int, length: int, dtype=jnp.float32
) -> Cache:
    """Room for the keys and values of `length` positions, `[B, N, S, G * K]` each.

    Heads share one dimension with the head size: a TPU stores the last two dimensions in
    tiles, which a few heads would leave mostly empty. Call it within `jit`, which shards
    rows and heads like those of activations.
    """
    width = config.num_kv_heads * config.head_size
    zeros = jnp.zeros((batch, config.num_layers, length, width), dtype)
    return {name: constrain(zeros, *_CACHE_AXES) for name in ("key", "value")}


def _write(cache_BxNxSxGK, layer, positions_BxL, new_BxLxGxK) -> jax.Array:
    """Writes the new tokens of one layer to their slots."""
    new_BxLxGK = new_BxLxGxK.reshape(*positions_BxL.shape, -1)

    # Map over rows, so that the compiler keeps rows on their device. Rows come first in the
    # cache, because otherwise this would transpose it.
    @jax.vmap
    def write(cache_NxSxGK, positions_L, new_LxGK):
        return cache_NxSxGK.at[layer, positions_L].set(new_LxGK)

    new_BxLxGK = new_BxLxGK.astype(cache_BxNxSxGK.dtype)
    return constrain(write(cache_BxNxSxGK, positions_BxL, new_BxLxGK), *_CACHE_AXES)


def unembedding(params: Params) -> tuple[jax.Array, bool]:
    """The matrix from hidden states to logits, as stored.

    Returns:
      `[D, V]` and False, or with tied embeddings `[V, D]` and True.
    """
    if "unembedding" in params:
        return params["unembedding"], False
    return params["embedding"], True


def unembedding_alone(params: Params) -> Params:
    """The part of the parameters that `unembedding` reads."""
    name = "unembedding" if "unembedding" in params else "embedding"
    return {name: params[name]}


def logits(
    params: Params, hidden: jax.Array, soft_cap: float | None = None
) -> jax.Array:
    """`[..., D]` to dense `[..., V]`, for few tokens; training never does this.

    The logits are at least float32, whatever the dtype of the hidden states: in bfloat16
    the largest logits would often tie.

    Args:
      params: the network's.
      hidden: last hidden states.
      soft_cap: the config's `final_soft_cap`.
    """
    matrix, vocab_first = unembedding(params)
    uncapped = jnp.matmul(
        hidden,
        (matrix.T if vocab_first else matrix).astype(hidden.dtype),
        preferred_element_type=jnp.promote_types(hidden.dtype, jnp.float32),
    )
    return uncapped if soft_cap is None else soft_cap * jnp.tanh(uncapped / soft_cap)


def init_params(config: ModelConfig, key: jax.Array, dtype=jnp.float32) -> Params:
    """Random parameters; jit it with `out_shardings` to create them sharded.

    Dtypes are as in `cast`.
    """
    decoder = Decoder(config, dtype, "none", None, rngs=nnx.Rngs(params=key))
    return cast(nnx.to_pure_dict(nnx.state(decoder)), dtype)


def abstract_params(config: ModelConfig, dtype=jnp.float32) -> Params:
    """Shapes and dtypes of the parameters, as `jax.ShapeDtypeStruct`s; see `cast`."""
    state = nnx.to_pure_dict(nnx.state(_abstract_decoder(config, jnp.float32, "none")))
    return jax.tree.map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(x.shape, _dtype_of(path, dtype)), state
    )


def cast(params: Params, dtype) -> Params:
    """Casts the matrices among the parameters to a dtype.

    Norm scales, biases and routers are always at least float32. They are small, they are
    used in float32, and in bfloat16 a scale of `1 + w` (Gemma) keeps few digits of `w`.
    """
    return jax.tree.map_with_path(
        lambda path, x: x.astype(_dtype_of(path, dtype)), params
    )


def _dtype_of(path, dtype) -> jnp.dtype:
    """The dtype of the parameter at a path, if matrices have `dtype`."""
    if path[-1].key.endswith(("norm", "bias", "router")):
        return jnp.promote_types(dtype, jnp.float32)
    return jnp.dtype(dtype)


def param_axes(config: ModelConfig) -> Params:
    """The logical axes of every parameter, in a tree shaped like the parameters."""
    axes = {
        "embedding": ("vocab", "hidden"),
        "layers": {
            "query": ("layers", "hidden", "heads"),
            "key": ("layers", "hidden", "kv_heads"),
            "value": ("layers", "hidden", "kv_heads"),
            "output": ("layers", "heads", "hidden"),
            "gate": ("layers", "hidden", "mlp"),
            "up": ("layers", "hidden", "mlp"),
            "down": ("layers", "mlp", "hidden"),
        },
        "final_norm": (None,),
    }
    if config.num_experts:
        wide = ("layers", "experts", "expert_hidden", "mlp")
        axes["layers"] |= {
            "router": ("layers", "hidden", None),
            "gate": wide,
            "up": wide,
            "down": ("layers", "experts", "mlp", "expert_hidden"),
        }
    if config.qkv_bias:
        axes["layers"] |= {
            "query_bias": ("layers", "heads"),
            "key_bias": ("layers", "kv_heads"),
            "value_bias": ("layers", "kv_heads"),
        }
    if config.qk_norm:
        over = ("heads", "kv_heads") if config.qk_norm_over_heads else (None, None)
        axes["layers"] |= {
            "query_norm": ("layers", over[0]),
            "key_norm": ("layers", over[1]),
        }
    if config.pre_norms:
        names = ("attention_norm", "mlp_norm")
        axes["layers"] |= dict.fromkeys(names, ("layers", None))
    if config.post_norms:
        names = ("post_attention_norm", "post_mlp_norm")
        axes["layers"] |= dict.fromkeys(names, ("layers", None))
    if not config.tie_embeddings:
        axes["unembedding"] = ("hidden", "vocab")
    return axes


@functools.cache
def _abstract_decoder(
    config: ModelConfig, dtype, remat: str, lora: "Lora | None" = None
) -> Decoder:
    """The network with shapes instead of arrays; cached, so do not modify it."""
    return nnx.eval_shape(
        lambda: Decoder(config, jnp.dtype(dtype), remat, lora, rngs=nnx.Rngs(0))
    )
