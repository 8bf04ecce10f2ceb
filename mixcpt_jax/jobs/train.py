"""The loop of every training phase: restore or start -> step -> log -> evaluate -> save.

A phase goes on from its own newest checkpoint, else it starts as `phase` says. A phase is
a format of its data and an objective; the loop is the same.
"""

import functools
import math
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from mixcpt_jax import config as config_lib
from mixcpt_jax.data import pipeline, tally
from mixcpt_jax.evaluation import evaluator
from mixcpt_jax.jobs import reference_outputs
from mixcpt_jax.models import transformer
from mixcpt_jax.objectives import (
    interface,
)
from mixcpt_jax.runtime import metrics, preemption, sharding, watchdog
from mixcpt_jax.training import checkpoint
from mixcpt_jax.training import phase as phase_lib
from mixcpt_jax.training.program import (
    Program,
    frozen_part,
    make_program,
    reads_teacher,
    starting_state,
    with_teacher,
)


@phase_lib.job
def run(phase: phase_lib.Phase) -> dict[str, Any]:
    """Runs one training phase to its end, or goes on where an earlier run stopped.

    Returns:
      What `results.json` holds: `before` and `after` (evaluation by measure),
      `mixture` (the sources as delivered), the speed, and `skipped` steps where any
      may be; nothing on other hosts than the first.

    Raises:
      InputError: config, data, weights or workdir are wrong.
      FloatingPointError: the loss is no longer finite.
      Preempted: SIGTERM has come; the state after the last step is saved.
    """
    _announce(phase)
    checkpoint.check_folder(phase.folder)
    data = phase.load_data(functools.partial(with_teacher, phase))
    with jax.set_mesh(phase.mesh):
        return _run(phase, data)


def _run(phase: phase_lib.Phase, data: pipeline.Data) -> dict[str, Any]:
    config, mesh, lora = phase.config, phase.mesh, phase.lora
    num_steps = data.num_steps
    program = make_program(phase, data)

    fingerprint = pipeline.fingerprint(data)
    provenance = phase.provenance(data.files)
    restored = checkpoint.restore(phase.folder, program.state, fingerprint, provenance)
    resumed, first_step, first_row = None, 0, 0
    if restored is not None:
        resumed, first_row, state = restored
        first_step = resumed
    # What an interrupted run has left to measure at the step that it ended with.
    is_measured, is_answered = (
        (False, False) if resumed is None else _is_recorded(phase, data, resumed)
    )
    frozen, references = None, {}
    if first_step < num_steps or not (is_measured and is_answered):
        frozen, references = _load_frozen(
            phase, data, program, fingerprint | phase.start_key
        )
    if config.preference.reference == "precomputed":
        data = pipeline.with_references(data, references)
    if resumed is None:
        state = starting_state(phase, program)
    guard = watchdog.Watchdog(config.train.timeout)
    measure = evaluator.Measure(phase, data, references, lora)

    def student() -> transformer.Params:
        return transformer.with_adapters(frozen, state.params) if lora else state.params

    batches = iter(
        pipeline.batches(
            config, data, first_row, jax.process_count(), jax.process_index()
        )
    )
    is_first_host = jax.process_index() == 0
    with (
        guard,
        preemption.Notice() as notice,
        checkpoint.Checkpoints(phase.folder, config.train.keep_last) as checkpoints,
        metrics.Writer(
            phase.folder,
            config.metrics,
            -1 if resumed is None else resumed,
            config.to_dict(),
            is_first_host,
        ) as writer,
        metrics.Progress(
            phase.name, first_step, num_steps, phase.shows_progress
        ) as progress,
    ):
        progress.say("\n".join([_mixture_table(data.report), *_limits(data)]))
        if reads_teacher(config, data):
            top_k = config.objective.teacher_top_k
            what = f"its top {top_k} tokens" if top_k else "its hidden states"
            progress.say(f"teacher: {what} are read, it is not run")

        clock = _Clock()

        def measure_texts(step: int) -> None:
            """Measures and writes, unless SIGTERM comes."""
            place = f"step {step}" if step else "the start"
            progress.say(f"{phase.name}: measuring {place}")
            with progress.measuring(measure.num_batches) as show:

                def on_batch(done: int) -> None:
                    guard.alive()
                    show(done)

                results = notice.unless_it_comes(measure, student(), on_batch)
            if results is None:
                return
            writer.write_items(step, measure.items)
            writer.write(step, _prefixed(results))
            text_losses = [v for k, v in results.items() if k.endswith("/loss")]
            mean = f", mean loss {np.mean(text_losses):.4f}" if text_losses else ""
            progress.say(
                f"{phase.name}: measured {place}{mean}", step=step, **_prefixed(results)
            )

        def answer_prompts(step: int) -> None:
            answers = notice.unless_it_comes(measure.answers, student())
            guard.alive()
            writer.write_samples(step, data.prompts, answers or [])

        if _is_measured(first_step, config, num_steps) and not is_measured:
            measure_texts(first_step)
        if _is_answered(first_step, config, num_steps) and not is_answered:
            answer_prompts(first_step)
        if notice.has_come(first_step):
            raise preemption.Preempted(f" after step {first_step}")

        pending = None  # (step, metrics on the device) not read yet
        skipped = 0

        def read(step: int, device_metrics: interface.Metrics) -> dict[str, float]:
            scalars = metrics.means(jax.device_get(device_metrics))
            guard.alive()
            _check_step(
                step,
                scalars,
                config.train.max_skipped,
                phase.folder,
                checkpoints.latest_step(),
            )
            return scalars

        def read_pending() -> None:
            nonlocal pending, skipped
            if pending is None:
                return
            step, device_metrics = pending
            pending = None
            scalars = read(step, device_metrics)
            rate = clock.rate(step, scalars["tokens"])
            writer.write(step, scalars | {"tokens_per_second": rate})
            progress.update(step, scalars, rate)
            if scalars.get("skipped", 0) > skipped:
                skipped = scalars["skipped"]
                progress.say(
                    f"{phase.name}: {skipped:.0f} steps skipped up to step {step}, "
                    f"whose gradient norm is {scalars['grad_norm']:.3g}"
                )

        for step in range(first_step + 1, num_steps + 1):
            batch = _anneal(next(batches), config.objective.anneal, step, num_steps)
            batch = _put_rows(batch, config, mesh)
            state, step_metrics = program.train_step(state, frozen, batch)
            notice.defer()
            # The device is busy with this step while the host reads the one before.
            read_pending()
            is_last = step == num_steps
            is_saved = is_last or _is_due(step, config.train.save_every)
            # What is saved is read first, so that no checkpoint holds a NaN.
            is_logged = is_saved or _is_due(step, config.train.log_every)
            if is_logged:
                pending = step, step_metrics
            if _is_measured(step, config, num_steps):
                read_pending()
                measure_texts(step)
                clock.restart(step)
            if _is_answered(step, config, num_steps):
                answer_prompts(step)
            is_stopped = notice.has_come(step)
            if is_saved or is_stopped:
                read_pending()
                if (
                    not is_logged
                ):  # Saved for the signal alone it is checked all the same.
                    read(step, step_metrics)
                writer.save()
                checkpoints.save(
                    state,
                    step,
                    first_row + (step - first_step) * config.data.batch_size,
                    phase.given.to_dict(),
                    fingerprint,
                    provenance,
                )
                guard.alive()
                clock.restart(step)
            if is_stopped:
                checkpoints.wait()
                raise preemption.Preempted(f" after step {step}")

    checkpoints.wait()
    return phase.finish(_results(phase.folder, data) if is_first_host else {})


