"""The objectives of `dense`, streamed from hidden states; no `[T, V]` array exists.

Logits of teacher and student exist for one chunk of tokens at a time. Because LSSD's swap
changes only two entries of the teacher's distribution,

    KL(p~ || q) = KL(p || q) + (p_a - p_y) (s_a - s_y)
    d/ds        = q - p + (p_a - p_y) (e_a - e_y),

the loss and the gradient of a chunk need a few reductions over the vocabulary and four
picked entries. The loss is a weighted sum over tokens, so the forward pass also computes
its gradient, from the same logits, and the backward pass only scales it. This takes four
matrix products, `8 T D V` FLOPs, and computes nothing twice.

A slice of the vocabulary is reduced to a few scalars per token (`VocabSlice`), and two
slices merge into one. So the vocabulary can be processed in tiles, one after the other, and
in shards, one per device: only per-token scalars cross between devices (`sharded_swap`).
`docs/head.md` derives all of this.

The teacher may also be given as a stored part of its distributions (`CompactTeacher`). Its
logits are then scattered over the vocabulary instead of computed. All tokens that it does
not list form one more outcome, which is added to the merged slice.

Shape suffixes: T tokens, C tokens of a chunk, N chunks of a block, D student hidden
size, E teacher hidden size, V vocabulary (inside the sweep: this shard's slice of it),
M listed tokens of a compact teacher.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mixcpt_jax.core import chips
from mixcpt_jax.objectives import dense
from mixcpt_jax.objectives.sharded_swap import (
    MASKED,
    VocabSlice,
    merge,
    merge_shards,
)
from mixcpt_jax.runtime.sharding import (
    RULES,
    SPLIT_AXES,
    batch_axes,
    constrain,
    device_kind,
    platform,
)

# A product with C tokens reads 2 D V bytes of weights for 2 C D V FLOPs, so it keeps the
# matrix units busy if C is at least the number of FLOPs that a chip can do in the time of
# moving one byte of its memory. The float32 gradient of the unembedding, read and written
# once per block of tokens, needs four times as many tokens.
_FLOPS_PER_BYTE = 256
# Longer chunks need fewer loop steps and collectives, if memory allows them.
_LOGITS_PER_CHUNK, _MAX_CHUNK, _MAX_BLOCK = 2**25, 2048, 4096


class TokenWeights(NamedTuple):
    """The weight of each objective at each token, `[T]` float32 each.

    MFT's target `(1 - m) p + m e_y` corresponds to `kd = 1 - m`, `ntp = m`, up to a
    constant.
    """

    ntp: jax.Array  # next-token prediction
    lssd: jax.Array  # logit swap self-distillation
    kd: jax.Array  # plain distillation, KL(teacher || student)
    selective: jax.Array  # ntp where the teacher is wrong, kd where it is right

    @classmethod
    def of(cls, num_tokens: int, **weights_T: jax.Array) -> "TokenWeights":
        """The given weights; the others are 0."""
        zeros_T = jnp.zeros(num_tokens, jnp.float32)
        return cls(**dict.fromkeys(cls._fields, zeros_T) | weights_T)

    def resolve(self, swapped_T: jax.Array, factor_T: jax.Array) -> "TokenWeights":
        """The same sum without `selective`.

        Args:
          swapped_T: 1 where the teacher is wrong.
          factor_T: of `ntp`, see `dense.token_factor`.
        """
        wrong_T = self.selective * swapped_T
        return TokenWeights(
            self.ntp * factor_T + wrong_T,
            self.lssd,
            self.kd + (self.selective - wrong_T),
            jnp.zeros_like(wrong_T),
        )


class TokenStatistics(NamedTuple):
    """Unweighted statistics of each token, `[T]` float32, without gradient.

    Without a teacher, all except `ntp` and `correct` are zeros.
    """

    ntp: jax.Array  # cross-entropy with the gold token, nats
    lssd: jax.Array  # nats
    kd: jax.Array  # KL(teacher || student), nats
    correct: jax.Array  # 1 where the student's top token (argmax) is gold
    agree: jax.Array  # 1 where student and teacher have the same top token
    swapped: jax.Array  # 1 where the teacher's top token is not gold


class CompactTeacher(NamedTuple):
    """The stored part of a teacher's distribution at each token.

    It lists the K most likely tokens and the gold token. All other tokens, the tail, are
    merged into one outcome. With S the listed tokens,

        kd = sum over S of p log(p / q) + p_tail log(p_tail / q_tail),

    the divergence of distributions over S and the tail. By the data processing
    inequality it is never above KL(p || q) over the whole vocabulary. Its gradient for a
    logit `s_j` is `q_j - p_j` in S and `q_j (1 - p_tail / q_tail)` in the tail, so the
    student keeps its own proportions there.

    Stored values are rounded, so they are scaled to sum to 1, in float32. A token of
    log-probability -inf counts as not listed.

    Attributes:
      ids: `[T, K + 1]` int32, the most likely token first, the gold one last.
      logps: `[T, K + 1]`, any float dtype, nats; -inf in the last place if gold is among
        the first K.
      tail: `[T]` float32, nats, the log-probability of the tail; -inf if it is empty.
    """

    ids: jax.Array
    logps: jax.Array
    tail: jax.Array


class Layout(NamedTuple):
    """The head's mesh layout: the axes that split tokens, and the vocabulary.

    Tokens of an axis in both are gathered over it, a block at a time.
    """

    token_axes: tuple[str, ...] = ()
    vocab_axes: tuple[str, ...] = ()

    @property
    def gathered_axes(self) -> tuple[str, ...]:
        return tuple(axis for axis in self.token_axes if axis in self.vocab_axes)


class _Options(NamedTuple):
    """All static options; chunk sizes count gathered tokens."""

    chunk_size: int
    block_size: int
    vocab_tile: int
    vocab_size: int
    vocab_first: bool
    soft_cap: float | None
    layout: Layout
    token_weighting: str = "none"
    teacher_vocab_first: bool = False


def head_loss(
    hidden_TxD: jax.Array,
    unembedding_DxV: jax.Array,
    teacher_hidden_TxE: jax.Array | None,
    teacher_unembedding_ExV: jax.Array | None,
    targets_T: jax.Array,
    weights: TokenWeights,
    *,
    compact: CompactTeacher | None = None,
    chunk_size: int | None = None,
    block_size: int | None = None,
    vocab_tile: int | None = None,
    vocab_size: int | None = None,
    vocab_first: bool = False,
    teacher_vocab_first: bool | None = None,
    soft_cap: float | None = None,
    vocab_parallel: bool = True,
    token_weighting: str = "none",
) -> tuple[jax.Array, TokenStatistics]:
    """Weighted sum of all objectives over all tokens, in one sweep.

    Differentiable for `hidden_TxD` and `unembedding_DxV`. Without differentiation it
    computes only the two products for the logits, so evaluation uses it too. Under
    `jax.set_mesh` the sweep is sharded by the rules of `sharding`.

    Args:
      hidden_TxD: last hidden states; their dtype is that of the products, which
        accumulate in float32, as do all reductions.
      unembedding_DxV: any float dtype; its gradient is accumulated in float32.
      teacher_hidden_TxE: of the teacher; None if no objective needs a teacher.
      teacher_unembedding_ExV: must have the same vocabulary; the width may differ.
      targets_T: gold token ids.
      weights: per token and objective. A weight of 0 removes a token from the value
        and the gradient exactly.
      compact: replaces the teacher's hidden states and unembedding. Its values are
        final; `soft_cap` then applies only to the student.
      chunk_size: tokens whose logits exist at a time on a device, in float32. None:
        chosen from the device and the vocabulary, like `block_size`.
      block_size: tokens whose logits' gradient is kept, in the dtype of `hidden_TxD`,
        for one pair of products; a multiple of `chunk_size`.
      vocab_tile: columns whose logits are computed and reduced at a time; None: all.
        Without gradients nothing larger than `[vocab_tile, chunk_size]` exists.
      vocab_size: columns from this index on are padding and get no probability, of
        either model.
      vocab_first: the unembedding is `[V, D]`, as tied embeddings are stored; transposing
        it would copy it.
      teacher_vocab_first: the same for the teacher's; None: as the student's.
      soft_cap: both models' logits become `soft_cap * tanh(logits / soft_cap)` (Gemma 2).
      vocab_parallel: splits the vocabulary over `fsdp` and `tensor` and gathers hidden
        states; if False, splits it only over `tensor` and gathers the unembedding.
      token_weighting: the factor on `weights.ntp`, see `dense.token_factor`; every kind
        except "none" needs a teacher.

    Returns:
      The weighted sum, a float32 scalar, and the statistics of every token.

    Raises:
      ValueError: the two vocabularies differ; two teachers are given; the teacher that
        `token_weighting` needs is missing; or `block_size` is not a multiple of
        `chunk_size`.
    """
    if (
        token_weighting != "none"
        and teacher_unembedding_ExV is None
        and compact is None
    ):
        raise ValueError(f"token_weighting: {token_weighting!r} needs a teacher")
    if compact is not None and teacher_unembedding_ExV is not None:
        raise ValueError(
            "a compact teacher replaces the teacher's hidden states and unembedding; "
            "give one or the other"
        )
    num_columns = unembedding_DxV.shape[0 if vocab_first else 1]
    if teacher_vocab_first is None:
        teacher_vocab_first = vocab_first
    if teacher_unembedding_ExV is not None:
        teacher_columns = teacher_unembedding_ExV.shape[0 if teacher_vocab_first else 1]
        if teacher_columns != num_columns:
            raise ValueError(
                f"teacher and student must share one vocabulary: the unembeddings have "
                f"{teacher_columns} and {num_columns} columns"
            )
        teacher_hidden_TxE = jax.lax.stop_gradient(teacher_hidden_TxE)
        teacher_unembedding_ExV = jax.lax.stop_gradient(teacher_unembedding_ExV)
    layout = _layout(vocab_parallel)
    columns_per_shard = math.ceil(num_columns / _axes_size(layout.vocab_axes))
    default_chunk, default_block = default_sizes(columns_per_shard)
    chunk_size = chunk_size or default_chunk
    block_size = block_size or max(1, default_block // chunk_size) * chunk_size
    if block_size % chunk_size:
        raise ValueError(
            f"block_size: {block_size} is not a multiple of chunk_size {chunk_size}"
        )
    options = _Options(
        chunk_size,
        block_size,
        min(vocab_tile or columns_per_shard, columns_per_shard),
        vocab_size or num_columns,
        vocab_first,
        soft_cap,
        layout,
        token_weighting,
        teacher_vocab_first,
    )
    return _weighted_sum(
        options,
        hidden_TxD,
        unembedding_DxV,
        (teacher_hidden_TxE, teacher_unembedding_ExV, compact, targets_T, weights),
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
    """The weighted sum of `dense.lssd` over tokens; options as for `head_loss`."""
    value, _ = head_loss(
        hidden_TxD,
        unembedding_DxV,
        teacher_hidden_TxE,
        teacher_unembedding_ExV,
        targets_T,
        TokenWeights.of(len(weights_T), lssd=weights_T),
        **options,
    )
    return value


def log_probabilities(
    hidden_TxD: jax.Array,
    unembedding_DxV: jax.Array,
    targets_T: jax.Array,
    **options,
) -> jax.Array:
    """Log-probability of each gold token, `[T]` float32 nats; options of `head_loss`.

    For losses that are not a weighted sum over tokens with weights known in advance,
    such as DPO's. Differentiable for `hidden_TxD` and `unembedding_DxV`. The forward pass
    computes no gradient. The backward pass, which knows each token's weight, sweeps again
    with gradients. So it takes `8 T D V` FLOPs, instead of `6 T D V` for a weighted sum
    with known weights.
    """

    def sweep(hidden_TxD, unembedding_DxV, weights_T):
        return head_loss(
            hidden_TxD,
            unembedding_DxV,
            None,
            None,
            targets_T,
            TokenWeights.of(len(weights_T), ntp=weights_T),
            **options,
        )

    @jax.custom_vjp
    def logps(hidden_TxD, unembedding_DxV):
        no_weights_T = jnp.zeros(targets_T.shape, jnp.float32)
        return -sweep(hidden_TxD, unembedding_DxV, no_weights_T)[1].ntp

    def forward(hidden_TxD, unembedding_DxV):
        return logps(hidden_TxD, unembedding_DxV), (hidden_TxD, unembedding_DxV)

    def backward(operands, cotangents_T):
        gradient = jax.grad(lambda *x: sweep(*x, -cotangents_T)[0], (0, 1))
        return gradient(*operands)

    logps.defvjp(forward, backward)
    return logps(hidden_TxD, unembedding_DxV)


def compact_teacher(
    hidden_TxE: jax.Array,
    unembedding_ExV: jax.Array,
    targets_T: jax.Array,
    top_k: int,
    *,
    vocab_first: bool = False,
    vocab_size: int | None = None,
    soft_cap: float | None = None,
    chunk_size: int | None = None,
) -> CompactTeacher:
    """Computes the part of a teacher's distributions that `head_loss` can use later.

    Args:
      hidden_TxE: its last hidden states; their dtype is that of the products.
      unembedding_ExV: any float dtype.
      targets_T: gold token ids, listed beside the most likely tokens.
      top_k: how many of the most likely tokens to list; among equals, the lowest id first.
      vocab_first, vocab_size, soft_cap: as for `head_loss`.
      chunk_size: tokens whose logits exist at a time, on all devices together.

    Returns:
      Float32 log-probabilities, for the caller to round.

    Raises:
      ValueError: `top_k` is not in [1, vocabulary size].
    """
    num_columns = unembedding_ExV.shape[0 if vocab_first else 1]
    vocab_size = vocab_size or num_columns
    if not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k: {top_k} is not in [1, {vocab_size}]")
    if chunk_size is None:
        num_devices = _axes_size(_layout(vocab_parallel=False).token_axes)
        chunk_size = default_sizes(num_columns)[0] * num_devices
    num_tokens = len(targets_T)
    chunk_size = min(chunk_size, num_tokens)
    num_chunks = math.ceil(num_tokens / chunk_size)
    # Gather over fsdp once here, not in every chunk.
    axes = ("vocab", "activation") if vocab_first else ("activation", "vocab")
    kernel = constrain(unembedding_ExV.astype(hidden_TxE.dtype), *axes)
    sizes = (chunk_size, chunk_size, num_columns, vocab_size)
    columns = _Columns(kernel, _Options(*sizes, vocab_first, soft_cap, Layout()))

    def of_chunk(chunk):
        hidden_CxE, targets_C = chunk
        logits_VxC = columns.logits(kernel, hidden_CxE, 0, vocab_first)[:vocab_size]
        logps_VxC = jax.nn.log_softmax(logits_VxC, axis=0)
        _, top_CxK = jax.lax.top_k(logits_VxC.T, top_k)
        ids_MxC = jnp.concatenate([top_CxK.T, targets_C[None]])
        logps_MxC = jnp.take_along_axis(logps_VxC, ids_MxC, axis=0)
        is_repeated_C = jnp.any(ids_MxC[:-1] == targets_C[None], axis=0)
        gold_C = jnp.where(is_repeated_C, -jnp.inf, logps_MxC[-1])
        others_VxC = jnp.put_along_axis(
            logps_VxC, ids_MxC, -jnp.inf, axis=0, inplace=False
        )
        return CompactTeacher(
            ids_MxC.T,
            logps_MxC.at[-1].set(gold_C).T,
            jax.nn.logsumexp(others_VxC, axis=0),
        )

    # Take every N-th token, so that each device of a mesh has its share of every chunk.
    def in_chunks(x_T):
        padding = num_chunks * chunk_size - num_tokens
        x_T = jnp.pad(x_T, [(0, padding)] + [(0, 0)] * (x_T.ndim - 1))
        return x_T.reshape(chunk_size, num_chunks, *x_T.shape[1:]).swapaxes(0, 1)

    def by_token(x_NxC):
        return x_NxC.swapaxes(0, 1).reshape(-1, *x_NxC.shape[2:])[:num_tokens]

    chunks = jax.tree.map(in_chunks, (hidden_TxE, targets_T.astype(jnp.int32)))
    return jax.tree.map(by_token, jax.lax.map(of_chunk, chunks))


def default_sizes(num_columns: int) -> tuple[int, int]:
    """Tokens per chunk and per block for a device with `num_columns` of the vocabulary.

    Chunks are the shortest that keep the matrix units of the device busy, because their
    logits dominate the head's memory; they are longer for a small vocabulary.
    """
    kind = device_kind()
    if kind == "cpu":
        return 128, 128
    busy = math.ceil((chips.flops_per_byte(kind) or _FLOPS_PER_BYTE) / 256) * 256
    chunk_size = max(
        busy, min(_MAX_CHUNK, _LOGITS_PER_CHUNK // num_columns // 256 * 256)
    )
    return chunk_size, max(4 * busy, min(_MAX_BLOCK, 4 * chunk_size))


def _layout(vocab_parallel: bool) -> Layout:
    if jax.sharding.get_abstract_mesh().empty:
        return Layout()
    vocab_axes = (*SPLIT_AXES, RULES["vocab"]) if vocab_parallel else (RULES["vocab"],)
    # An axis of size 1 needs no communication.
    return Layout(batch_axes(), tuple(a for a in vocab_axes if _axes_size((a,)) > 1))


def _axes_size(axes: tuple[str, ...]) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum(options, hidden_TxD, unembedding_DxV, rest):
    value, statistics, _ = _sweep_shards(
        options, False, hidden_TxD, unembedding_DxV, rest
    )
    return value, statistics


def _weighted_sum_forward(options, hidden_TxD, unembedding_DxV, rest):
    value, statistics, gradients = _sweep_shards(
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


def _sweep_shards(options, with_gradients, hidden_TxD, unembedding_DxV, rest):
    """Runs `_sweep_shard` on each device's tokens and columns of the vocabulary."""
    teacher_hidden_TxE, teacher_kernel, compact, targets_T, weights = rest
    # Cast before gathering: bfloat16 halves the bytes.
    kernel = unembedding_DxV.astype(hidden_TxD.dtype)
    if teacher_kernel is not None:
        teacher_kernel = teacher_kernel.astype(teacher_hidden_TxE.dtype)
    sweep = functools.partial(_sweep_shard, options, with_gradients)
    token_axes, vocab_axes = options.layout
    by_token = (hidden_TxD, teacher_hidden_TxE, compact, targets_T, weights)
    if not token_axes:
        value, statistics, gradients = sweep(by_token, kernel, teacher_kernel)
    else:
        num_tokens, hidden_size = hidden_TxD.shape
        vocab_dimension = _vocab_dimension(options.vocab_first)
        num_columns = kernel.shape[vocab_dimension]

        def pad(x, dimension, axes):
            missing = -x.shape[dimension] % _axes_size(axes)
            widths = [(0, missing if d == dimension else 0) for d in range(x.ndim)]
            return jnp.pad(x, widths) if missing else x

        by_token = jax.tree.map(lambda x: pad(x, 0, token_axes), by_token)
        kernels, specs = [], []
        for x, vocab_first in (
            (kernel, options.vocab_first),
            (teacher_kernel, options.teacher_vocab_first),
        ):
            dimension = _vocab_dimension(vocab_first)
            kernels.append(None if x is None else pad(x, dimension, vocab_axes))
            specs.append(P(vocab_axes) if vocab_first else P(None, vocab_axes))
        rows, columns = P(token_axes), specs[0]
        gradients = None
        if with_gradients:
            # Sum over the axes that split the tokens. Over fsdp, unless it splits the
            # vocabulary, each device keeps one slice of the sum.
            scattered = columns
            if _scatters(options, hidden_size):
                scattered = (
                    P(vocab_axes, SPLIT_AXES)
                    if options.vocab_first
                    else P(SPLIT_AXES, vocab_axes)
                )
            gradients = (rows, scattered)
        value, statistics, gradients = jax.shard_map(
            sweep,
            in_specs=(rows, *specs),
            out_specs=(P(), rows, gradients),
            check_vma=False,
        )(by_token, *kernels)
        statistics = jax.tree.map(lambda x_T: x_T[:num_tokens], statistics)
        if with_gradients:
            gradients = (
                gradients[0][:num_tokens],
                jax.lax.slice_in_dim(
                    gradients[1], 0, num_columns, axis=vocab_dimension
                ),
            )
    if with_gradients:
        d_hidden_TxD, d_kernel = gradients
        gradients = (d_hidden_TxD, d_kernel.astype(unembedding_DxV.dtype))
    return value, statistics, gradients


