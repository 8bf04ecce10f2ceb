"""Causal grouped-query attention within packed documents.

On a TPU it is jax's splash attention kernel, which holds no scores in memory and skips
the blocks that causality hides; elsewhere, and for shapes the kernel does not take, the
same numbers come block by block from XLA.

Shape suffixes: B batch rows, L row length, H query heads, G key-value heads, R query
heads per key-value head, K head size.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec as P

from mixcpt_jax import sharding

# Small enough to skip what causality hides, few enough to compile quickly.
_MIN_QUERY_BLOCK, _MAX_QUERY_BLOCKS = 128, 16

# The kernel works on whole registers: lengths are multiples of their 128 lanes.
_LANES, _SPLASH_BLOCKS = 128, (512, 384, 256, 128)


def attend(
    query_BxLxHxK: jax.Array,
    key_BxLxGxK: jax.Array,
    value_BxLxGxK: jax.Array,
    segment_ids_BxL: jax.Array,
    sliding_window: int | None = None,
) -> jax.Array:
    """Softmax attention, `[B, L, H, K]` in the dtype of the values.

    A token looks backwards, within its own segment, and at most `sliding_window` tokens
    far (itself counted). Scores and their softmax are float32 inside.
    """
    scale = jnp.asarray(query_BxLxHxK.shape[-1] ** -0.5, query_BxLxHxK.dtype)
    operands = (query_BxLxHxK * scale, key_BxLxGxK, value_BxLxGxK, segment_ids_BxL)
    if sharding.platform() == "tpu" and query_BxLxHxK.shape[1] % _LANES == 0:
        return splash(*operands, sliding_window)
    return in_blocks(*operands, sliding_window)


def in_blocks(
    query_BxLxHxK: jax.Array,
    key_BxLxGxK: jax.Array,
    value_BxLxGxK: jax.Array,
    segment_ids_BxL: jax.Array,
    sliding_window: int | None,
) -> jax.Array:
    """Block by block over queries, which come scaled.

    A block sees only the keys up to its own end, which saves close to half of the work,
    and no `[L, L]` array of all heads exists at once. The division by the sum of the
    softmax comes after the product with the values.
    """
    batch, length, heads, head_size = query_BxLxHxK.shape
    groups = key_BxLxGxK.shape[2]
    mask_BxLxL = _mask(segment_ids_BxL, sliding_window)
    query = query_BxLxHxK.reshape(batch, length, groups, heads // groups, head_size)
    block = max(_MIN_QUERY_BLOCK, -(-length // _MAX_QUERY_BLOCKS))
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        scores = jnp.einsum(
            "blgrk,bmgk->bgrlm",
            query[:, start:stop],
            key_BxLxGxK[:, :stop],
            preferred_element_type=jnp.float32,
        )
        scores = jnp.where(mask_BxLxL[:, None, None, start:stop, :stop], scores, -1e30)
        scores -= jax.lax.stop_gradient(scores.max(-1, keepdims=True))
        weights = jnp.exp(scores)
        mixed = jnp.einsum(
            "bgrlm,bmgk->bgrlk",
            weights.astype(value_BxLxGxK.dtype),
            value_BxLxGxK[:, :stop],
            preferred_element_type=jnp.float32,
        )
        mixed /= weights.sum(-1)[..., None]
        outputs.append(mixed.astype(value_BxLxGxK.dtype))
    output_BxGxRxLxK = jnp.concatenate(outputs, axis=3)
    return output_BxGxRxLxK.transpose(0, 3, 1, 2, 4).reshape(query_BxLxHxK.shape)


def splash(
    query_BxLxHxK: jax.Array,
    key_BxLxGxK: jax.Array,
    value_BxLxGxK: jax.Array,
    segment_ids_BxL: jax.Array,
    sliding_window: int | None,
    interpret: bool = False,
) -> jax.Array:
    """jax's TPU kernel on each device's rows and heads; queries come scaled.

    Args:
      interpret: runs the kernel without a TPU, slowly.
    """

    def local(query_BxLxHxK, key_BxLxGxK, value_BxLxGxK, segment_ids_BxL):
        length, heads = query_BxLxHxK.shape[1:3]
        shape = (length, length)
        mask = splash_attention.CausalMask(shape)
        if sliding_window is not None:
            mask = splash_attention.LocalMask(shape, (sliding_window - 1, 0), offset=0)
        block = next(size for size in _SPLASH_BLOCKS if length % size == 0)
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

    if not jax.sharding.get_abstract_mesh().empty:
        heads = P(sharding.BATCH_AXES, None, sharding.TENSOR)
        local = jax.shard_map(
            local,
            in_specs=(heads, heads, heads, P(sharding.BATCH_AXES)),
            out_specs=heads,
            check_vma=False,
        )
    return local(query_BxLxHxK, key_BxLxGxK, value_BxLxGxK, segment_ids_BxL)


def _mask(segment_ids_BxL: jax.Array, sliding_window: int | None) -> jax.Array:
    """True where a token may look, `[B, L, L]`."""
    length = segment_ids_BxL.shape[1]
    distance_LxL = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    reachable_LxL = distance_LxL >= 0
    if sliding_window is not None:
        reachable_LxL &= distance_LxL < sliding_window
    same_BxLxL = segment_ids_BxL[:, :, None] == segment_ids_BxL[:, None, :]
    return same_BxLxL & reachable_LxL[None]
