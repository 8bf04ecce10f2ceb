"""Pure steps: (state, frozen_params, batch) -> (state, metrics), jitted by `train`.

A batch is a dict of `[B, L]` arrays: `tokens`, `targets`, `positions`, `segment_ids`,
`source_ids`, `loss_mask` (1 where the target is learnt) and a weight per objective,
`ntp_weights` and so on, see `fused.TokenWeights`. Where the log-probabilities of a
reference are known ahead it also has them per segment, `reference_logps`, `[B, S]`.

A metric is a pair (sum, count), so sums over microbatches, batches and hosts stay exact;
the mean is taken when it is read.

Shape suffixes: B batch rows, L row length, T = B * L tokens, S segments of a row,
P = B * S / 2 pairs.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mixcpt_jax import fused, model
from mixcpt_jax.optim import Guarded, apply_updates, global_norm
from mixcpt_jax.sharding import constrain

# For `jax.jit`, by platform.
COMPILER_OPTIONS = {
    # YNNPACK's matrix products are 10-15% slower than XLA's own for the head's shapes
    # (jax 0.10 and 0.12).
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": ""},
    # Weights are gathered whole, ahead of their product. In the compiler's model a
    # product that passes them around in pieces makes the step of Llama-3-8B on v5e:4x4
    # half as long again, and it takes 0.2 GiB more.
    # What is gathered arrives beside work; of itself the compiler sees to that on v5e
    # alone. Llama-3-8B's step on v6e:4x4 then takes 2.02 instead of 2.15 s in the
    # compiler's model, on v5p:2x2x1 12.27 instead of 12.52.
    "tpu": {
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
        "xla_enable_async_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    },
}

Batch = dict[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]


class TrainState(NamedTuple):
    """What training changes, and all of it. The frozen model is not in here."""

    step: jax.Array
    params: model.Params
    opt_state: Any


class Objective(NamedTuple):
    """What a phase minimises.

    Attributes:
      count: `batch -> (number, metrics)`: how much the loss is a mean over, a float32
        scalar, and counts to report. It is asked of the global batch, before any
        microbatch runs. The metric `loss` is the mean of nothing, `(0, 0)`, where no
        part of the batch contributes to the loss, else `(0, 1)`.
      loss_sum: `(student, frozen_params, batch, scale) -> (loss, metrics)`: the sum over
        a (micro)batch times `scale`, and its metrics.
    """

    count: Callable[[Batch], tuple[jax.Array, Metrics]]
    loss_sum: Callable[..., tuple[jax.Array, Metrics]]


def make_train_step(
    objective: Objective,
    transforms: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulation_steps: int = 1,
    has_adapters: bool = False,
) -> Callable[[TrainState, model.Params, Batch], tuple[TrainState, Metrics]]:
    """Builds the step of any phase.

    Args:
      objective: from `token_objective` or `preference_objective`.
      transforms: the optimizer; with `optim.skip_bad_steps` the metrics also say how many
        steps were skipped so far, `skipped`, and how many at most in a row.
      schedule: the learning rate, reported as a metric.
      accumulation_steps: microbatches per step; B must be a multiple.
      has_adapters: the state's parameters are adapters of `frozen_params`; else they are
        the whole student.
    """

    def loss_sum(params, frozen_params, batch: Batch, scale):
        student = params
        if frozen_params is not None:
            frozen_params = jax.lax.stop_gradient(frozen_params)
        if has_adapters:
            student = model.with_adapters(frozen_params, params)
        return objective.loss_sum(student, frozen_params, batch, scale)

    gradient = jax.value_and_grad(loss_sum, has_aux=True)

    def train_step(state: TrainState, frozen_params, batch: Batch):
        # The denominator is known before any microbatch runs.
        count, count_metrics = objective.count(batch)
        scale = 1.0 / jnp.maximum(count, 1.0)

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
        params = apply_updates(state.params, updates, state.step)
        one = jnp.ones(())
        metrics |= count_metrics
        scheduled = state.step
        if isinstance(opt_state, Guarded):
            # The schedule does not count what is skipped.
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


# `(frozen_params, batch) -> the arguments of fused.head_loss that are the teacher's`.
Teacher = Callable[[model.Params, Batch], dict[str, Any]]


def running_teacher(
    forward: model.Forward, temperature: float = 1.0, soft_cap: float | None = None
) -> Teacher:
    """Runs the frozen model.

    Args:
      forward: from `model.make_forward`.
      temperature: what the logits are divided by.
      soft_cap: of the logits, before that; None: the network's own.
    """
    soft_cap = _soft_cap(forward) if soft_cap is None else soft_cap

    def view(frozen_params, batch: Batch):
        hidden = _flatten(forward(frozen_params, *_inputs(batch)))
        return _logits_from(hidden, frozen_params, temperature, soft_cap)

    return view


def prepared_teacher(
    dtype: str, temperature: float = 1.0, soft_cap: float | None = None
) -> Teacher:
    """Reads hidden states, `batch["teacher_hidden"]`: the bits of bfloat16, [B, L, E].

    Args:
      dtype: of the product with the frozen unembedding.
      temperature: what the logits are divided by.
      soft_cap: of the logits, before that.
    """

    def view(frozen_params, batch: Batch):
        bits = _flatten(batch["teacher_hidden"])
        hidden = jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(dtype)
        return _logits_from(hidden, frozen_params, temperature, soft_cap)

    return view


def compact_teacher() -> Teacher:
    """Reads `fused.CompactTeacher` from the batch; no frozen model is needed."""

    def view(frozen_params, batch: Batch):
        del frozen_params
        fields = fused.CompactTeacher._fields
        arrays = [_flatten(batch[f"teacher_{name}"]) for name in fields]
        compact = fused.CompactTeacher(*arrays)
        return {
            "teacher_hidden_TxE": None,
            "teacher_unembedding_ExV": None,
            "compact": compact._replace(ids=compact.ids.astype(jnp.int32)),
        }

    return view


def _logits_from(
    hidden_TxE: jax.Array,
    frozen_params: model.Params,
    temperature: float,
    soft_cap: float | None,
) -> dict[str, Any]:
    unembedding, _ = model.unembedding(frozen_params)
    # The temperature is not rounded to the dtype of the hidden states.
    cooled_TxE = hidden_TxE.astype(jnp.float32) / temperature
    view = {
        "teacher_hidden_TxE": cooled_TxE.astype(hidden_TxE.dtype),
        "teacher_unembedding_ExV": unembedding,
    }
    if soft_cap is not None:
        # cap tanh(t / cap) / temperature, with both numbers divided by it beforehand.
        view["teacher_soft_cap"] = soft_cap / temperature
    return view


def token_objective(
    forward: model.Forward,
    teacher: Teacher | None,
    source_names: tuple[str, ...],
    head_loss: Callable[..., tuple[jax.Array, fused.TokenStatistics]] = fused.head_loss,
    untaught: Collection[str] = (),
) -> Objective:
    """A weighted sum over tokens of the objectives of `fused.TokenWeights`.

    The sum is divided by the number of learnt tokens in the global batch; weights
    therefore keep their meaning when a source has weight 0 for some objective.

    Args:
      forward: the student, from `model.make_forward`.
      teacher: the frozen teacher, or None when no objective needs one.
      source_names: names of the sources, in the order of `source_ids`.
      head_loss: `fused.head_loss` with its settings.
      untaught: sources in the stream of which a prepared teacher holds nothing. They
        have no metrics of the teacher, and where there are any the whole batch has none.

    The metrics of a compact teacher that does not list the whole vocabulary are called
    `kd_lower_bound` and `lssd_lower_bound`, see `fused.CompactTeacher`.
    """

    def loss_sum(student, frozen_params, batch: Batch, scale):
        hidden = _flatten(forward(student, *_inputs(batch)))
        view = {"teacher_hidden_TxE": None, "teacher_unembedding_ExV": None}
        if teacher is not None:
            view = teacher(frozen_params, batch)
        unembedding, vocab_first = model.unembedding(student)
        weights = fused.TokenWeights(
            *(
                _flatten(batch[f"{name}_weights"]) * scale
                for name in fused.TokenWeights._fields
            )
        )
        loss, statistics = _capped(head_loss, forward)(
            hidden,
            unembedding,
            targets_T=_flatten(batch["targets"]),
            weights=weights,
            vocab_first=vocab_first,
            **view,
        )
        values_T = statistics._asdict()
        own_T = {name: values_T.pop(name) for name in ("ntp", "correct")}
        compact = view.get("compact")
        vocab_size = unembedding.shape[0 if vocab_first else 1]
        if compact is not None and compact.ids.shape[1] < vocab_size:
            for name in ("kd", "lssd"):
                values_T[f"{name}_lower_bound"] = values_T.pop(name)
        mask_T = _flatten(batch["loss_mask"]).astype(jnp.float32)
        of_tokens = mask_T, _flatten(batch["source_ids"]), source_names
        metrics = _means(own_T, *of_tokens)
        if teacher is not None:
            metrics |= _of_taught(_means(values_T, *of_tokens), untaught)
        return loss, metrics

    def num_tokens(batch: Batch):
        counts = _token_counts(batch, source_names)
        weights = (batch[f"{name}_weights"] for name in fused.TokenWeights._fields)
        has_loss = functools.reduce(jnp.logical_or, (jnp.any(w != 0) for w in weights))
        return counts["tokens"][0], counts | _loss_count(has_loss)

    return Objective(num_tokens, loss_sum)


def preference_objective(
    forward: model.Forward,
    reference_forward: model.Forward | None,
    source_names: tuple[str, ...],
    num_segments: int,
    preference_loss: Callable[..., tuple[jax.Array, jax.Array, jax.Array]],
    length_normalised: bool = False,
    log_probabilities: Callable[..., jax.Array] = fused.log_probabilities,
) -> Objective:
    """The mean over pairs of `losses.preference_loss`.

    Segments `2 i + 1` and `2 i + 2` of a row are the chosen and the rejected answer of a
    pair, each with its prompt; only learnt tokens count.

    Args:
      forward: the policy, from `model.make_forward`.
      reference_forward: the frozen reference; None where the batch has its
        `reference_logps`.
      source_names: names of the sources, in the order of `source_ids`.
      num_segments: of the row that has most; even.
      preference_loss: `losses.preference_loss` with its settings.
      length_normalised: log-probabilities are means over an answer's tokens, not sums.
      log_probabilities: `fused.log_probabilities` with its settings.
    """

    def answers(params, forward, batch: Batch):
        """Summed log-probability of each segment's learnt tokens, `[B, S]`."""
        unembedding, vocab_first = model.unembedding(params)
        logps_T = _capped(log_probabilities, forward)(
            _flatten(forward(params, *_inputs(batch))),
            unembedding,
            _flatten(batch["targets"]),
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
        return loss, _means(values_P, is_pair_P, source_ids_P, source_names)

    def num_pairs(batch: Batch):
        lengths_BxS = _sum_per_segment(batch["loss_mask"], batch, num_segments)
        count = jnp.sum(_pairs(lengths_BxS)[1] > 0, dtype=jnp.float32)
        counts = _token_counts(batch, source_names) | {"pairs": (count, jnp.ones(()))}
        return count, counts | _loss_count(count > 0)

    return Objective(num_pairs, loss_sum)


def make_eval_step(
    forward: model.Forward,
    head_loss: Callable[..., tuple[jax.Array, fused.TokenStatistics]] = fused.head_loss,
) -> Callable[[model.Params, Batch], dict[str, jax.Array]]:
    """Builds `(params, batch) -> {"ntp", "correct"}`, `[B, L]` float32 per target.

    The one scorer: runs, `evaluate`, the harness, selection and the reference of pairs
    all read their log-likelihoods, `-ntp` in nats, from it.

    Args:
      forward: from `model.make_forward`.
      head_loss: `fused.head_loss` with its settings.
    """

    def eval_step(params, batch: Batch):
        hidden = _flatten(forward(params, *_inputs(batch)))
        targets = _flatten(batch["targets"])
        unembedding, vocab_first = model.unembedding(params)
        _, statistics = _capped(head_loss, forward)(
            hidden,
            unembedding,
            None,
            None,
            targets,
            fused.TokenWeights.of(len(targets)),
            vocab_first=vocab_first,
        )
        shape = batch["targets"].shape
        return {
            "ntp": statistics.ntp.reshape(shape),
            "correct": statistics.correct.reshape(shape),
        }

    return eval_step


def make_teacher_step(
    forward: model.Forward,
    top_k: int = 0,
    temperature: float = 1.0,
    soft_cap: float | None = None,
) -> Callable[[model.Params, Batch], dict[str, jax.Array]]:
    """Builds `(params, batch) -> what a prepared teacher reads`, `[B, L, ...]` each.

    Args:
      forward: from `model.make_forward`.
      top_k: 0: hidden states, see `prepared_teacher`; else how many tokens are kept,
        see `compact_teacher`.
      temperature: what the logits are divided by; hidden states are left as they are.
      soft_cap: of the logits, before that; None: the network's own.
    """
    soft_cap = _soft_cap(forward) if soft_cap is None else soft_cap

    def teacher_step(params, batch: Batch):
        hidden = _flatten(forward(params, *_inputs(batch)))
        if top_k:
            unembedding, vocab_first = model.unembedding(params)
            compact = fused.compact_teacher(
                hidden,
                unembedding,
                _flatten(batch["targets"]),
                top_k,
                vocab_first=vocab_first,
                soft_cap=soft_cap,
                temperature=temperature,
            )
            arrays = {f"teacher_{k}": v for k, v in compact._asdict().items()}
        else:
            rounded = hidden.astype(jnp.bfloat16)
            bits = jax.lax.bitcast_convert_type(rounded, jnp.uint16)
            arrays = {"teacher_hidden": bits}
        shape = batch["targets"].shape
        return {k: v.reshape(*shape, *v.shape[1:]) for k, v in arrays.items()}

    return teacher_step


def _soft_cap(forward: model.Forward) -> float | None:
    """What the logits of a network are capped at; a bare function caps nothing."""
    return getattr(forward, "final_soft_cap", None)


def _capped(head: Callable[..., Any], forward: model.Forward) -> Callable[..., Any]:
    """`fused.head_loss`, or another head, with the soft cap of a network's logits."""
    cap = _soft_cap(forward)
    return head if cap is None else functools.partial(head, soft_cap=cap)


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


def _sum_per_segment(x_BxL: jax.Array, batch: Batch, num_segments: int) -> jax.Array:
    """`[B, S]`: the sum over each segment of a row, padding left out."""
    segments_S = jnp.arange(1, num_segments + 1)
    is_in_BxLxS = batch["segment_ids"][:, :, None] == segments_S[None, None]
    # Highest: a TPU would round the terms to bfloat16.
    return jnp.einsum("bl,bls->bs", x_BxL, is_in_BxLxS * 1.0, precision="highest")


def _pairs(x_BxS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The chosen and the rejected answers', `[P]` each."""
    return x_BxS[:, 0::2].reshape(-1), x_BxS[:, 1::2].reshape(-1)


def _means(
    values_N: dict[str, jax.Array],
    mask_N: jax.Array,
    source_ids_N: jax.Array,
    source_names: tuple[str, ...],
) -> Metrics:
    """Means over what is masked in, of the whole batch and of each source."""
    membership_NxM = mask_N[:, None] * jax.nn.one_hot(
        source_ids_N, len(source_names), dtype=jnp.float32
    )
    values_NxK = jnp.stack(list(values_N.values()), axis=1)
    # Highest: a TPU would round the sums' terms to bfloat16.
    sums_MxK = jnp.matmul(membership_NxM.T, values_NxK, precision="highest")
    counts_M = membership_NxM.sum(0)
    metrics: Metrics = {}
    for k, name in enumerate(values_N):
        metrics[name] = (sums_MxK[:, k].sum(), counts_M.sum())
        for m, source in enumerate(source_names):
            metrics[f"{source}/{name}"] = (sums_MxK[m, k], counts_M[m])
    return metrics


def _of_taught(metrics: Metrics, untaught: Collection[str]) -> Metrics:
    """Without those of sources that have no teacher, nor of a batch that may hold one."""
    return {
        name: metric
        for name, metric in metrics.items()
        if not untaught or ("/" in name and name.rpartition("/")[0] not in untaught)
    }


def _loss_count(has_loss: jax.Array) -> Metrics:
    """See `Objective.count`."""
    return {"loss": (jnp.zeros(()), has_loss.astype(jnp.float32))}


def _token_counts(batch: Batch, source_names: tuple[str, ...]) -> Metrics:
    """How many tokens are learnt, in the batch and of each source."""
    mask_T = _flatten(batch["loss_mask"]).astype(jnp.float32)
    source_ids_T = _flatten(batch["source_ids"])
    one = jnp.ones(())
    counts = {
        f"{source}/tokens": (jnp.sum(jnp.where(source_ids_T == i, mask_T, 0.0)), one)
        for i, source in enumerate(source_names)
    }
    return counts | {"tokens": (jnp.sum(mask_T), one)}
