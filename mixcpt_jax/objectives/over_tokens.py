"""Objectives over tokens: a weighted sum of next-token prediction and distillation.

Shape suffixes: B batch rows, L row length, T = B * L tokens, S segments of a row,
P = B * S / 2 pairs.
"""

import functools
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp

from mixcpt_jax.models import experts, transformer
from mixcpt_jax.objectives import streamed
from mixcpt_jax.objectives.interface import (
    Batch,
    Objective,
    flatten,
    loss_count,
    metric_means,
    run,
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
    load_balance: float = 0.0,
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
      load_balance: in a mixture of experts, the weight of the mean over layers of
        `experts.Routing.balance`, relative to the mean over loss tokens.

    A mixture of experts has the metrics `router_entropy`, `router_load_max` and
    `router_balance`, see `experts.Routing`. If the frozen start runs in the step, it also
    has `router_drift`: the share of the choices that the start did not make.

    The metrics of a compact teacher that does not list the whole vocabulary are called
    `kd_lower_bound` and `lssd_lower_bound`, see `streamed.CompactTeacher`.
    """

    def loss_sum(student, frozen_params, batch: Batch, scale):
        hidden, routing = run(forward, student, batch)
        of_teacher = {"teacher_hidden_TxE": None, "teacher_unembedding_ExV": None}
        if teacher is not None:
            of_teacher = teacher(frozen_params, batch)
        start_experts_NxTxK = of_teacher.pop("experts_NxTxK", None)
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
        of_layers = {}
        if routing is not None:
            own_T["router_entropy"] = jnp.mean(routing.entropy_T, axis=0)
            if start_experts_NxTxK is not None:
                own_T["router_drift"] = experts.drift(
                    routing.experts_TxK, start_experts_NxTxK
                )
            balance, num_tokens = jnp.mean(routing.balance), jnp.sum(mask_T)
            loss += load_balance * balance * num_tokens * scale
            of_layers = {
                "router_balance": (balance * num_tokens, num_tokens),
                "router_load_max": (
                    jnp.mean(routing.load_max) * num_tokens,
                    num_tokens,
                ),
            }
        of_tokens = mask_T, flatten(batch["source_ids"]), source_names
        metrics = metric_means(own_T, *of_tokens) | of_layers
        if teacher is not None:
            metrics |= drop_without_teacher(
                metric_means(values_T, *of_tokens), without_teacher
            )
        return loss, metrics

    def count(batch: Batch):
        counts = token_counts(batch, source_names)
        weights = (batch[f"{name}_weights"] for name in streamed.TokenWeights._fields)
        has_loss = functools.reduce(jnp.logical_or, (jnp.any(w != 0) for w in weights))
        return counts["tokens"][0], counts | loss_count(has_loss)

    return Objective(count, loss_sum)