def _load_frozen(
    phase: phase_lib.Phase, data: pipeline.Data, program: Program, key: dict[str, Any]
) -> tuple[transformer.Params | None, reference_outputs.References]:
    """What the steps need of the frozen model, and what it says about pairs ahead."""
    config = phase.config

    def load() -> transformer.Params:
        return phase.starting_params(phase.frozen_dtype)

    needed = program.frozen is not None
    frozen = frozen_part(phase, data)(load()) if needed else None
    references = {}
    if config.objective.kind == "preference":
        key = key | {f"pairs/{k}": v for k, v in pipeline.hashes(data.pairs).items()}
        references = reference_outputs.load(phase.folder, key)
        if references is None:
            references = reference_outputs.compute(
                phase.eval_step(), load() if frozen is None else frozen, config, data
            )
            reference_outputs.save(phase.folder, key, references)
    return frozen, references


def _anneal(
    batch: dict[str, np.ndarray], anneal: str, step: int, num_steps: int
) -> dict[str, np.ndarray]:
    """Weights of the batch of a step, see `config.objective.anneal`."""
    if anneal == "none":
        return batch
    share = (step - 1) / max(num_steps - 1, 1)
    if anneal == "from_ntp":
        share = 1 - share
    names = [f"{objective}_weights" for objective in config_lib.OBJECTIVES]
    moved = share * sum(batch[name] for name in names)
    scaled = {name: np.float32(1 - share) * batch[name] for name in names}
    scaled["ntp_weights"] += moved
    return batch | {k: v.astype(np.float32) for k, v in scaled.items()}


def _put_rows(batch: dict[str, np.ndarray], config, mesh) -> interface.Batch:
    """This host's rows of a global batch, to its devices."""
    where = sharding.batch_sharding(mesh)
    return {
        key: jax.make_array_from_process_local_data(
            where, value, (config.data.batch_size, *value.shape[1:])
        )
        for key, value in batch.items()
    }


class _Clock:
    """Tokens per second between two reads; the first interval holds the compilation."""

    def __init__(self):
        self._last = None

    def restart(self, step: int) -> None:
        """What passed since the last read was not training."""
        self._last = step, time.monotonic()

    def rate(self, step: int, tokens_per_step: float) -> float:
        now = time.monotonic()
        last, self._last = self._last, (step, now)
        if last is None:
            return math.nan
        return (step - last[0]) * tokens_per_step / (now - last[1])


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _is_measured(step: int, config, num_steps: int) -> bool:
    if step == 0:
        return config.train.eval_before
    return step == num_steps or _is_due(step, config.train.eval_every)


