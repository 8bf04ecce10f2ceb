"""Objectives over pairs of answers: DPO and its relatives.

Shape suffixes: B batch rows, L row length, T = B * L tokens, S segments of a row,
P = B * S / 2 pairs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mixcpt_jax.models import transformer
from mixcpt_jax.objectives import streamed
from mixcpt_jax.objectives.interface import (
    Batch,
    Objective,
    flatten,
    loss_count,
    metric_means,
    model_inputs,
    token_counts,
    with_soft_cap,
)


def preference_objective(
    forward: transformer.Forward,
    reference_forward: transformer.Forward | None,
    source_names: tuple[str, ...],
    num_segments: int,
    preference_loss: Callable[..., tuple[jax.Array, jax.Array, jax.Array]],
    length_normalised: bool = False,
    log_probabilities: Callable[..., jax.Array] = streamed.log_probabilities,
) -> Objective:
    """The mean over pairs of `dense.preference_loss`.

    Segments `2 i + 1` and `2 i + 2` of a row are the chosen and the rejected answer of a
    pair, each with its prompt; only loss tokens count.

    Args:
      forward: the policy, from `transformer.make_forward`.
      reference_forward: the frozen reference; None if the batch has `reference_logps`.
      source_names: names of the sources, in the order of `source_ids`.
      num_segments: the maximum number of segments in a row; even.
      preference_loss: `dense.preference_loss` with its settings.
      length_normalised: log-probabilities are means over an answer's tokens, not sums.
      log_probabilities: `streamed.log_probabilities` with its settings.
    """

    def answers(params, forward, batch: Batch):
        """Summed log-probability of each segment's loss tokens, `[B, S]`."""
        unembedding, vocab_first = transformer.unembedding(params)
        logps_T = with_soft_cap(log_probabilities, forward)(
            flatten(forward(params, *model_inputs(batch))),
            unembedding,
            flatten(batch["targets"]),
            vocab_first=vocab_first,
        )
        logps_BxL = logps_T.reshape(batch["targets"].shape) * batch["loss_mask"]
        return _sum_per_segment(logps_BxL, batch, num_segments)

    def loss_sum(student, frozen_params, batch: Batch, scale):
        logps_BxS = answers(student, forward, batch)
        if reference_forward is None:
            reference_BxS = batch["reference_logps"]
        else:
            reference_BxS = answers(frozen_params, reference_forward, batch)
        lengths_BxS = _sum_per_segment(batch["loss_mask"], batch, num_segments)
        chosen_lengths_P, rejected_lengths_P = _pairs(lengths_BxS)
        if length_normalised:
            divisors_BxS = jnp.maximum(lengths_BxS, 1.0)
            logps_BxS, reference_BxS = (
                x / divisors_BxS for x in (logps_BxS, reference_BxS)
            )
            chosen_lengths_P = jnp.ones_like(chosen_lengths_P)
        chosen_P, rejected_P = _pairs(logps_BxS)
        loss_P, chosen_rewards_P, rejected_rewards_P = preference_loss(
            chosen_P,
            rejected_P,
            *_pairs(reference_BxS),
            chosen_lengths_P=chosen_lengths_P,
        )
        is_pair_P = (rejected_lengths_P > 0).astype(jnp.float32)
        values_P = {
            "chosen_reward": chosen_rewards_P,
            "rejected_reward": rejected_rewards_P,
            "margin": chosen_rewards_P - rejected_rewards_P,
            "accuracy": (chosen_rewards_P > rejected_rewards_P).astype(jnp.float32),
            "chosen_logp": chosen_P,
            "rejected_logp": rejected_P,
        }
        source_ids_P = jnp.repeat(batch["source_ids"][:, 0], num_segments // 2)
        loss = jnp.sum(jnp.where(is_pair_P > 0, loss_P, 0.0)) * scale
        return loss, metric_means(values_P, is_pair_P, source_ids_P, source_names)

    def num_pairs(batch: Batch):
        lengths_BxS = _sum_per_segment(batch["loss_mask"], batch, num_segments)
        count = jnp.sum(_pairs(lengths_BxS)[1] > 0, dtype=jnp.float32)
        counts = token_counts(batch, source_names) | {"pairs": (count, jnp.ones(()))}
        return count, counts | loss_count(count > 0)

    return Objective(num_pairs, loss_sum)


def _sum_per_segment(x_BxL: jax.Array, batch: Batch, num_segments: int) -> jax.Array:
    """`[B, S]`: the sum over each segment of a row, without padding."""
    segments_S = jnp.arange(1, num_segments + 1)
    is_in_BxLxS = batch["segment_ids"][:, :, None] == segments_S[None, None]
    # Highest precision: a TPU would round the terms to bfloat16.
    return jnp.einsum("bl,bls->bs", x_BxL, is_in_BxLxS * 1.0, precision="highest")


def _pairs(x_BxS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The chosen and the rejected answers', `[P]` each."""
    return x_BxS[:, 0::2].reshape(-1), x_BxS[:, 1::2].reshape(-1)
