"""The objectives of `losses`, streamed from hidden states; no `[T, V]` array exists.

Logits of teacher and student live one chunk of tokens at a time. Because the swap of
LSSD touches two entries of the teacher's distribution,

    KL(p~ || q) = KL(p || q) + (p_a - p_y) (s_a - s_y)
    d/ds        = q - p + (p_a - p_y) (e_a - e_y),

loss and gradient of a chunk need a few reductions over the vocabulary and four picked
entries. The loss is a weighted sum over tokens, so its gradient is formed in the forward
pass, while the chunk's logits are at hand; the backward pass only scales it. Four
matrix products per chunk, `8 T D V` FLOPs, and nothing computed twice.

Over a mesh the sweep is a `shard_map`. Tokens are split over some mesh axes; the
vocabulary may be split over others, and then maxima, sums and picked entries cross
shards as a few scalars per token.

Shape suffixes: T tokens, C tokens of a chunk, D student hidden size, E teacher hidden
size, V vocabulary (inside the sweep: this shard's slice of it).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mixcpt_jax.sharding import BATCH_AXES, FSDP, RULES

# Stands for -inf in masked columns: far below any logit, yet finite, so that
# 0 * (masked - masked) is 0.
_MASKED = -1e30


class TokenWeights(NamedTuple):
    """What each token's objectives count for, `[T]` float32 each.

    MFT's target `(1 - m) p + m e_y` is `kd = 1 - m`, `ntp = m`, up to a constant.
    """

    ntp: jax.Array  # next-token prediction
    lssd: jax.Array  # logit swap self-distillation
    kd: jax.Array  # plain distillation, KL(teacher || student)


class TokenStatistics(NamedTuple):
    """What the sweep saw at each token, unweighted, `[T]` float32, no gradient.

    Without a teacher only `ntp` and `correct` mean anything; the rest are zeros.
    """

    ntp: jax.Array  # cross-entropy with the gold token, nats
    lssd: jax.Array  # nats
    kd: jax.Array  # KL(teacher || student), nats
    correct: jax.Array  # 1 where no logit of the student is above the gold one
    agree: jax.Array  # 1 where none is above that of the teacher's top token
    swapped: jax.Array  # 1 where the teacher's top token is not gold


class Layout(NamedTuple):
    """How the head lies over the mesh: which axes split tokens, which the vocabulary."""

    token_axes: tuple[str, ...] = ()
    vocab_axes: tuple[str, ...] = ()


class _Options(NamedTuple):
    chunk_size: int
    vocab_size: int
    soft_cap: float | None
    layout: Layout


def head_loss(
    hidden_TxD: jax.Array,
    unembedding_DxV: jax.Array,
    teacher_hidden_TxE: jax.Array | None,
    teacher_unembedding_ExV: jax.Array | None,
    targets_T: jax.Array,
    weights: TokenWeights,
    *,
    chunk_size: int | None = None,
    vocab_size: int | None = None,
    soft_cap: float | None = None,
    vocab_parallel: bool = False,
) -> tuple[jax.Array, TokenStatistics]:
    """Weighted sum of all objectives over all tokens, in one sweep.

    Differentiable for `hidden_TxD` and `unembedding_DxV`. Called without
    differentiation it does the two products of the logits only, so evaluation uses it
    too. Under `jax.set_mesh` the sweep is sharded by the rules of `sharding`.

    Args:
      hidden_TxD: last hidden states; their dtype is that of the products, which
        accumulate in float32, as do all reductions.
      unembedding_DxV: any float dtype; its gradient is accumulated in float32.
      teacher_hidden_TxE: the teacher's, or None when no objective needs a teacher.
      teacher_unembedding_ExV: the same vocabulary; the width may differ.
      targets_T: gold token ids.
      weights: per token and objective. A weight of 0 removes a token from the value
        and the gradient exactly.
      chunk_size: tokens whose logits exist at a time, per shard; chosen from the
        device when None.
      vocab_size: columns from here on are padding and get no probability.
      soft_cap: logits become `soft_cap * tanh(logits / soft_cap)` (Gemma 2).
      vocab_parallel: splits the vocabulary over `fsdp` as well as `tensor` and
        gathers hidden states, instead of splitting tokens over `fsdp` and gathering
        the unembedding.

    Returns:
      The weighted sum, a float32 scalar, and the statistics of every token.

    Raises:
      ValueError: the two vocabularies differ.
    """
    num_columns = unembedding_DxV.shape[1]
    if teacher_unembedding_ExV is not None:
        if teacher_unembedding_ExV.shape[1] != num_columns:
            raise ValueError(
                f"teacher and student must share one vocabulary: the unembeddings have "
                f"{teacher_unembedding_ExV.shape[1]} and {num_columns} columns"
            )
        teacher_hidden_TxE = jax.lax.stop_gradient(teacher_hidden_TxE)
        teacher_unembedding_ExV = jax.lax.stop_gradient(teacher_unembedding_ExV)
    layout = _layout(vocab_parallel)
    options = _Options(
        chunk_size or default_chunk_size(num_columns),
        vocab_size or num_columns,
        soft_cap,
        layout,
    )
    return _weighted_sum(
        options,
        hidden_TxD,
        unembedding_DxV,
        (teacher_hidden_TxE, teacher_unembedding_ExV, targets_T, weights),
    )


def lssd(
    hidden_TxD: jax.Array,
    unembedding_DxV: jax.Array,
    teacher_hidden_TxE: jax.Array,
    teacher_unembedding_ExV: jax.Array,
    targets_T: jax.Array,
    weights_T: jax.Array,
    **options,
) -> jax.Array:
    """The weighted sum of `losses.lssd` over tokens; options as for `head_loss`."""
    zeros_T = jnp.zeros_like(weights_T)
    value, _ = head_loss(
        hidden_TxD,
        unembedding_DxV,
        teacher_hidden_TxE,
        teacher_unembedding_ExV,
        targets_T,
        TokenWeights(ntp=zeros_T, lssd=weights_T, kd=zeros_T),
        **options,
    )
    return value


def default_chunk_size(num_columns: int) -> int:
    """Tokens per chunk that keep the matrix units busy within modest memory.

    On a TPU small chunks pay for reading and writing the float32 gradient of the
    unembedding once per chunk, so chunks are large.
    """
    if jax.default_backend() == "cpu":
        return 512
    return max(256, min(2048, 2**28 // num_columns // 128 * 128))


def _layout(vocab_parallel: bool) -> Layout:
    if jax.sharding.get_abstract_mesh().empty:
        return Layout()
    vocab_axes = (RULES["vocab"],)
    if not vocab_parallel:
        return Layout(BATCH_AXES, vocab_axes)
    return Layout(tuple(a for a in BATCH_AXES if a != FSDP), (FSDP, *vocab_axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum(options, hidden_TxD, unembedding_DxV, rest):
    value, statistics, _ = _sharded_sweep(
        options, False, hidden_TxD, unembedding_DxV, rest
    )
    return value, statistics


def _weighted_sum_forward(options, hidden_TxD, unembedding_DxV, rest):
    value, statistics, gradients = _sharded_sweep(
        options, True, hidden_TxD, unembedding_DxV, rest
    )
    return (value, statistics), gradients


def _weighted_sum_backward(options, gradients, cotangents):
    value_cotangent, _ = cotangents
    d_hidden_TxD, d_unembedding_DxV = (
        (g * value_cotangent).astype(g.dtype) for g in gradients
    )
    return d_hidden_TxD, d_unembedding_DxV, None


_weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)


def _sharded_sweep(options, with_gradients, hidden_TxD, unembedding_DxV, rest):
    """Runs `_sweep` on each device's tokens and vocabulary slice."""
    sweep = functools.partial(_sweep, options, with_gradients)
    token_axes, vocab_axes = options.layout
    if not token_axes:
        return sweep(hidden_TxD, unembedding_DxV, rest)
    rows, columns = P(token_axes), P(None, vocab_axes)
    teacher = None if rest[0] is None else rows, None if rest[1] is None else columns
    statistics = TokenStatistics(*[rows] * len(TokenStatistics._fields))
    # Each gradient is summed over the axes that split what it was summed from, and
    # scattered over fsdp, where its owner keeps one slice.
    gradients = None
    if with_gradients:
        scattered = P(FSDP, vocab_axes) if FSDP in token_axes else columns
        gradients = (P(BATCH_AXES), scattered)
    return jax.shard_map(
        sweep,
        in_specs=(rows, columns, (*teacher, rows, rows)),
        out_specs=(P(), statistics, gradients),
        check_vma=False,
    )(hidden_TxD, unembedding_DxV, rest)