def _is_answered(step: int, config, num_steps: int) -> bool:
    return step == num_steps or (step == 0 and config.train.eval_before)


def _is_recorded(phase: phase_lib.Phase, data, step: int) -> tuple[bool, bool]:
    """Whether the run's record has the measures, and the answers, of a step."""
    # A row of measures has no learning rate, and may have nothing but its step.
    measured = any(
        row["step"] == step and "learning_rate" not in row
        for row in metrics.read(phase.folder)
    )
    answered = not data.prompts or any(
        row["step"] == step for row in metrics.read(phase.folder, metrics.SAMPLES_FILE)
    )
    if jax.process_count() > 1:
        # The first host's word: another may see the folder later.
        return tuple(
            multihost_utils.broadcast_one_to_all(np.array([measured, answered]))
        )
    return measured, answered


def _prefixed(results: dict[str, float]) -> dict[str, float]:
    return {f"eval/{key}": value for key, value in results.items()}


def _check_step(
    step: int,
    scalars: dict[str, float],
    max_skipped: int,
    folder: epath.Path,
    saved_step: int | None,
) -> None:
    """Raises FloatingPointError if training has broken down."""
    loss, norm = scalars.get("loss", 0.0), scalars["grad_norm"]
    in_a_row = scalars.get("skipped_in_a_row", 0)
    is_left_out = max_skipped and not math.isfinite(norm)
    if in_a_row <= max_skipped and (is_left_out or math.isfinite(loss + norm)):
        return
    saved = (
        "there is no checkpoint yet"
        if saved_step is None
        else (f"the last checkpoint is step {saved_step}")
    )
    skipped = f"{in_a_row:.0f} steps in a row skipped, " if in_a_row else ""
    raise FloatingPointError(
        f"step {step}: {skipped}loss {loss}, gradient norm {norm}; "
        f"{saved} in {folder}. Lower optimizer.learning_rate, lengthen "
        "optimizer.warmup_steps or look at the batch of that step"
    )


def _announce(phase: phase_lib.Phase) -> None:
    """Says how much is trained, and from which step."""
    config, adapters = phase.config, ""
    if phase.lora:
        trained = transformer.abstract_adapters(
            phase.model_config, phase.lora, config.model.param_dtype
        )
        size = sum(leaf.size for leaf in jax.tree.leaves(trained)) / 1e6
        adapters = f"{size:.2f} M in adapters, "
    num_steps = config.train.num_steps
    steps_text = f"{num_steps:,} steps" if num_steps else "to the end of the data"
    tokens = config.data.batch_size * config.data.row_length
    step, resumed = checkpoint.newest_step(phase.folder), ""
    if step is not None:
        of = f" of {num_steps:,}" if num_steps else ""
        resumed = f"resumes at step {step:,}{of} from {phase.folder}"
    phase.announce(f"{adapters}{tokens:,} tokens a step, {steps_text}", resumed)


def _mixture_table(report: list[dict[str, Any]]) -> str:
    """What is about to be read of each source."""
    columns = {
        "held out": "{held_out:,}",
        "samples": "{documents:,}",
        "tokens to learn": "{learnt_tokens:,}",
        "share asked": "{share_asked:.1%}",
        "delivered": "{share_delivered:.1%}",
        "epochs": "{epochs:.2f}",
        "padding": "{padding:.1%}",
    }
    used = [source for source in report if source["share_asked"]]
    table = metrics.table(
        ["source", *columns],
        (
            [source["name"], *(form.format(**source) for form in columns.values())]
            for source in used
        ),
    )
    notes = []
    for source in used:
        if source["prepared"]:
            notes.append(f"{source['name']}: read from what was prepared")
        notes += [f"{source['name']}: {line}" for line in tally.lines(source)]
    return "\n".join([table, *notes])


def _limits(data: pipeline.Data) -> list[str]:
    limited = "; ".join(data.limited)
    return [f"measured, to eval.max_tokens of each: {limited}"] if limited else []


def _results(folder: epath.Path, data: pipeline.Data) -> dict[str, Any]:
    """Collects the run's record, which also holds what an interrupted run wrote."""
    rows = metrics.read(folder)
    evaluations = [
        {"step": row["step"]}
        | {k.removeprefix("eval/"): v for k, v in row.items() if k.startswith("eval/")}
        for row in rows
        if any(key.startswith("eval/") for key in row)
    ]
    rates = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    skipped = [int(row["skipped"]) for row in rows if "skipped" in row]
    return {
        "before": next((e for e in evaluations if e["step"] == 0), None),
        "after": evaluations[-1] if evaluations else {},
        "tokens_per_second": float(np.median(rates)) if rates else None,
        "mixture": data.report,
    } | ({"skipped": skipped[-1]} if skipped else {})