def _vocab_dimension(vocab_first: bool) -> int:
    return 0 if vocab_first else 1


def _scatters(options: _Options, hidden_size: int) -> bool:
    """Whether the unembedding's gradient is scattered over fsdp."""
    token_axes, vocab_axes = options.layout
    if not token_axes or set(SPLIT_AXES) & set(vocab_axes):
        return False
    shards = _axes_size(SPLIT_AXES)
    return shards > 1 and hidden_size % shards == 0


def _sweep_shard(options, with_gradients, by_token, kernel, teacher_kernel):
    """One pass over this device's tokens, a block of chunks at a time."""
    hidden_TxD, _, compact, *_ = by_token
    num_tokens, hidden_size = hidden_TxD.shape
    dtype = hidden_TxD.dtype
    layout = options.layout
    gathered_axes = layout.gathered_axes
    num_blocks, num_chunks, chunk_size = _split(
        num_tokens, options, _axes_size(gathered_axes)
    )
    padding = num_blocks * num_chunks * chunk_size - num_tokens
    columns = _Columns(kernel, options, has_tail=compact is not None)
    kernel_axes = "vd" if options.vocab_first else "dv"

    def in_blocks(x_T):
        x_T = jnp.pad(x_T, [(0, padding)] + [(0, 0)] * (x_T.ndim - 1))
        return x_T.reshape(num_blocks, num_chunks, chunk_size, *x_T.shape[1:])

    def gather(x_NxC):
        if not gathered_axes:
            return x_NxC
        return jax.lax.all_gather(x_NxC, gathered_axes, axis=1, tiled=True)

    def own(x_NxC):
        if not gathered_axes:
            return x_NxC
        start = jax.lax.axis_index(gathered_axes) * chunk_size
        return jax.lax.dynamic_slice_in_dim(x_NxC, start, chunk_size, axis=1)

    def block_step(carry, block):
        value, d_kernel = carry
        block = jax.tree.map(gather, block)

        def chunk_step(value, chunk):
            chunk_value, statistics, d_logits_VxC = _chunk(
                options, with_gradients, columns, kernel, teacher_kernel, *chunk
            )
            return value + chunk_value, (statistics, d_logits_VxC)

        value, (statistics, d_logits_NxVxC) = jax.lax.scan(chunk_step, value, block)
        statistics = jax.tree.map(own, statistics)
        if not with_gradients:
            return (value, None), (statistics, None)
        d_hidden_NxCxD = _product(f"nvc,{kernel_axes}->ncd", d_logits_NxVxC, kernel)
        d_hidden_NxCxD = _sum(
            d_hidden_NxCxD, layout.vocab_axes, scattered_over=gathered_axes, dimension=1
        )
        d_kernel += _product(f"nvc,ncd->{kernel_axes}", d_logits_NxVxC, block[0])
        return (value, d_kernel), (statistics, d_hidden_NxCxD.astype(dtype))

    d_kernel = jnp.zeros(kernel.shape, jnp.float32) if with_gradients else None
    (value, d_kernel), (statistics, d_hidden) = jax.lax.scan(
        block_step,
        (jnp.zeros((), jnp.float32), d_kernel),
        jax.tree.map(in_blocks, by_token),
    )
    statistics = jax.tree.map(lambda x: x.reshape(-1)[:num_tokens], statistics)
    summed_axes = tuple(a for a in layout.token_axes if a not in gathered_axes)
    value = _sum(value, summed_axes)
    if not with_gradients:
        return value, statistics, None
    d_hidden_TxD = d_hidden.reshape(-1, hidden_size)[:num_tokens]
    d_kernel = _sum(
        d_kernel,
        summed_axes,
        scattered_over=SPLIT_AXES if _scatters(options, hidden_size) else (),
        dimension=kernel_axes.index("d"),
    )
    return value, statistics, (d_hidden_TxD, d_kernel)