def _sweep(options, with_gradients, hidden_TxD, unembedding_DxV, rest):
    """One pass over this device's tokens, a chunk at a time."""
    teacher_hidden_TxE, teacher_unembedding_ExV, targets_T, weights = rest
    token_axes, vocab_axes = options.layout
    dtype = hidden_TxD.dtype
    # Vocabulary first, as embeddings are stored: a tied one is used as it lies.
    kernel_VxD = unembedding_DxV.T.astype(dtype)
    teacher_kernel_VxE = None
    if teacher_hidden_TxE is not None:
        teacher_kernel_VxE = teacher_unembedding_ExV.T.astype(teacher_hidden_TxE.dtype)
    columns = _Columns(kernel_VxD.shape[0], options.vocab_size, vocab_axes)

    num_tokens = hidden_TxD.shape[0]
    chunk_size = min(options.chunk_size, num_tokens)
    num_chunks = math.ceil(num_tokens / chunk_size)
    padding = num_chunks * chunk_size - num_tokens

    def in_chunks(x_T):
        x_T = jnp.pad(x_T, [(0, padding)] + [(0, 0)] * (x_T.ndim - 1))
        return x_T.reshape(num_chunks, chunk_size, *x_T.shape[1:])

    def chunk_step(carry, chunk):
        value, d_kernel_VxD = carry
        hidden_CxD, teacher_hidden_CxE, targets_C, weights_C = chunk
        student = _Logits(hidden_CxD, kernel_VxD, columns, options.soft_cap)
        teacher = None
        if teacher_hidden_CxE is not None:
            teacher = _Logits(
                teacher_hidden_CxE, teacher_kernel_VxE, columns, options.soft_cap
            )
        statistics, d_logits_VxC = _objectives(
            student, teacher, columns, targets_C, weights_C
        )
        value += sum(
            jnp.sum(jnp.where(w != 0, w * getattr(statistics, name), 0.0))
            for name, w in weights_C._asdict().items()
        )
        if not with_gradients:
            return (value, d_kernel_VxD), (statistics, None)
        d_logits_VxC = student.through_soft_cap(d_logits_VxC).astype(dtype)
        d_hidden_CxD = _product("vc,vd->cd", d_logits_VxC, kernel_VxD)
        d_kernel_VxD += _product("vc,cd->vd", d_logits_VxC, hidden_CxD)
        return (value, d_kernel_VxD), (statistics, d_hidden_CxD)

    d_kernel_VxD = jnp.zeros(kernel_VxD.shape, jnp.float32) if with_gradients else None
    (value, d_kernel_VxD), (statistics, d_hidden) = jax.lax.scan(
        chunk_step,
        (jnp.zeros((), jnp.float32), d_kernel_VxD),
        jax.tree.map(in_chunks, (hidden_TxD, teacher_hidden_TxE, targets_T, weights)),
    )
    statistics = jax.tree.map(lambda x: x.reshape(-1)[:num_tokens], statistics)
    value = jax.lax.psum(value, token_axes) if token_axes else value
    if not with_gradients:
        return value, statistics, None
    d_hidden_TxD = d_hidden.reshape(-1, hidden_TxD.shape[1])[:num_tokens]
    d_kernel_DxV = d_kernel_VxD.T
    if vocab_axes:
        d_hidden_TxD = _sum_and_scatter(d_hidden_TxD, vocab_axes)
    if token_axes:
        d_kernel_DxV = _sum_and_scatter(d_kernel_DxV, token_axes)
    return (
        value,
        statistics,
        (d_hidden_TxD.astype(dtype), d_kernel_DxV.astype(unembedding_DxV.dtype)),
    )


