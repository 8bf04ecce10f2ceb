"""Pure steps: (state, frozen_params, batch) -> (state, metrics); `program` jits them.

`objectives.interface` defines batches and metrics.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mixcpt_jax.models import experts, transformer
from mixcpt_jax.models import lora as lora_lib
from mixcpt_jax.objectives import streamed, teachers
from mixcpt_jax.objectives.interface import (
    Batch,
    Metrics,
    Objective,
    flatten,
    run,
    with_soft_cap,
)
from mixcpt_jax.runtime.sharding import constrain, sum_over_slices
from mixcpt_jax.training.optimizer import Guarded, apply_updates, global_norm

# Compiler options for `jax.jit`, by platform.
COMPILER_OPTIONS = {
    # YNNPACK's matrix products are 10-15% slower than XLA's own for the head's shapes
    # (jax 0.10 and 0.12).
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": ""},
    # Gather weights completely before their product. In the compiler's cost model, a
    # product that passes pieces around makes Llama-3-8B's step on v5e:4x4 1.5 times as long
    # and takes 0.2 GiB more. Overlap gathers with computation; by default the compiler does
    # this only on v5e. In its cost model, Llama-3-8B's step then takes 2.02 s instead of
    # 2.15 s on v6e:4x4, and 12.27 s instead of 12.52 s on v5p:2x2x1.
    "tpu": {
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
        "xla_enable_async_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    },
    # Overlaps collectives with computation, as jax recommends for several GPUs; not timed.
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
}


class TrainState(NamedTuple):
    """All that training changes; the frozen model is not part of it."""

    step: jax.Array
    params: transformer.Params
    opt_state: Any


def make_train_step(
    objective: Objective,
    transforms: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulation_steps: int = 1,
    has_adapters: bool = False,
    param_specs: Any = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds the step of any phase.

    It is `(state, frozen_params, batch, teacher_params=None) -> (state, metrics)`. The
    frozen parameters are those of the model that the phase starts from: the base of
    adapters, the reference, and the teacher unless `teacher_params` are another one's. They
    may be None if nothing needs them.

    Args:
      objective: from `token_objective` or `preference_objective`.
      transforms: the optimizer; with `optimizer.skip_bad_steps` the metrics also have
        `skipped`, the steps skipped so far, and `skipped_in_a_row`, the most in a row.
      schedule: the learning rate, reported as a metric.
      accumulation_steps: microbatches per step; B must be a multiple.
      has_adapters: whether the state's parameters are adapters of `frozen_params`, not the
        whole student.
      param_specs: partition specs of the state's parameters; needed on several slices.
    """

    def loss_sum(params, frozen_params, teacher_params, batch: Batch, scale):
        student = params
        frozen_params, teacher_params = jax.lax.stop_gradient(
            (frozen_params, teacher_params)
        )
        if has_adapters:
            student = lora_lib.with_adapters(frozen_params, params)
        if teacher_params is None:
            teacher_params = frozen_params
        return objective.loss_sum(student, teacher_params, batch, scale)

    gradient = jax.value_and_grad(loss_sum, has_aux=True)

    def totals(batch: Batch, *arguments):
        """((loss, metrics), gradients): sums over the rows of all microbatches."""
        *models, scale = arguments

        def of_part(part):
            sums, grads = gradient(*models, part, scale)
            # Sums over microbatches are float32, whatever the dtype of the parameters.
            return sums, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

        if accumulation_steps == 1:
            return of_part(batch)
        microbatches = _split(batch, accumulation_steps)
        first = jax.tree.map(lambda x: x[0], microbatches)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_part, first)
        )
        found, _ = jax.lax.scan(
            lambda sums, part: (jax.tree.map(jnp.add, sums, of_part(part)), None),
            zeros,
            microbatches,
        )
        return found

    def train_step(state: TrainState, frozen_params, batch: Batch, teacher_params=None):
        # Compute the denominator before any microbatch runs.
        count, count_metrics = objective.count(batch)
        scale = 1.0 / jnp.maximum(count, 1.0)

        (loss, metrics), grads = sum_over_slices(
            totals,
            param_specs,
            batch,
            state.params,
            frozen_params,
            teacher_params,
            scale,
        )
        updates, opt_state = transforms.update(grads, state.opt_state, state.params)
        params = apply_updates(state.params, updates, state.step)
        one = jnp.ones(())
        metrics |= count_metrics
        scheduled = state.step
        if isinstance(opt_state, Guarded):
            # Skipped steps do not advance the schedule.
            scheduled -= state.opt_state.skipped
            metrics |= {
                "skipped": (opt_state.skipped, one),
                "skipped_in_a_row": (opt_state.longest, one),
            }
        metrics |= {
            "loss": (loss, count_metrics["loss"][1]),
            "grad_norm": (global_norm(grads), one),
            "learning_rate": (jnp.asarray(schedule(scheduled), jnp.float32), one),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def make_eval_step(
    forward: transformer.Forward,
    head_loss: Callable[
        ..., tuple[jax.Array, streamed.TokenStatistics]
    ] = streamed.head_loss,
    start_forward: transformer.Forward | None = None,
) -> Callable[..., dict[str, jax.Array]]:
    """Builds `(params, batch, start_params=None) -> {"ntp", "correct"}`, `[B, L]` float32.

    All scoring uses it: runs, `evaluate`, `lm-eval`, selection and the reference of pairs
    take their log-likelihoods, `-ntp` in nats, from this step. With `start_params` the
    result also has `kl`: KL(start || now) at each target, nats, in the same sweep. In a
    mixture of experts it then has `router_drift`: the share of each token's experts, over
    all layers, that the start did not choose.

    Args:
      forward: from `transformer.make_forward`.
      head_loss: `streamed.head_loss` with its settings.
      start_forward: the network of `start_params`; None: `forward`.
    """
    start = teachers.running_teacher(start_forward or forward)

    def eval_step(params, batch: Batch, start_params=None):
        of_start = {"teacher_hidden_TxE": None, "teacher_unembedding_ExV": None}
        if start_params is not None:
            of_start = start(start_params, batch)
        start_experts_NxTxK = of_start.pop("experts_NxTxK", None)
        hidden, routing = run(forward, params, batch)
        targets = flatten(batch["targets"])
        unembedding, vocab_first = transformer.unembedding(params)
        _, statistics = with_soft_cap(head_loss, forward)(
            hidden,
            unembedding,
            targets_T=targets,
            weights=streamed.TokenWeights.of(len(targets)),
            vocab_first=vocab_first,
            **of_start,
        )
        values = {"ntp": statistics.ntp, "correct": statistics.correct}
        if start_params is not None:
            values["kl"] = statistics.kd
        if routing is not None and start_experts_NxTxK is not None:
            values["router_drift"] = experts.drift(
                routing.experts_TxK, start_experts_NxTxK
            )
        return {k: v.reshape(batch["targets"].shape) for k, v in values.items()}

    return eval_step


def _split(batch: Batch, parts: int) -> Batch:
    """`[B, ...]` to `[parts, B / parts, ...]`, each part spread over all devices."""

    def split(x):
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
        return constrain(x.swapaxes(0, 1), None, "batch", *[None] * (x.ndim - 2))

    return jax.tree.map(split, batch)