def _split(num_tokens: int, options: _Options, gathered: int) -> tuple[int, int, int]:
    """Blocks, chunks per block and this device's tokens per chunk, with little padding."""
    chunk_size = max(1, options.chunk_size // gathered)
    num_chunks = options.block_size // options.chunk_size
    num_blocks = math.ceil(num_tokens / (num_chunks * chunk_size))
    num_chunks = min(num_chunks, math.ceil(num_tokens / num_blocks / chunk_size))
    needed = math.ceil(num_tokens / (num_blocks * num_chunks))
    # A multiple of the sublanes of a TPU's registers.
    return num_blocks, num_chunks, min(chunk_size, math.ceil(needed / 8) * 8)


def _chunk(
    options,
    with_gradients,
    columns,
    kernel,
    teacher_kernel,
    hidden_CxD,
    teacher_hidden_CxE,
    compact,
    targets_C,
    weights_C,
):
    """Value and statistics of one chunk of tokens; with gradients, that of its logits."""

    def tile(start):
        student_VxC = columns.logits(kernel, hidden_CxD, start, options.vocab_first)
        if columns.has_tail:
            return student_VxC, columns.spread(compact, start)
        if teacher_hidden_CxE is None:
            return student_VxC, None
        teacher = teacher_kernel, teacher_hidden_CxE
        return student_VxC, columns.logits(*teacher, start, options.teacher_vocab_first)

    if columns.num_tiles == 1:
        both_VxC = tile(0)
        seen = columns.reduce(*both_VxC, targets_C, start=0, lowest=0)
    else:
        # The last tile starts early enough to have full size; the columns that it shares
        # with the previous tile are masked in the reductions.
        def tile_step(carry, index):
            seen, both_VxC = carry
            lowest = index * options.vocab_tile
            start = jnp.minimum(lowest, columns.num_local - options.vocab_tile)
            part = tile(start)
            new = columns.reduce(*part, targets_C, start=start, lowest=lowest)
            seen = merge(jax.tree.map(lambda *x: jnp.stack(x), seen, new))
            if with_gradients:
                both_VxC = jax.tree.map(
                    lambda whole, x: jax.lax.dynamic_update_slice_in_dim(
                        whole, x, start, axis=0
                    ),
                    both_VxC,
                    part,
                )
            return (seen, both_VxC), None

        shapes = jax.eval_shape(lambda: columns.reduce(*tile(0), targets_C, 0, 0))
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        nothing = nothing.with_tops(MASKED)
        both_VxC = None
        if with_gradients:
            whole = jnp.zeros((columns.num_local, targets_C.shape[0]), jnp.float32)
            both_VxC = (whole, None if nothing.teacher_top is None else whole)
        (seen, both_VxC), _ = jax.lax.scan(
            tile_step, (nothing, both_VxC), jnp.arange(columns.num_tiles)
        )
    seen = merge_shards(seen, columns.axes)
    if columns.has_tail:
        seen = seen.with_tail(compact.tail)

    statistics = _statistics(seen, targets_C)
    factor_C = jnp.ones_like(statistics.ntp)
    if options.token_weighting != "none":
        teacher_nll_C = seen.teacher_top - seen.teacher_gold + jnp.log(seen.teacher_sum)
        factor_C = dense.token_factor(
            options.token_weighting, statistics.ntp, teacher_nll_C
        )
    weights_C = weights_C.resolve(statistics.swapped, factor_C)
    value = sum(
        jnp.sum(jnp.where(w != 0, w * getattr(statistics, name), 0.0))
        for name, w in weights_C._asdict().items()
        if name != "selective"
    )
    if not with_gradients:
        return value, statistics, None
    d_logits_VxC = _logits_gradient(seen, columns, *both_VxC, targets_C, weights_C)
    if options.soft_cap is not None:
        # Clip because of masked entries, whose gradient is 0.
        tanh_VxC = jnp.clip(both_VxC[0] / options.soft_cap, -1.0, 1.0)
        d_logits_VxC *= 1.0 - tanh_VxC**2
    return value, statistics, d_logits_VxC.astype(hidden_CxD.dtype)


def _sum(x, axes, scattered_over=(), dimension=0):
    """Sums over mesh axes; over `scattered_over` each device keeps only its slice."""
    for axis in scattered_over:
        x = jax.lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True)
    rest = tuple(axis for axis in axes if axis not in scattered_over)
    return jax.lax.psum(x, rest) if rest else x


