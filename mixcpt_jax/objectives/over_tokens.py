"""Objectives over tokens: a weighted sum of next-token prediction and distillation.

Shape suffixes: B batch rows, L row length, T = B * L tokens, S segments of a row,
P = B * S / 2 pairs.
"""

import functools
from collections.abc import Callable, Collection

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
from mixcpt_jax.objectives.teachers import Teacher, drop_without_teacher


def token_objective(
    forward: transformer.Forward,
    teacher: Teacher | None,
    source_names: tuple[str, ...],
    head_loss: Callable[
        ..., tuple[jax.Array, streamed.TokenStatistics]
    ] = streamed.head_loss,
    without_teacher: Collection[str] = (),
) -> Objective:
    """A weighted sum over tokens of the objectives of `streamed.TokenWeights`.

    The sum is divided by the number of loss tokens in the global batch, so weights mean the
    same even if a source has weight 0 for some objective.

    Args:
      forward: the student, from `transformer.make_forward`.
      teacher: the frozen teacher, or None when no objective needs one.
      source_names: names of the sources, in the order of `source_ids`.
      head_loss: `streamed.head_loss` with its settings.
      without_teacher: sources in the stream that have no teacher outputs. They have no
        teacher metrics; if there is such a source, the whole batch has none either.

    The metrics of a compact teacher that does not list the whole vocabulary are called
    `kd_lower_bound` and `lssd_lower_bound`, see `streamed.CompactTeacher`.
    """

    def loss_sum(student, frozen_params, batch: Batch, scale):
        hidden = flatten(forward(student, *model_inputs(batch)))
        of_teacher = {"teacher_hidden_TxE": None, "teacher_unembedding_ExV": None}
        if teacher is not None:
            of_teacher = teacher(frozen_params, batch)
        unembedding, vocab_first = transformer.unembedding(student)
        weights = streamed.TokenWeights(
            *(
                flatten(batch[f"{name}_weights"]) * scale
                for name in streamed.TokenWeights._fields
            )
        )
        loss, statistics = with_soft_cap(head_loss, forward)(
            hidden,
            unembedding,
            targets_T=flatten(batch["targets"]),
            weights=weights,
            vocab_first=vocab_first,
            **of_teacher,
        )
        values_T = statistics._asdict()
        own_T = {name: values_T.pop(name) for name in ("ntp", "correct")}
        compact = of_teacher.get("compact")
        vocab_size = unembedding.shape[0 if vocab_first else 1]
        if compact is not None and compact.ids.shape[1] < vocab_size:
            for name in ("kd", "lssd"):
                values_T[f"{name}_lower_bound"] = values_T.pop(name)
        mask_T = flatten(batch["loss_mask"]).astype(jnp.float32)
        of_tokens = mask_T, flatten(batch["source_ids"]), source_names
        metrics = metric_means(own_T, *of_tokens)
        if teacher is not None:
            metrics |= drop_without_teacher(
                metric_means(values_T, *of_tokens), without_teacher
            )
        return loss, metrics

    def num_tokens(batch: Batch):
        counts = token_counts(batch, source_names)
        weights = (batch[f"{name}_weights"] for name in streamed.TokenWeights._fields)
        has_loss = functools.reduce(jnp.logical_or, (jnp.any(w != 0) for w in weights))
        return counts["tokens"][0], counts | loss_count(has_loss)

    return Objective(num_tokens, loss_sum)
