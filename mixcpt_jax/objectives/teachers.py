"""Teachers: where the target distribution of a token comes from.

A teacher runs in the step, or its outputs are read from a cache.

Shape suffixes: B batch rows, L row length, T = B * L tokens, S segments of a row,
P = B * S / 2 pairs.
"""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp

from mixcpt_jax.models import transformer
from mixcpt_jax.objectives import streamed
from mixcpt_jax.objectives.interface import (
    Batch,
    Metrics,
    flatten,
    model_inputs,
    run,
    soft_cap_of,
)

# `(frozen_params, batch) -> the teacher's arguments of streamed.head_loss`. If a teacher
# runs that is a mixture of experts, there is also `experts_NxTxK`: its tokens' experts.
Teacher = Callable[[transformer.Params, Batch], dict[str, Any]]


def running_teacher(forward: transformer.Forward) -> Teacher:
    """Runs the frozen model in the step; `forward` is from `transformer.make_forward`."""

    def teacher(frozen_params, batch: Batch):
        hidden, routing = run(forward, frozen_params, batch)
        of_router = {} if routing is None else {"experts_NxTxK": routing.experts_TxK}
        return _logits_from(hidden, frozen_params) | of_router

    return teacher


def prepared_teacher(dtype: str) -> Teacher:
    """Reads hidden states from `batch["teacher_hidden"]`: bfloat16 bits, [B, L, E].

    Args:
      dtype: of the product with the frozen unembedding.
    """

    def teacher(frozen_params, batch: Batch):
        bits = flatten(batch["teacher_hidden"])
        hidden = jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(dtype)
        return _logits_from(hidden, frozen_params)

    return teacher


def compact_teacher() -> Teacher:
    """Reads `streamed.CompactTeacher` from the batch; no frozen model is needed."""

    def teacher(frozen_params, batch: Batch):
        del frozen_params
        fields = streamed.CompactTeacher._fields
        arrays = [flatten(batch[f"teacher_{name}"]) for name in fields]
        compact = streamed.CompactTeacher(*arrays)
        return {
            "teacher_hidden_TxE": None,
            "teacher_unembedding_ExV": None,
            "compact": compact._replace(ids=compact.ids.astype(jnp.int32)),
        }

    return teacher


def _logits_from(
    hidden_TxE: jax.Array, frozen_params: transformer.Params
) -> dict[str, Any]:
    unembedding, vocab_first = transformer.unembedding(frozen_params)
    return {
        "teacher_hidden_TxE": hidden_TxE,
        "teacher_unembedding_ExV": unembedding,
        "teacher_vocab_first": vocab_first,
    }


def make_teacher_step(
    forward: transformer.Forward, top_k: int = 0, vocab_size: int | None = None
) -> Callable[[transformer.Params, Batch], dict[str, jax.Array]]:
    """Builds `(params, batch) -> teacher outputs`, arrays `[B, L, ...]` for a cache.

    Args:
      forward: from `transformer.make_forward`.
      top_k: 0: hidden states, see `prepared_teacher`; else the number of tokens to list,
        see `compact_teacher`.
      vocab_size: of `streamed.compact_teacher`.
    """

    def teacher_step(params, batch: Batch):
        hidden = flatten(forward(params, *model_inputs(batch)))
        if top_k:
            unembedding, vocab_first = transformer.unembedding(params)
            compact = streamed.compact_teacher(
                hidden,
                unembedding,
                flatten(batch["targets"]),
                top_k,
                vocab_first=vocab_first,
                vocab_size=vocab_size,
                soft_cap=soft_cap_of(forward),
            )
            arrays = {f"teacher_{k}": v for k, v in compact._asdict().items()}
        else:
            rounded = hidden.astype(jnp.bfloat16)
            bits = jax.lax.bitcast_convert_type(rounded, jnp.uint16)
            arrays = {"teacher_hidden": bits}
        shape = batch["targets"].shape
        return {k: v.reshape(*shape, *v.shape[1:]) for k, v in arrays.items()}

    return teacher_step


def drop_without_teacher(metrics: Metrics, without_teacher: Collection[str]) -> Metrics:
    """Drops teacher metrics of sources without one and, if there are any, the batch's."""
    return {
        name: metric
        for name, metric in metrics.items()
        if not without_teacher
        or ("/" in name and name.rpartition("/")[0] not in without_teacher)
    }
