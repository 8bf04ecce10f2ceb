"""Causal grouped-query attention within packed documents, and over a cache.

On a TPU, attention uses jax's splash attention kernel, on an NVIDIA GPU cuDNN's flash
attention. Both hold no scores in memory and skip the blocks that the causal mask hides.
Elsewhere, and for what the kernels do not support, XLA computes the same numbers block by
block.

Shape suffixes: B batch rows, L row length, S cache slots, M keys attended to, H query
heads, G key-value heads, R query heads per key-value head, K head size, GK = G * K.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec as P

from mixcpt_jax.runtime import sharding

# Blocks small enough to skip what the causal mask hides, and few enough to compile quickly.
_MIN_QUERY_BLOCK, _MAX_QUERY_BLOCKS = 128, 16

# The kernel works on whole registers: lengths are multiples of their 128 lanes.
_LANES, _SPLASH_BLOCKS = 128, (512, 384, 256, 128)

# cuDNN's kernel: compute capability of the GPU -> the largest head. Ampere was the first
# generation with such a kernel; Hopper's takes larger heads.
_CUDNN_HEADS = {8.0: 128, 9.0: 256}


def attend(
    query_BxLxHxK: jax.Array,
    key_BxLxGxK: jax.Array,
    value_BxLxGxK: jax.Array,
    segment_ids_BxL: jax.Array,
    sliding_window: int | None = None,
    query_scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Softmax attention, `[B, L, H, K]` in the dtype of the values.

    A token attends backwards, within its own segment, to at most `sliding_window` tokens
    (including itself). Scores are products divided by the square root of `query_scale`
    (None: of the head size). With a soft cap they become
    `soft_cap * tanh(scores / soft_cap)`. Scores and softmax are computed in float32.
    """
    operands = (
        _scaled(query_BxLxHxK, query_scale),
        key_BxLxGxK,
        value_BxLxGxK,
        segment_ids_BxL,
    )
    platform = sharding.platform()
    if platform == "tpu" and query_BxLxHxK.shape[1] % _LANES == 0:
        return splash(*operands, sliding_window, soft_cap)
    if platform == "gpu" and soft_cap is None and _fits_cudnn(query_BxLxHxK):
        return cudnn(*operands, sliding_window)
    return in_blocks(*operands, sliding_window, soft_cap)


