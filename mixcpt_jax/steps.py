"""Pure steps: (state, frozen_params, batch) -> (state, metrics), jitted by `train`.

A batch is a dict of `[B, L]` arrays: `tokens`, `targets`, `positions`, `segment_ids`,
`source_ids`, `loss_mask` (1 where the target is learnt) and a weight per objective,
`ntp_weights`, `lssd_weights`, `kd_weights`. A metric is a pair (sum, count), so sums
over microbatches, batches and hosts stay exact; the mean is taken when it is read.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mixcpt_jax import fused, model
from mixcpt_jax.optim import global_norm
from mixcpt_jax.sharding import constrain

# For `jax.jit`, by platform.
COMPILER_OPTIONS = {
    # YNNPACK's matrix products are 10-15% slower than XLA's own for the head's shapes
    # (jax 0.10 and 0.12).
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": ""},
    # Weights are gathered whole, ahead of their product. In the compiler's model a
    # product that passes them around in pieces makes the step of Llama-3-8B on v5e:4x4
    # half as long again, and it takes 0.2 GiB more.
    "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
}

Batch = dict[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]


class TrainState(NamedTuple):
    """What training changes, and all of it. The frozen teacher is not in here."""

    step: jax.Array
    params: model.Params
    opt_state: Any


def make_train_step(
    forward: model.Forward,
    teacher_forward: model.Forward | None,
    transforms: optax.GradientTransformation,
    schedule: optax.Schedule,
    source_names: tuple[str, ...],
    accumulation_steps: int = 1,
    head_loss: Callable[..., tuple[jax.Array, fused.TokenStatistics]] = fused.head_loss,
) -> Callable[[TrainState, model.Params, Batch], tuple[TrainState, Metrics]]:
    """Builds the step of any phase whose loss is a weighted sum over tokens.

    The loss is the sum over tokens of the weighted objectives, divided by the number
    of learnt tokens in the global batch; weights therefore keep their meaning when a
    source has weight 0 for some objective.

    Args:
      forward: the student, from `model.make_forward`.
      teacher_forward: the frozen teacher, or None when no objective needs one; then
        `frozen_params` is ignored.
      transforms: the optimizer.
      schedule: the learning rate, reported as a metric.
      source_names: names of the sources, in the order of `source_ids`.
      accumulation_steps: microbatches per step; B must be a multiple.
      head_loss: `fused.head_loss` with its settings.
    """

    def loss_sum(params, frozen_params, batch: Batch, scale):
        hidden = _flatten(forward(params, *_inputs(batch)))
        teacher_hidden = teacher_unembedding = None
        if teacher_forward is not None:
            frozen_params = jax.lax.stop_gradient(frozen_params)
            teacher_hidden = _flatten(teacher_forward(frozen_params, *_inputs(batch)))
            teacher_unembedding, _ = model.unembedding(frozen_params)
        unembedding, vocab_first = model.unembedding(params)
        weights = fused.TokenWeights(
            *(
                _flatten(batch[f"{name}_weights"]) * scale
                for name in fused.TokenWeights._fields
            )
        )
        loss, statistics = head_loss(
            hidden,
            unembedding,
            teacher_hidden,
            teacher_unembedding,
            _flatten(batch["targets"]),
            weights,
            vocab_first=vocab_first,
        )
        return loss, _token_metrics(
            statistics, batch, source_names, teacher_forward is not None
        )

    gradient = jax.value_and_grad(loss_sum, has_aux=True)

    def train_step(state: TrainState, frozen_params, batch: Batch):
        # The denominator is known before any microbatch runs.
        scale = 1.0 / jnp.maximum(jnp.sum(batch["loss_mask"], dtype=jnp.float32), 1.0)

        def totals(batch):
            (loss, metrics), grads = gradient(state.params, frozen_params, batch, scale)
            # Sums over microbatches are float32 whatever the parameters are.
            return loss, metrics, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

        if accumulation_steps == 1:
            loss, metrics, grads = totals(batch)
        else:
            microbatches = _split(batch, accumulation_steps)
            first = jax.tree.map(lambda x: x[0], microbatches)
            zeros = jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(totals, first)
            )
            (loss, metrics, grads), _ = jax.lax.scan(
                lambda sums, part: (jax.tree.map(jnp.add, sums, totals(part)), None),
                zeros,
                microbatches,
            )

        updates, opt_state = transforms.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        one = jnp.ones(())
        metrics |= {
            f"{prefix}tokens": (metrics[f"{prefix}ntp"][1], one)
            for prefix in ("", *(f"{source}/" for source in source_names))
        }
        metrics |= {
            "loss": (loss, one),
            "grad_norm": (global_norm(grads), one),
            "learning_rate": (jnp.asarray(schedule(state.step), jnp.float32), one),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def make_eval_step(
    forward: model.Forward,
    head_loss: Callable[..., tuple[jax.Array, fused.TokenStatistics]] = fused.head_loss,
) -> Callable[[model.Params, Batch], dict[str, jax.Array]]:
    """Builds `(params, batch) -> {"ntp", "correct"}`, `[B, L]` float32 per target."""

    def eval_step(params, batch: Batch):
        hidden = _flatten(forward(params, *_inputs(batch)))
        targets = _flatten(batch["targets"])
        weight = jnp.zeros(targets.shape, jnp.float32)
        unembedding, vocab_first = model.unembedding(params)
        _, statistics = head_loss(
            hidden,
            unembedding,
            None,
            None,
            targets,
            fused.TokenWeights(weight, weight, weight),
            vocab_first=vocab_first,
        )
        shape = batch["targets"].shape
        return {
            "ntp": statistics.ntp.reshape(shape),
            "correct": statistics.correct.reshape(shape),
        }

    return eval_step


def _inputs(batch: Batch):
    return batch["tokens"], batch["positions"], batch["segment_ids"]


def _flatten(x_BxLx: jax.Array) -> jax.Array:
    """`[B, L, ...]` to `[T, ...]`; whole rows stay on their device."""
    return x_BxLx.reshape(-1, *x_BxLx.shape[2:])


def _split(batch: Batch, parts: int) -> Batch:
    """`[B, ...]` to `[parts, B / parts, ...]`, each part spread over all devices."""

    def split(x):
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
        return constrain(x.swapaxes(0, 1), None, "batch", *[None] * (x.ndim - 2))

    return jax.tree.map(split, batch)


def _token_metrics(
    statistics: fused.TokenStatistics,
    batch: Batch,
    source_names: tuple[str, ...],
    has_teacher: bool,
) -> Metrics:
    """Means over learnt tokens, of the whole batch and of each source."""
    fields = fused.TokenStatistics._fields if has_teacher else ("ntp", "correct")
    mask_T = _flatten(batch["loss_mask"]).astype(jnp.float32)
    membership_TxS = mask_T[:, None] * jax.nn.one_hot(
        _flatten(batch["source_ids"]), len(source_names), dtype=jnp.float32
    )
    values_TxK = jnp.stack([getattr(statistics, name) for name in fields], axis=1)
    # Highest: a TPU would round the sums' terms to bfloat16.
    sums_SxK = jnp.matmul(membership_TxS.T, values_TxK, precision="highest")
    counts_S = membership_TxS.sum(0)
    metrics: Metrics = {}
    for k, field in enumerate(fields):
        metrics[field] = (sums_SxK[:, k].sum(), counts_S.sum())
        for s, source in enumerate(source_names):
            metrics[f"{source}/{field}"] = (sums_SxK[s, k], counts_S[s])
    return metrics