def _product(equation, a, b):
    """A matrix product with float32 accumulation."""
    if platform() == "cpu":
        # XLA's CPU runtime lacks some bfloat16 products with a float32 result; products of
        # float32 copies give the same numbers.
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _statistics(seen: VocabSlice, targets_C: jax.Array) -> TokenStatistics:
    """Computes the statistics from the slice of the whole vocabulary."""
    # Take differences first: they keep their precision if logits are large.
    ntp = (seen.student_top - seen.student_gold) + jnp.log(seen.student_sum)
    correct = (seen.student_top_id == targets_C).astype(jnp.float32)
    if seen.teacher_top is None:
        zero = jnp.zeros_like(ntp)
        return TokenStatistics(ntp, zero, zero, correct, zero, zero)
    kd = seen.cross / seen.teacher_sum + jnp.log(seen.student_sum / seen.teacher_sum)
    margin = seen.student_at_top - seen.student_gold
    return TokenStatistics(
        ntp,
        kd + seen.p_top_minus_p_gold(targets_C) * margin,
        kd,
        correct,
        (seen.student_top_id == seen.teacher_top_id).astype(jnp.float32),
        seen.is_swapped(targets_C).astype(jnp.float32),
    )


class _Columns:
    """This device's columns of the vocabulary: computes and reduces their logits."""

    def __init__(self, kernel, options: _Options, has_tail: bool = False):
        self.num_local = kernel.shape[_vocab_dimension(options.vocab_first)]
        self.axes = options.layout.vocab_axes
        self.offset = jax.lax.axis_index(self.axes) * self.num_local if self.axes else 0
        self.tile = options.vocab_tile
        self.num_tiles = math.ceil(self.num_local / self.tile)
        self.vocab_size = options.vocab_size
        self.padded = options.vocab_size < self.num_local * _axes_size(self.axes)
        self.soft_cap = options.soft_cap
        self.has_tail = has_tail

    def ids(self, start=0, size: int | None = None):
        """Token ids of `size` columns from the local column `start`, `[size, 1]`."""
        return (self.offset + start + jnp.arange(size or self.num_local))[:, None]

    def logits(self, kernel, hidden_CxD, start, vocab_first) -> jax.Array:
        """Float32 logits of the tile at `start`, padding masked."""
        if self.num_tiles > 1:
            kernel = jax.lax.dynamic_slice_in_dim(
                kernel, start, self.tile, _vocab_dimension(vocab_first)
            )
        axes = "vd" if vocab_first else "dv"
        logits_VxC = _product(f"{axes},cd->vc", kernel, hidden_CxD)
        if self.soft_cap is not None:
            logits_VxC = self.soft_cap * jnp.tanh(logits_VxC / self.soft_cap)
        if self.padded:
            is_real_Vx1 = self.ids(start, self.tile) < self.vocab_size
            logits_VxC = jnp.where(is_real_Vx1, logits_VxC, MASKED)
        return logits_VxC

    def spread(self, compact: CompactTeacher, start) -> jax.Array:
        """A compact teacher's logits in the tile at `start`; its tail is masked."""
        row_MxC = compact.ids.T - self.offset - start
        row_MxC = jnp.where(row_MxC < 0, self.tile, row_MxC)
        logps_MxC = jnp.maximum(compact.logps.astype(jnp.float32).T, MASKED)
        # The first token stays the top token even if rounding made others equal to it.
        at_least_C = jnp.nextafter(logps_MxC[1:].max(0), jnp.float32(0))
        logps_MxC = logps_MxC.at[0].max(at_least_C)
        token_1xC = jnp.arange(row_MxC.shape[1])[None]
        masked_VxC = jnp.full((self.tile, row_MxC.shape[1]), MASKED, jnp.float32)
        return masked_VxC.at[row_MxC, token_1xC].max(logps_MxC, mode="drop")

    def reduce(self, student_VxC, teacher_VxC, targets_C, start, lowest) -> VocabSlice:
        """The slice of a tile at `start`, of its columns from `lowest` on."""
        if self.num_tiles > 1:
            is_new_Vx1 = (start + jnp.arange(self.tile) >= lowest)[:, None]
            student_VxC = jnp.where(is_new_Vx1, student_VxC, MASKED)
            if teacher_VxC is not None:
                teacher_VxC = jnp.where(is_new_Vx1, teacher_VxC, MASKED)

        def pick(x_VxC, ids_C):
            row_C = ids_C - self.offset - start
            is_mine_C = (row_C >= lowest - start) & (row_C < self.tile)
            row_1xC = jnp.where(is_mine_C, row_C, 0)[None]
            picked_C = jnp.take_along_axis(x_VxC, row_1xC, axis=0)[0]
            return jnp.where(is_mine_C, picked_C, 0.0)

        # Ids as floats, exact up to 2^24: with integers XLA would not fuse this reduction
        # with the others on a TPU, nor vectorize it on a CPU.
        ids_Vx1 = self.ids(start, self.tile).astype(jnp.float32)

        def top_id(x_VxC, top_C):
            return jnp.min(jnp.where(x_VxC == top_C[None], ids_Vx1, jnp.inf), axis=0)

        student_top = student_VxC.max(0)
        student_below_VxC = student_VxC - student_top[None]
        seen = VocabSlice(
            student_top=student_top,
            student_sum=jnp.exp(student_below_VxC).sum(0),
            student_gold=pick(student_VxC, targets_C),
            student_top_id=top_id(student_VxC, student_top),
            **dict.fromkeys(VocabSlice._fields[4:]),
        )
        if teacher_VxC is None:
            return seen
        teacher_top = teacher_VxC.max(0)
        teacher_below_VxC = teacher_VxC - teacher_top[None]
        exp_VxC = jnp.exp(teacher_below_VxC)
        teacher_top_id = top_id(teacher_VxC, teacher_top)
        tail = None
        if self.has_tail:
            tail_VxC = jnp.where(teacher_VxC == MASKED, student_VxC, MASKED)
            tail = self.reduce(tail_VxC, None, targets_C, start, lowest)
        return seen._replace(
            teacher_top=teacher_top,
            teacher_sum=exp_VxC.sum(0),
            teacher_gold=pick(teacher_VxC, targets_C),
            teacher_top_id=teacher_top_id,
            student_at_top=pick(student_VxC, teacher_top_id.astype(jnp.int32)),
            cross=(exp_VxC * (teacher_below_VxC - student_below_VxC)).sum(0),
            tail=tail,
        )


