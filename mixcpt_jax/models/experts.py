"""Mixture of experts: a router chooses a few of many small MLPs for each token.

The choices are sorted by expert. Then the rows of an expert follow each other, and one
grouped product multiplies each run of rows by the kernel of its expert. No array has both
a dimension of tokens and one of experts, except the router's logits. No choice is dropped.

On a mesh, the axis `expert` splits the experts. Devices of this axis exchange their tokens:
each gathers the tokens of all, computes the choices that fall on its own experts, and the
sums are scattered back. On an axis of E' devices, this sends a token to E' - 1 others. If
each choice were sent on its own (all-to-all), it would be K (E' - 1) / E' others on
average. So gathering moves no more bytes as long as E' <= K, its shapes are static, and the
result does not depend on an order of arrival. The kernels of a device's experts are
gathered over `fsdp` like those of dense layers.

Shape suffixes:
  T tokens             D hidden size        F size of an expert
  E experts            K choices of a token
  C = T * K choices    R rows: choices in the order of their experts
  I, O inputs and outputs of a kernel
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jax.sharding import PartitionSpec as P

from mixcpt_jax.runtime import sharding

# Rows of a tile of the TPU kernel. A tile that two experts share is computed twice, so
# long tiles waste work where experts have few rows.
TILE = 128
# The longest sides of a kernel's tile, so that it fits in VMEM.
_MOST_INPUTS, _MOST_OUTPUTS = 2048, 1024


class Kernels(NamedTuple):
    """The kernels of all experts."""

    gate_ExDxF: jax.Array
    up_ExDxF: jax.Array
    down_ExFxD: jax.Array


class Choices(NamedTuple):
    """The experts of each token.

    Attributes:
      experts_TxK: their indices, the most probable first.
      weights_TxK: of their outputs in the sum, float32.
      probabilities_TxE: the router's softmax, float32.
    """

    experts_TxK: jax.Array
    weights_TxK: jax.Array
    probabilities_TxE: jax.Array


class Routing(NamedTuple):
    """Statistics of a layer's router; of a network, stacked over its layers.

    Attributes:
      experts_TxK: as in `Choices`.
      entropy_T: of the router's distribution, nats.
      balance: the load-balancing loss (Fedus et al., arXiv 2101.03961): E times the sum
        over experts of their share of the choices times their mean probability. It is 1
        for a uniform router; gradients pass through the probabilities.
      load_max: E times the largest share of an expert: 1 if all have the same load.
    """

    experts_TxK: jax.Array
    entropy_T: jax.Array
    balance: jax.Array
    load_max: jax.Array


def choose(
    x_TxD: jax.Array, router_DxE: jax.Array, num_choices: int, normalize: bool
) -> Choices:
    """The most probable experts of each token, computed in float32.

    Args:
      x_TxD: the MLP's input.
      router_DxE: the router's kernel.
      num_choices: experts of a token, K.
      normalize: whether the K probabilities are divided by their sum.
    """
    logits_TxE = jnp.matmul(
        x_TxD.astype(jnp.float32), router_DxE.astype(jnp.float32), precision="highest"
    )
    probabilities_TxE = jax.nn.softmax(logits_TxE)
    weights_TxK, experts_TxK = jax.lax.top_k(probabilities_TxE, num_choices)
    if normalize:
        weights_TxK = weights_TxK / weights_TxK.sum(-1, keepdims=True)
    return Choices(experts_TxK, weights_TxK, probabilities_TxE)


def survey(choices: Choices, is_real_T: jax.Array) -> Routing:
    """The statistics of a router; padding does not count in loads."""
    experts_TxK, _, probabilities_TxE = choices
    num_experts = probabilities_TxE.shape[-1]
    is_real_T = is_real_T.astype(jnp.float32)
    is_chosen_TxKxE = jax.nn.one_hot(experts_TxK, num_experts)
    load_E = jnp.sum(is_chosen_TxKxE * is_real_T[:, None, None], axis=(0, 1))
    share_E = load_E / jnp.maximum(load_E.sum(), 1.0)
    mean_E = jnp.sum(probabilities_TxE * is_real_T[:, None], axis=0)
    mean_E = mean_E / jnp.maximum(is_real_T.sum(), 1.0)
    log_TxE = jnp.log(jnp.maximum(probabilities_TxE, jnp.finfo(jnp.float32).tiny))
    return Routing(
        experts_TxK,
        entropy_T=-jnp.sum(probabilities_TxE * log_TxE, axis=-1),
        balance=num_experts * jnp.sum(share_E * mean_E),
        load_max=num_experts * jnp.max(share_E),
    )


def drift(experts_NxTxK: jax.Array, start_NxTxK: jax.Array) -> jax.Array:
    """The share of each token's choices that another router did not make, `[T]`.

    Args:
      experts_NxTxK: the choices in N layers.
      start_NxTxK: those of the other router on the same tokens.
    """
    is_same = experts_NxTxK[..., :, None] == start_NxTxK[..., None, :]
    return 1 - jnp.mean(is_same.any(-1), axis=(0, 2), dtype=jnp.float32)


def mix(
    x_TxD: jax.Array,
    choices: Choices,
    kernels: Kernels,
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """The weighted sum of the outputs of each token's experts, `[T, D]`.

    An expert is a gated MLP. The products have the dtype of `x_TxD`.
    """
    operands = (x_TxD, choices.experts_TxK, choices.weights_TxK, kernels)
    local = functools.partial(_mix_local, activation)
    if jax.sharding.get_abstract_mesh().empty:
        return local(*operands)
    rows = P(sharding.batch_axes())
    axes = ("experts", "expert_hidden", "mlp")
    wide, narrow = sharding.spec(axes), sharding.spec((axes[0], axes[2], axes[1]))
    return jax.shard_map(
        functools.partial(_mix_shard, local),
        in_specs=(rows, rows, rows, Kernels(wide, wide, narrow)),
        out_specs=rows,
        check_vma=False,
    )(*operands)


def _mix_shard(local, x_TxD, experts_TxK, weights_TxK, kernels: Kernels):
    """`mix` of a device's tokens, with the experts of all devices."""
    mesh = jax.sharding.get_abstract_mesh()
    kernels = jax.tree.map(lambda kernel: kernel.astype(x_TxD.dtype), kernels)
    if mesh.shape[sharding.FSDP] > 1:
        kernels = Kernels(
            *(
                jax.lax.all_gather(kernel, sharding.FSDP, axis=axis, tiled=True)
                for kernel, axis in zip(kernels, (1, 1, 2), strict=True)
            )
        )
    axis, parts = sharding.EXPERT, mesh.shape[sharding.EXPERT]
    if parts == 1:
        y_TxD = local(x_TxD, experts_TxK, weights_TxK, kernels)
    else:
        x_TxD, experts_TxK, weights_TxK = (
            jax.lax.all_gather(x, axis, tiled=True)
            for x in (x_TxD, experts_TxK, weights_TxK)
        )
        first = jax.lax.axis_index(axis) * len(kernels.gate_ExDxF)
        y_TxD = local(x_TxD, experts_TxK - first, weights_TxK, kernels, parts)
        y_TxD = jax.lax.psum_scatter(y_TxD, axis, tiled=True)
    if mesh.shape[sharding.TENSOR] > 1:
        y_TxD = jax.lax.psum(y_TxD, sharding.TENSOR)
    return y_TxD