def _sum_and_scatter(x, axes):
    """Sums over `axes`; over fsdp each device keeps its slice of the first dimension."""
    rest = tuple(axis for axis in axes if axis != FSDP)
    if FSDP in axes:
        x = jax.lax.psum_scatter(x, FSDP, scatter_dimension=0, tiled=True)
    return jax.lax.psum(x, rest) if rest else x


def _product(equation, a, b):
    """A matrix product with float32 accumulation."""

    def multiply(a, b):
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

    def multiply_on_cpu(a, b):
        # XLA's CPU runtime lacks some of the bfloat16 products with a float32 result;
        # products of float32 copies are the same numbers.
        return multiply(a.astype(jnp.float32), b.astype(jnp.float32))

    return jax.lax.platform_dependent(a, b, cpu=multiply_on_cpu, default=multiply)


class _Columns:
    """This device's slice of the vocabulary, and reductions over the whole of it."""

    def __init__(self, num_local: int, vocab_size: int, axes: tuple[str, ...]):
        self.axes = axes
        self.offset = jax.lax.axis_index(axes) * num_local if axes else 0
        self.ids_Vx1 = (self.offset + jnp.arange(num_local))[:, None]
        num_shards = jax.lax.axis_size(axes) if axes else 1
        self.padded = vocab_size < num_local * num_shards
        self.is_real_Vx1 = self.ids_Vx1 < vocab_size

    def sum(self, x_VxC):
        return self._across(jax.lax.psum, jnp.sum(x_VxC, axis=0))

    def max(self, x_VxC):
        return self._across(jax.lax.pmax, jnp.max(x_VxC, axis=0))

    def first(self, is_wanted_VxC):
        """The lowest id for which the condition holds."""
        # As floats, exact up to 2^24: XLA's CPU loops over integers are not vectorised.
        ids_Vx1 = self.ids_Vx1.astype(jnp.float32)
        lowest_C = jnp.min(jnp.where(is_wanted_VxC, ids_Vx1, jnp.inf), axis=0)
        return self._across(jax.lax.pmin, lowest_C).astype(jnp.int32)

    def is_id(self, ids_C):
        return self.ids_Vx1 == ids_C[None]

    def pick(self, x_VxC, ids_C):
        """Each token's entry of one id: its owner has it, all others add zero."""

        def gather(x_VxC, ids_C):
            local_C = ids_C - self.offset
            is_mine_C = (local_C >= 0) & (local_C < x_VxC.shape[0])
            rows_1xC = jnp.where(is_mine_C, local_C, 0)[None]
            picked_C = jnp.take_along_axis(x_VxC, rows_1xC, axis=0)[0]
            return jnp.where(is_mine_C, picked_C, 0.0)

        def compare(x_VxC, ids_C):
            # Fuses with the other reductions, where a gather would stand alone.
            return jnp.sum(jnp.where(self.is_id(ids_C), x_VxC, 0.0), axis=0)

        picked_C = jax.lax.platform_dependent(x_VxC, ids_C, cpu=gather, default=compare)
        return self._across(jax.lax.psum, picked_C)

    def _across(self, collective, x_C):
        return collective(x_C, self.axes) if self.axes else x_C