def _logits_gradient(seen, columns, student_VxC, teacher_VxC, targets_C, weights):
    """The weighted sum's gradient for the student's logits: `q - p` and two entries."""
    ids_Vx1 = columns.ids()
    is_gold_VxC = ids_Vx1 == targets_C[None]
    exp_s_VxC = jnp.exp(student_VxC - seen.student_top[None])
    if teacher_VxC is None:
        return (weights.ntp / seen.student_sum)[None] * exp_s_VxC - jnp.where(
            is_gold_VxC, weights.ntp[None], 0.0
        )
    exp_t_VxC = jnp.exp(teacher_VxC - seen.teacher_top[None])
    if columns.has_tail:
        # Split the tail's probability in the student's proportions.
        exp_tail_VxC = jnp.exp(student_VxC - seen.tail.student_top[None])
        scale = seen.tail.teacher_sum / seen.tail.student_sum
        is_tail_VxC = teacher_VxC == MASKED
        exp_t_VxC = jnp.where(is_tail_VxC, scale[None] * exp_tail_VxC, exp_t_VxC)
    is_top_VxC = ids_Vx1 == seen.teacher_top_id.astype(jnp.int32)[None]
    distilled = weights.kd + weights.lssd
    swapped_mass = weights.lssd * seen.p_top_minus_p_gold(targets_C)
    return (
        ((distilled + weights.ntp) / seen.student_sum)[None] * exp_s_VxC
        - (distilled / seen.teacher_sum)[None] * exp_t_VxC
        + jnp.where(is_top_VxC, swapped_mass[None], 0.0)
        - jnp.where(is_gold_VxC, (swapped_mass + weights.ntp)[None], 0.0)
    )
