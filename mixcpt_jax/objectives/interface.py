"""The inputs and outputs of an objective: batches, and metrics as (sum, count).

A batch is a dict of `[B, L]` arrays: `tokens`, `targets`, `positions`, `segment_ids`,
`source_ids`, `loss_mask` (1 where the target contributes to the loss) and a weight per
objective, `ntp_weights` and so on, see `streamed.TokenWeights`. If the log-probabilities
of a reference were computed in advance, it also has them per segment, `reference_logps`,
`[B, S]`.

A metric is a pair (sum, count), so sums over microbatches, batches and hosts stay exact;
the mean is taken when the metric is read.

Shape suffixes: B batch rows, L row length, T = B * L tokens, S segments of a row,
P = B * S / 2 pairs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mixcpt_jax.models import experts, transformer

Batch = dict[str, jax.Array]

Metrics = dict[str, tuple[jax.Array, jax.Array]]


class Objective(NamedTuple):
    """The loss that a phase minimizes.

    Attributes:
      count: `batch -> (number, metrics)`: the denominator of the loss, a float32 scalar,
        and counts to report. It is called on the global batch, before any microbatch runs.
        Its metric `loss` is `(0, 1)`, or `(0, 0)` (an empty mean) if no part of the batch
        contributes to the loss.
      loss_sum: `(student, frozen_params, batch, scale) -> (loss, metrics)`: the sum over
        a (micro)batch times `scale`, and its metrics.
    """

    count: Callable[[Batch], tuple[jax.Array, Metrics]]
    loss_sum: Callable[..., tuple[jax.Array, Metrics]]


def soft_cap_of(forward: transformer.Forward) -> float | None:
    """The soft cap of a network's logits; a bare function has none."""
    return getattr(forward, "final_soft_cap", None)


def with_soft_cap(
    head: Callable[..., Any], forward: transformer.Forward
) -> Callable[..., Any]:
    """`streamed.head_loss`, or another head, with the soft cap of a network's logits."""
    cap = soft_cap_of(forward)
    return head if cap is None else functools.partial(head, soft_cap=cap)


def model_inputs(batch: Batch):
    return batch["tokens"], batch["positions"], batch["segment_ids"]


def run(
    forward: transformer.Forward, params: transformer.Params, batch: Batch
) -> tuple[jax.Array, experts.Routing | None]:
    """The last hidden states `[T, D]`, and the routing of a mixture of experts."""
    with_routing = getattr(forward, "with_routing", None)
    if with_routing is None:
        return flatten(forward(params, *model_inputs(batch))), None
    hidden, routing = with_routing(params, *model_inputs(batch))
    return flatten(hidden), routing


def flatten(x_BxLx: jax.Array) -> jax.Array:
    """`[B, L, ...]` to `[T, ...]`; each row stays on its device."""
    return x_BxLx.reshape(-1, *x_BxLx.shape[2:])


def metric_means(
    values_N: dict[str, jax.Array],
    mask_N: jax.Array,
    source_ids_N: jax.Array,
    source_names: tuple[str, ...],
) -> Metrics:
    """Means over the unmasked values, of the whole batch and of each source."""
    membership_NxM = mask_N[:, None] * jax.nn.one_hot(
        source_ids_N, len(source_names), dtype=jnp.float32
    )
    values_NxK = jnp.stack(list(values_N.values()), axis=1)
    # Highest precision: a TPU would round the sums' terms to bfloat16.
    sums_MxK = jnp.matmul(membership_NxM.T, values_NxK, precision="highest")
    counts_M = membership_NxM.sum(0)
    metrics: Metrics = {}
    for k, name in enumerate(values_N):
        metrics[name] = (sums_MxK[:, k].sum(), counts_M.sum())
        for m, source in enumerate(source_names):
            metrics[f"{source}/{name}"] = (sums_MxK[m, k], counts_M[m])
    return metrics


def loss_count(has_loss: jax.Array) -> Metrics:
    """See `Objective.count`."""
    return {"loss": (jnp.zeros(()), has_loss.astype(jnp.float32))}


def token_counts(batch: Batch, source_names: tuple[str, ...]) -> Metrics:
    """The number of loss tokens, in the batch and of each source."""
    mask_T = flatten(batch["loss_mask"]).astype(jnp.float32)
    source_ids_T = flatten(batch["source_ids"])
    one = jnp.ones(())
    counts = {
        f"{source}/tokens": (jnp.sum(jnp.where(source_ids_T == i, mask_T, 0.0)), one)
        for i, source in enumerate(source_names)
    }
    return counts | {"tokens": (jnp.sum(mask_T), one)}