class _Logits:
    """One side's logits of a chunk, and what softmax needs of them."""

    def __init__(self, hidden_CxD, kernel_VxD, columns, soft_cap):
        logits_VxC = _product("vd,cd->vc", kernel_VxD, hidden_CxD)
        self.soft_cap = soft_cap
        if soft_cap is not None:
            logits_VxC = soft_cap * jnp.tanh(logits_VxC / soft_cap)
        if columns.padded:
            logits_VxC = jnp.where(columns.is_real_Vx1, logits_VxC, _MASKED)
        self.logits_VxC = logits_VxC
        self.top_C = columns.max(logits_VxC)
        sum_C = columns.sum(jnp.exp(logits_VxC - self.top_C[None]))
        self.log_sum_exp_C = self.top_C + jnp.log(sum_C)

    @property
    def probabilities_VxC(self):
        # Computed anew in every loop that reads it, which is cheaper than storing it.
        return jnp.exp(self.logits_VxC - self.log_sum_exp_C[None])

    def through_soft_cap(self, gradient_VxC):
        if self.soft_cap is None:
            return gradient_VxC
        # Clipped for the sake of masked entries, whose gradient is 0.
        tanh_VxC = jnp.clip(self.logits_VxC / self.soft_cap, -1.0, 1.0)
        return gradient_VxC * (1.0 - tanh_VxC**2)


def _objectives(student, teacher, columns, targets_C, weights):
    """Statistics of a chunk, and the weighted sum's gradient for its student logits."""
    s_y = columns.pick(student.logits_VxC, targets_C)
    ntp = student.log_sum_exp_C - s_y
    correct = s_y == student.top_C
    is_gold_VxC = columns.is_id(targets_C)
    q = student.probabilities_VxC
    if teacher is None:
        zero = jnp.zeros_like(ntp)
        statistics = TokenStatistics(ntp, zero, zero, correct, zero, zero)
        d_logits_VxC = weights.ntp[None] * (q - is_gold_VxC)
        return _as_float32(statistics), d_logits_VxC

    p = teacher.probabilities_VxC
    top_id_C = columns.first(teacher.logits_VxC == teacher.top_C[None])
    s_a = columns.pick(student.logits_VxC, top_id_C)
    t_y = columns.pick(teacher.logits_VxC, targets_C)
    p_a = jnp.exp(teacher.top_C - teacher.log_sum_exp_C)
    p_y = jnp.exp(t_y - teacher.log_sum_exp_C)
    swapped = top_id_C != targets_C
    confidence_gap = jnp.where(swapped, p_a - p_y, 0.0)
    kd = (
        columns.sum(p * (teacher.logits_VxC - student.logits_VxC))
        - teacher.log_sum_exp_C
        + student.log_sum_exp_C
    )
    lssd = kd + confidence_gap * (s_a - s_y)

    statistics = TokenStatistics(ntp, lssd, kd, correct, s_a == student.top_C, swapped)
    distilled = weights.kd + weights.lssd
    moved = weights.lssd * confidence_gap
    d_logits_VxC = (
        (distilled + weights.ntp)[None] * q
        - distilled[None] * p
        + jnp.where(columns.is_id(top_id_C), moved[None], 0.0)
        - jnp.where(is_gold_VxC, (moved + weights.ntp)[None], 0.0)
    )
    return _as_float32(statistics), d_logits_VxC


def _as_float32(statistics: TokenStatistics) -> TokenStatistics:
    return jax.tree.map(lambda x: x.astype(jnp.float32), statistics)