def in_blocks(
    query_BxLxHxK: jax.Array,
    key_BxLxGxK: jax.Array,
    value_BxLxGxK: jax.Array,
    segment_ids_BxL: jax.Array,
    sliding_window: int | None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Attends block by block over queries that are already scaled.

    A block attends only to the keys up to its own end, which saves nearly half of the work,
    and no `[L, L]` array of all heads exists at once. The division by the softmax sum comes
    after the product with the values.
    """
    length = query_BxLxHxK.shape[1]
    mask_BxLxL = _mask(segment_ids_BxL, sliding_window)
    outputs = [
        _mix(
            query_BxLxHxK[:, start:stop],
            key_BxLxGxK[:, :stop],
            value_BxLxGxK[:, :stop],
            mask_BxLxL[:, start:stop, :stop],
            soft_cap,
        )
        for start, stop in _query_blocks(length)
    ]
    return jnp.concatenate(outputs, axis=1)


def attend_to_cache(
    query_BxLxHxK: jax.Array,
    key_BxSxGK: jax.Array,
    value_BxSxGK: jax.Array,
    positions_BxL: jax.Array,
    sliding_window: int | None = None,
    query_scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Softmax attention of new tokens over a cache, otherwise as `attend`.

    Args:
      query_BxLxHxK: the queries of the new tokens.
      key_BxSxGK, value_BxSxGK: slot `s` holds those of the row's token at position `s`,
        heads side by side. A token attends to the slots up to its own position, at most the
        last `sliding_window` of them; all other slots are ignored, provided their values
        are finite.
      positions_BxL: the positions of the new tokens.

    Returns:
      `[B, L, H, K]` in the dtype of the queries.
    """
    head_size, dtype = query_BxLxHxK.shape[-1], query_BxLxHxK.dtype
    query_BxLxHxK = _scaled(query_BxLxHxK, query_scale)
    key_BxSxGxK, value_BxSxGxK = (
        x.astype(dtype).reshape(*x.shape[:2], -1, head_size)
        for x in (key_BxSxGK, value_BxSxGK)
    )
    slots_S = jnp.arange(key_BxSxGK.shape[1])
    distance_BxLxS = positions_BxL[:, :, None] - slots_S[None, None, :]
    mask_BxLxS = distance_BxLxS >= 0
    if sliding_window is not None:
        mask_BxLxS &= distance_BxLxS < sliding_window
    outputs = [
        _mix(
            query_BxLxHxK[:, start:stop],
            key_BxSxGxK,
            value_BxSxGxK,
            mask_BxLxS[:, start:stop],
            soft_cap,
        )
        for start, stop in _query_blocks(query_BxLxHxK.shape[1])
    ]
    return jnp.concatenate(outputs, axis=1)


def _scaled(query_BxLxHxK: jax.Array, query_scale: float | None) -> jax.Array:
    # Do not round the scale to the queries' dtype: that would change all scores by one
    # factor.
    factor = (query_scale or query_BxLxHxK.shape[-1]) ** -0.5
    scaled_BxLxHxK = query_BxLxHxK.astype(jnp.float32) * factor
    return scaled_BxLxHxK.astype(query_BxLxHxK.dtype)


def _query_blocks(length: int) -> list[tuple[int, int]]:
    block = max(_MIN_QUERY_BLOCK, -(-length // _MAX_QUERY_BLOCKS))
    return [(at, min(at + block, length)) for at in range(0, length, block)]


def _mix(
    query_BxLxHxK: jax.Array,
    key_BxMxGxK: jax.Array,
    value_BxMxGxK: jax.Array,
    mask_BxLxM: jax.Array,
    soft_cap: float | None,
) -> jax.Array:
    """Attends from one block of scaled queries to all given keys."""
    shape = query_BxLxHxK.shape
    batch, length, heads, head_size = shape
    groups = key_BxMxGxK.shape[2]
    scores_BxGxRxLxM = jnp.einsum(
        "blgrk,bmgk->bgrlm",
        query_BxLxHxK.reshape(batch, length, groups, heads // groups, head_size),
        key_BxMxGxK,
        preferred_element_type=jnp.float32,
    )
    if soft_cap is not None:
        scores_BxGxRxLxM = soft_cap * jnp.tanh(scores_BxGxRxLxM / soft_cap)
    scores_BxGxRxLxM = jnp.where(mask_BxLxM[:, None, None], scores_BxGxRxLxM, -1e30)
    peaks = jax.lax.stop_gradient(scores_BxGxRxLxM.max(-1, keepdims=True))
    weights_BxGxRxLxM = jnp.exp(scores_BxGxRxLxM - peaks)
    mixed_BxGxRxLxK = jnp.einsum(
        "bgrlm,bmgk->bgrlk",
        weights_BxGxRxLxM.astype(value_BxMxGxK.dtype),
        value_BxMxGxK,
        preferred_element_type=jnp.float32,
    )
    mixed_BxGxRxLxK /= weights_BxGxRxLxM.sum(-1)[..., None]
    mixed_BxGxRxLxK = mixed_BxGxRxLxK.astype(value_BxMxGxK.dtype)
    return mixed_BxGxRxLxK.transpose(0, 3, 1, 2, 4).reshape(shape)


def splash(
    query_BxLxHxK: jax.Array,
    key_BxLxGxK: jax.Array,
    value_BxLxGxK: jax.Array,
    segment_ids_BxL: jax.Array,
    sliding_window: int | None,
    soft_cap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Runs jax's TPU kernel on each device's rows and heads; queries are already scaled.

    Args:
      interpret: runs the kernel without a TPU, slowly.
    """

    def local(query_BxLxHxK, key_BxLxGxK, value_BxLxGxK, segment_ids_BxL):
        length, heads = query_BxLxHxK.shape[1:3]
        shape = (length, length)
        mask = splash_attention.CausalMask(shape)
        if sliding_window is not None:
            mask = splash_attention.LocalMask(shape, (sliding_window - 1, 0), offset=0)
        block = _splash_block(length)
        kernel = splash_attention.make_splash_mha_single_device(
            splash_attention.MultiHeadMask([mask] * heads),
            block_sizes=splash_attention.BlockSizes(
                *[block] * 3,
                block_q_dkv=block,
                block_kv_dkv=block,
                block_kv_dkv_compute=block,
                block_q_dq=block,
                block_kv_dq=block,
            ),
            attn_logits_soft_cap=soft_cap,
            interpret=interpret,
        )

        def one_row(query_LxHxK, key_LxGxK, value_LxGxK, segment_ids_L):
            return kernel(
                *(x.swapaxes(0, 1) for x in (query_LxHxK, key_LxGxK, value_LxGxK)),
                segment_ids=splash_attention.SegmentIds(segment_ids_L, segment_ids_L),
            ).swapaxes(0, 1)

        return jax.vmap(one_row)(
            query_BxLxHxK, key_BxLxGxK, value_BxLxGxK, segment_ids_BxL
        )

    operands = query_BxLxHxK, key_BxLxGxK, value_BxLxGxK, segment_ids_BxL
    return _on_each_device(local)(*operands)


def cudnn(
    query_BxLxHxK: jax.Array,
    key_BxLxGxK: jax.Array,
    value_BxLxGxK: jax.Array,
    segment_ids_BxL: jax.Array,
    sliding_window: int | None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Runs cuDNN's flash attention on each device's rows and heads of scaled queries.

    The kernel itself knows only the causal mask. Documents and the window reach it as a
    mask `[B, 1, L, L]`, which all heads share. It has no soft cap.

    Args:
      implementation: of `jax.nn.dot_product_attention`; "xla" computes the same without a
        GPU, with all scores in memory.
    """

    def local(query_BxLxHxK, key_BxLxGxK, value_BxLxGxK, segment_ids_BxL):
        return jax.nn.dot_product_attention(
            query_BxLxHxK,
            key_BxLxGxK,
            value_BxLxGxK,
            mask=_mask(segment_ids_BxL, sliding_window)[:, None],
            scale=1.0,
            is_causal=True,
            implementation=implementation,
        )

    operands = query_BxLxHxK, key_BxLxGxK, value_BxLxGxK, segment_ids_BxL
    return _on_each_device(local)(*operands)


def _fits_cudnn(query_BxLxHxK: jax.Array) -> bool:
    """Whether cuDNN has a kernel, with its gradient, for these queries."""
    length, _, head_size = query_BxLxHxK.shape[1:]
    capability = sharding.compute_capability()
    heads = [size for least, size in _CUDNN_HEADS.items() if capability >= least]
    return (
        query_BxLxHxK.dtype in (jnp.bfloat16, jnp.float16)
        and length % 2 == 0
        and head_size % 8 == 0
        and head_size <= max(heads, default=0)
    )


def _on_each_device(local: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Maps attention over the mesh: each device has its rows and its heads."""
    if jax.sharding.get_abstract_mesh().empty:
        return local
    rows = sharding.batch_axes()
    heads = P(rows, None, sharding.TENSOR)
    return jax.shard_map(
        local,
        in_specs=(heads, heads, heads, P(rows)),
        out_specs=heads,
        check_vma=False,
    )


def _splash_block(length: int) -> int:
    return next(size for size in _SPLASH_BLOCKS if length % size == 0)


def splash_pairs(length: int, sliding_window: int | None = None) -> int:
    """The number of query-key pairs that `splash` computes in a row of one head."""
    block = _splash_block(length)
    blocks = range(length // block)
    nearest = [[(i - j - 1) * block + 1 for j in blocks if j <= i] for i in blocks]
    visited = sum(
        sliding_window is None or distance < sliding_window
        for distances in nearest
        for distance in distances
    )
    return visited * block**2


def _mask(segment_ids_BxL: jax.Array, sliding_window: int | None) -> jax.Array:
    """True where a token may attend, `[B, L, L]`."""
    length = segment_ids_BxL.shape[1]
    distance_LxL = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    reachable_LxL = distance_LxL >= 0
    if sliding_window is not None:
        reachable_LxL &= distance_LxL < sliding_window
    same_BxLxL = segment_ids_BxL[:, :, None] == segment_ids_BxL[:, None, :]
    return same_BxLxL & reachable_LxL[None]