def _mix_local(
    activation, x_TxD, experts_TxK, weights_TxK, kernels: Kernels, parts: int = 1
):
    """The sum over the choices of these experts; those of other indices count as 0.

    Args:
      parts: number of parts in which the rows are computed; parts without rows are
        skipped. If the load is balanced over as many devices, nearly all rows of a device
        are in its first two parts; only the most unbalanced load fills all.
    """
    num_experts = len(kernels.gate_ExDxF)
    experts_C = experts_TxK.reshape(-1)
    is_here_C = (experts_C >= 0) & (experts_C < num_experts)
    experts_C = jnp.where(is_here_C, experts_C, num_experts)
    order_C = jnp.argsort(experts_C, stable=True)
    ends_E = jnp.searchsorted(experts_C[order_C], jnp.arange(num_experts), side="right")
    ranks_C = (
        jnp.zeros_like(order_C)
        .at[order_C]
        .set(jnp.arange(len(order_C)), unique_indices=True)
    )
    num_rows = -(-len(order_C) // (parts * TILE)) * TILE
    order_C = jnp.pad(
        order_C, (0, parts * num_rows - len(order_C)), constant_values=len(order_C)
    )

    def part(x_TxD, weights_TxK, kernels, index):
        start = index * num_rows
        choices_R = jax.lax.dynamic_slice_in_dim(order_C, start, num_rows)
        ends = jnp.clip(ends_E - start, 0, num_rows)
        sizes_E = jnp.diff(ends, prepend=0).astype(jnp.int32)
        rows_C = jnp.where(is_here_C, ranks_C - start, -1)
        rows_C = jnp.where(rows_C < 0, num_rows, rows_C)  # Out of bounds counts as 0.
        moves = choices_R, rows_C.reshape(experts_TxK.shape)
        x_RxD = _to_rows(x_TxD, *moves)
        gate_RxF = checkpoint_name(
            product(x_RxD, kernels.gate_ExDxF, sizes_E), "projection"
        )
        up_RxF = checkpoint_name(
            product(x_RxD, kernels.up_ExDxF, sizes_E), "projection"
        )
        # A weight multiplies the narrow input of the last product, not its output.
        weights_R = (
            weights_TxK.reshape(-1)
            .at[choices_R]
            .get(mode="fill", fill_value=0, unique_indices=True)
        )
        inner_RxF = (activation(gate_RxF) * up_RxF).astype(jnp.float32)
        inner_RxF = (inner_RxF * weights_R[:, None]).astype(x_TxD.dtype)
        return _to_tokens(product(inner_RxF, kernels.down_ExFxD, sizes_E), *moves)

    kernels = jax.tree.map(lambda kernel: kernel.astype(x_TxD.dtype), kernels)
    if parts == 1:
        return part(x_TxD, weights_TxK, kernels, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add(y_TxD, index):
        return y_TxD + jax.lax.cond(
            ends_E[-1] > index * num_rows,
            part,
            lambda x_TxD, *_: jnp.zeros_like(x_TxD),
            *(x_TxD, weights_TxK, kernels, index),
        )

    return jax.lax.scan(
        lambda y_TxD, index: (add(y_TxD, index), None),
        jnp.zeros_like(x_TxD),
        jnp.arange(parts),
    )[0]


@jax.custom_vjp
def _to_rows(x_TxD, choices_R, rows_TxK):
    """The token of each row.

    Its gradient and that of `_to_tokens` are gathers, whose sums have one order on all
    devices; autodiff would scatter.

    Args:
      choices_R: the choice of each row; rows without one have the number of choices.
      rows_TxK: the row of each choice; choices without one have the number of rows.
    """
    return x_TxD.at[choices_R // rows_TxK.shape[1]].get(mode="clip")


def _to_rows_forward(x_TxD, choices_R, rows_TxK):
    return _to_rows(x_TxD, choices_R, rows_TxK), (choices_R, rows_TxK)


def _to_rows_backward(moves, gradient_RxD):
    return _to_tokens(gradient_RxD, *moves), None, None


@jax.custom_vjp
def _to_tokens(y_RxD, choices_R, rows_TxK):
    """The sum of each token's rows, computed in float32."""
    del choices_R
    rows = (y_RxD.at[rows_T].get(mode="fill", fill_value=0) for rows_T in rows_TxK.T)
    return sum(row_TxD.astype(jnp.float32) for row_TxD in rows).astype(y_RxD.dtype)


def _to_tokens_forward(y_RxD, choices_R, rows_TxK):
    return _to_tokens(y_RxD, choices_R, rows_TxK), (choices_R, rows_TxK)


def _to_tokens_backward(moves, gradient_TxD):
    return _to_rows(gradient_TxD, *moves), None, None


_to_rows.defvjp(_to_rows_forward, _to_rows_backward)
_to_tokens.defvjp(_to_tokens_forward, _to_tokens_backward)


@jax.custom_vjp
def product(
    rows_RxI: jax.Array, kernels_ExIxO: jax.Array, sizes_E: jax.Array
) -> jax.Array:
    """Multiplies each run of rows by one kernel, `[R, O]`; other rows become 0.

    On a TPU this is jax's megablox kernel, because XLA's own `ragged_dot` multiplies all
    rows for the gradient of each kernel. Elsewhere it is a loop over blocks of rows.

    Args:
      rows_RxI: the rows; on a TPU, R is a multiple of 128.
      kernels_ExIxO: the kernels.
      sizes_E: numbers of rows, int32; the first run begins at row 0.
    """
    if sharding.platform() == "tpu":
        return _megablox(rows_RxI, kernels_ExIxO, sizes_E)
    return in_blocks(rows_RxI, kernels_ExIxO, sizes_E)


def _product_forward(rows_RxI, kernels_ExIxO, sizes_E):
    operands = rows_RxI, kernels_ExIxO, sizes_E
    return product(*operands), operands


def _product_backward(operands, gradient_RxO):
    rows_RxI, kernels_ExIxO, sizes_E = operands
    if sharding.platform() == "tpu":
        d_rows = _megablox(gradient_RxO, kernels_ExIxO, sizes_E, transpose=True)
        d_kernels = tgmm(
            rows_RxI.T,
            gradient_RxO,
            sizes_E,
            kernels_ExIxO.dtype,
            _tiles(*kernels_ExIxO.shape[1:]),
        )
    else:
        d_rows = in_blocks(gradient_RxO, kernels_ExIxO.swapaxes(1, 2), sizes_E)
        d_kernels = _outer_in_blocks(rows_RxI, gradient_RxO, sizes_E)
    return d_rows, d_kernels.astype(kernels_ExIxO.dtype), None


product.defvjp(_product_forward, _product_backward)


def _megablox(rows_RxI, kernels_ExIxO, sizes_E, transpose=False):
    # Only rows of groups beyond the kernels become zeros: one such group has the rest.
    rest = (len(rows_RxI) - sizes_E.sum()).astype(jnp.int32)
    inputs, outputs = kernels_ExIxO.shape[1:][:: -1 if transpose else 1]
    return gmm(
        rows_RxI,
        kernels_ExIxO,
        jnp.append(sizes_E, rest),
        rows_RxI.dtype,
        _tiles(inputs, outputs),
        transpose_rhs=transpose,
    )


def _tiles(inputs: int, outputs: int) -> tuple[int, int, int]:
    return TILE, min(inputs, _MOST_INPUTS), min(outputs, _MOST_OUTPUTS)


def in_blocks(rows_RxI, kernels_ExIxO, sizes_E):
    """`product`, block by block; each block is of one expert."""
    shape = len(rows_RxI) + TILE, kernels_ExIxO.shape[2]

    def step(y_RxO, start, is_in_B, x_BxI, expert):
        y_BxO = x_BxI @ kernels_ExIxO[expert]
        old_BxO = jax.lax.dynamic_slice_in_dim(y_RxO, start, TILE)
        new_BxO = jnp.where(is_in_B[:, None], y_BxO, old_BxO)
        return jax.lax.dynamic_update_slice_in_dim(y_RxO, new_BxO, start, 0)

    zeros = jnp.zeros(shape, rows_RxI.dtype)
    return _over_blocks(step, zeros, sizes_E, rows_RxI)[: len(rows_RxI)]


def _outer_in_blocks(rows_RxI, gradient_RxO, sizes_E):
    """The gradient of the kernels, float32."""
    shape = len(sizes_E), rows_RxI.shape[1], gradient_RxO.shape[1]

    def step(sum_ExIxO, start, is_in_B, x_BxI, expert):
        gradient_BxO = jax.lax.dynamic_slice_in_dim(padded_RxO, start, TILE)
        x_BxI = jnp.where(is_in_B[:, None], x_BxI, 0)
        outer_IxO = jnp.matmul(
            x_BxI.T, gradient_BxO, preferred_element_type=jnp.float32
        )
        return sum_ExIxO.at[expert].add(outer_IxO)

    padded_RxO = jnp.pad(gradient_RxO, ((0, TILE), (0, 0)))
    return _over_blocks(step, jnp.zeros(shape, jnp.float32), sizes_E, rows_RxI)


def _over_blocks(step, carry, sizes_E, rows_RxI):
    """Folds `step(carry, start, is_in_B, rows_BxI, expert)` over the blocks of all runs."""
    padded_RxI = jnp.pad(rows_RxI, ((0, TILE), (0, 0)))
    ends_E = jnp.cumsum(sizes_E)
    blocks_E = -(-sizes_E // TILE)
    blocks_up_to_E = jnp.cumsum(blocks_E)

    def body(block, carry):
        expert = jnp.searchsorted(blocks_up_to_E, block, side="right")
        block_of_run = block - blocks_up_to_E[expert] + blocks_E[expert]
        start = ends_E[expert] - sizes_E[expert] + block_of_run * TILE
        is_in_B = start + jnp.arange(TILE) < ends_E[expert]
        x_BxI = jax.lax.dynamic_slice_in_dim(padded_RxI, start, TILE)
        return step(carry, start, is_in_B, x_BxI, expert)

    return jax.lax.fori_loop(0, blocks_up_to_E[-1], body, carry)
