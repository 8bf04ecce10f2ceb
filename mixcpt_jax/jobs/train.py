"""The loop of every training phase: restore or start -> step -> log -> evaluate -> save.

A phase resumes from its own newest checkpoint; without one, it starts as described in
`training.phase`. Phases differ in the format of their data and in their objective; the loop
is the same.
"""

import functools
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from mixcpt_jax import config as config_lib
from mixcpt_jax.data import pipeline, tally
from mixcpt_jax.evaluation import evaluator
from mixcpt_jax.models import lora as lora_lib
from mixcpt_jax.models import transformer
from mixcpt_jax.objectives.interface import Batch, Metrics
from mixcpt_jax.planning import utilization
from mixcpt_jax.runtime import (
    goodput,
    hosts,
    lease,
    metrics,
    preemption,
    record,
    sharding,
    timing,
    tracing,
    watchdog,
)
from mixcpt_jax.training import checkpoint
from mixcpt_jax.training import phase as phase_lib
from mixcpt_jax.training.budget import Budget
from mixcpt_jax.training.program import (
    Program,
    frozen_part,
    make_program,
    reads_teacher,
    starting_state,
    teacher_part,
    with_teacher,
)
from mixcpt_jax.training.steps import TrainState
from mixcpt_jax.training.teacher_outputs import check_replay

_STEP_TO_COMPARE_MEMORY = 10


@phase_lib.job
def run(phase: phase_lib.Phase) -> dict[str, Any]:
    """Runs one training phase to its end, or resumes it.

    Returns:
      The content of `results.json`: `before` and `after` (evaluation by measure), `mixture`
      (the sources as delivered), the speed, and `skipped` steps if steps may be skipped;
      empty on all hosts but the first.

    Raises:
      InputError: config, data, weights or workdir are wrong.
      FloatingPointError: the loss is no longer finite.
      Preempted: SIGTERM has arrived; the state after the last step is saved.
    """
    times = timing.Timing(_goodput_recorder(phase))
    _announce(phase)
    check_replay(phase)
    checkpoint.check_folder(phase.folder)
    data = phase.load_data(functools.partial(with_teacher, phase))
    with jax.set_mesh(phase.mesh):
        return _run(phase, data, times)


def _run(
    phase: phase_lib.Phase, data: pipeline.Data, times: timing.Timing
) -> dict[str, Any]:
    """The loop: fetch, dispatch, read the previous step's metrics, evaluate, save."""
    config, num_steps = phase.config, data.num_steps
    program = make_program(phase, data)
    with times.of("restoring"):
        start = _start(phase, data, program)
    data, state, budget = start.data, start.state, start.budget
    guard = watchdog.Watchdog(config.train.timeout)
    batches = iter(
        pipeline.batches(
            config, data, start.row, jax.process_count(), jax.process_index()
        )
    )
    with (
        guard,
        preemption.Guard() as preemption_guard,
        checkpoint.Checkpoints(phase.folder, config.train.keep_last) as checkpoints,
        metrics.Writer(
            phase.folder,
            config.metrics,
            start.step if start.is_resumed else -1,
            config.to_dict(),
            hosts.is_first(),
        ) as writer,
        metrics.Progress(
            phase.name, start.step, num_steps, phase.shows_progress
        ) as progress,
        tracing.Tracer(
            phase.folder, config.train.profile, config.train.profiler_port
        ) as tracer,
    ):
        use = utilization.Utilization(phase, data)
        log = _StepLog(phase, writer, progress, guard, checkpoints, times, use)
        writer.write_timing(times.row(start.step))
        evaluation = _Evaluation(
            phase, start, writer, progress, guard, preemption_guard
        )

        def save(step: int, state: TrainState) -> None:
            writer.save()
            checkpoints.save(
                state,
                step,
                start.row + (step - start.step) * config.data.batch_size,
                phase.given.to_dict(),
                start.fingerprint,
                start.provenance,
                writer.texts(),
            )
            checkpoints.keep(budget.end)

        _say_what_is_read(config, data, progress)
        with times.of("evaluation"):
            evaluation.run(start.step, state, skip=start.recorded)
        if preemption_guard.is_requested(start.step):
            raise preemption.Preempted(f"step {start.step}")
        checkpoints.keep(budget.end)
        if budget.limits and not start.is_resumed:
            with times.of("saving"):
                save(0, state)

        for step in range(start.step + 1, num_steps + 1):
            if budget.spent_at is not None:
                break
            times.begin_step(step)
            batch = _put_rows(next(batches), config, phase.mesh)
            tracer.before(step)
            times.enter("compilation" if step == start.step + 1 else "steps")
            state, step_metrics = program.train_step(
                state, start.frozen, batch, start.teacher
            )
            times.enter("steps")
            tracer.after(step, step_metrics)
            preemption_guard.defer()
            # The device runs this step while the host reads the metrics of the previous
            # one.
            log.read()
            is_evaluated = evaluation.is_due(step)
            is_saved = step == num_steps or _is_due(step, config.train.save_every)
            is_saved |= is_evaluated and bool(budget.limits)
            if is_saved or _is_due(step, config.train.log_every):
                log.put(step, step_metrics)
            if is_evaluated:
                log.read()
                with times.of("evaluation"):
                    evaluation.run(step, state)
                log.restart_clock(step)
            is_stopped = preemption_guard.is_requested(step)
            if (is_saved or is_stopped) and budget.spent_at is None:
                # Metrics are read before the save, so no checkpoint holds a NaN.
                log.require(step, step_metrics)
                times.enter("saving")
                save(step, state)
                guard.alive()
                log.restart_clock(step)
            if is_stopped:
                checkpoints.wait()
                writer.write_timing(times.row(step))
                raise preemption.Preempted(f"step {step}")

        times.enter("saving")
        checkpoints.wait()
        if budget.spent_at is not None:
            del state
            _go_back(phase, program, start, evaluation, progress)
        last = num_steps if budget.spent_at is None else budget.spent_at
        writer.write_timing(times.row(last))
        times.finish()
    if hosts.is_first():
        spent = timing.spent(record.read_timing(phase.folder))
        phase.say(timing.describe(spent))
    return phase.finish(
        _results(phase.folder, data, budget) if hosts.is_first() else {}
    )


class _Start(NamedTuple):
    """Where the loop begins: at the phase's newest checkpoint, or at step 0.

    Attributes:
      step, row: number of steps done, and of rows of the stream that they read.
      is_resumed: whether a checkpoint was restored.
      state: of the step.
      frozen, teacher: the frozen parameters that the step needs, see `Program`.
      references: the reference's log-probabilities of pairs, if computed ahead.
      start: the frozen start, if evaluations measure the KL from it.
      data: with these references in its rows.
      budget: of `train.keep_budget`, with the recorded evaluations.
      recorded: whether the record of an interrupted run already has the measures and the
        answers of `step`.
      fingerprint, provenance: what a checkpoint belongs to, see `Checkpoints.save`.
    """

    step: int
    row: int
    is_resumed: bool
    state: TrainState
    frozen: transformer.Params | None
    teacher: transformer.Params | None
    references: dict[str, np.ndarray]
    start: transformer.Params | None
    data: pipeline.Data
    budget: Budget
    recorded: tuple[bool, bool]
    fingerprint: dict[str, str]
    provenance: dict[str, Any]


def _start(phase: phase_lib.Phase, data: pipeline.Data, program: Program) -> _Start:
    """Restores the phase, or starts it from its weights."""
    fingerprint = pipeline.fingerprint(data)
    provenance = phase.provenance(data.files)
    restored = checkpoint.restore(
        phase.folder, program.state, fingerprint, provenance, phase.given
    )
    step, row, recorded = 0, 0, (False, False)
    budget = Budget(phase.config.train.keep_budget)
    if restored is not None:
        step, row, state = restored
        files = checkpoint.read_files(phase.folder, step)
        if hosts.is_first():
            lease.check(phase.folder, must_ask=True)
            record.restore(phase.folder, step, files)
        recorded = _recorded(phase, data, step)
        budget.replay(_recorded_evaluations(phase, budget.limits))
    frozen, teacher, references, start = None, None, {}, None
    if step < data.num_steps or not all(recorded) or budget.spent_at is not None:
        frozen, references, start = _load_frozen(phase, data, program)
    if step < data.num_steps and program.teacher is not None:
        teacher = teacher_part(phase, data)(phase.teacher_params())
    if phase.config.preference.reference == "precomputed":
        data = pipeline.with_references(data, references)
    if restored is None:
        state = starting_state(phase, program)
    return _Start(
        step,
        row,
        restored is not None,
        state,
        frozen,
        teacher,
        references,
        start,
        data,
        budget,
        recorded,
        fingerprint,
        provenance,
    )


def _go_back(phase, program: Program, start: _Start, evaluation, progress) -> None:
    """Ends a phase whose budget is spent with the last checkpoint within it."""
    budget = start.budget
    progress.say(
        f"{phase.name}: train.keep_budget is spent at step {budget.spent_at}; the phase "
        f"ends with step {budget.end}. A lower optimizer.learning_rate, or more weight on "
        "the start, learns more within the same budget"
    )
    checkpoint.set_aside(phase.folder, budget.end)
    if not start.data.prompts or evaluation.has_answered(budget.end):
        return
    restored = checkpoint.restore(
        phase.folder, program.state, start.fingerprint, start.provenance, phase.given
    )
    evaluation.answer(restored.step, restored.state)


class _StepLog:
    """Metrics of steps; each is read while the device runs the next step."""

    def __init__(self, phase, writer, progress, guard, checkpoints, times, use):
        self._phase, self._times, self._use = phase, times, use
        self._writer, self._progress = writer, progress
        self._guard, self._checkpoints = guard, checkpoints
        self._clock = _Clock()
        self._pending: tuple[int, Metrics] | None = None
        self._read_step = 0
        self._has_compared = False
        self._skipped = 0

    def put(self, step: int, device_metrics: Metrics) -> None:
        """Keeps the metrics of a step, on the device, for the next `read`."""
        self._pending = step, device_metrics

    def read(self) -> None:
        """Reads, checks, writes and shows the metrics from the last `put`.

        Raises:
          FloatingPointError: training has broken down.
        """
        if self._pending is None:
            return
        step, device_metrics = self._pending
        self._pending = None
        scalars = self._fetch(step, device_metrics)
        rate = self._clock.rate(step, scalars["tokens"])
        speed = self._use.of(rate)
        self._writer.write(step, scalars | {"tokens_per_second": rate})
        self._writer.write_timing(self._times.row(step, **speed))
        self._progress.update(step, scalars, rate, **speed)
        seen = speed.get("peak_memory_gib", 0.0)
        if seen and not self._has_compared and step >= _STEP_TO_COMPARE_MEMORY:
            self._has_compared = True
            planned = utilization.planned_memory(self._phase) / 2**30
            self._progress.say(
                f"memory: {seen:.1f} GiB of a device used, at most {planned:.1f} planned"
            )
        if scalars.get("skipped", 0) > self._skipped:
            self._skipped = scalars["skipped"]
            self._progress.say(
                f"{self._phase.name}: {self._skipped:.0f} steps skipped up to step "
                f"{step}, whose gradient norm is {scalars['grad_norm']:.3g}"
            )

    def require(self, step: int, device_metrics: Metrics) -> None:
        """Checks the metrics of a step before it is saved, logged or not.

        Raises:
          FloatingPointError: training has broken down.
        """
        self.read()
        if self._read_step < step:
            self._fetch(step, device_metrics)

    def restart_clock(self, step: int) -> None:
        """Excludes the time since the last step, which was not training."""
        self._clock.restart(step)

    def _fetch(self, step: int, device_metrics: Metrics) -> dict[str, float]:
        scalars = metrics.means(jax.device_get(device_metrics))
        self._guard.alive()
        _check_step(
            step,
            scalars,
            self._phase.config.train.max_skipped,
            self._phase.folder,
            self._checkpoints.latest_step(),
        )
        self._read_step = step
        return scalars


class _Evaluation:
    """Measures texts and answers prompts at the steps where that is due."""

    def __init__(self, phase, start: _Start, writer, progress, guard, preemption_guard):
        self._phase, self._start = phase, start
        self._writer, self._progress = writer, progress
        self._guard, self._preemption_guard = guard, preemption_guard
        self._measure = evaluator.Evaluator(
            phase, start.data, start.references, phase.lora, start.start
        )
        self._answered = {start.step} if start.recorded[1] else set()

    def is_due(self, step: int) -> bool:
        return any(self._due(step))

    def run(
        self, step: int, state: TrainState, skip: tuple[bool, bool] = (False, False)
    ) -> None:
        """Runs the evaluations that are due at a step; SIGTERM interrupts them.

        Args:
          step: steps done.
          state: after them.
          skip: whether the record has its measures, and its answers, already.
        """
        measured, answered = (
            due and not done for due, done in zip(self._due(step), skip, strict=True)
        )
        if measured:
            self._measure_texts(step, self._params(state))
        if answered:
            self.answer(step, state)

    def answer(self, step: int, state: TrainState) -> None:
        """Answers the prompts with the state after a step; SIGTERM interrupts it."""
        answers = self._preemption_guard.interruptible(
            self._measure.answers, self._params(state)
        )
        self._guard.alive()
        self._writer.write_samples(step, self._start.data.prompts, answers or [])
        self._answered.add(step)

    def has_answered(self, step: int) -> bool:
        return step in self._answered

    def _params(self, state: TrainState) -> transformer.Params:
        """All parameters of a state."""
        if self._phase.lora:
            return lora_lib.with_adapters(self._start.frozen, state.params)
        return state.params

    def _due(self, step: int) -> tuple[bool, bool]:
        """Whether to measure, and whether to answer."""
        train, is_last = self._phase.config.train, step == self._start.data.num_steps
        at_start = step == 0 and train.eval_before
        is_between = step > 0 and _is_due(step, train.eval_every)
        # Budgets are relative to the start.
        is_needed = step == 0 and bool(train.keep_budget)
        is_measured = at_start or is_needed or is_between or is_last
        return is_measured, at_start or is_last

    def _measure_texts(self, step: int, params: transformer.Params) -> None:
        name, place = self._phase.name, f"step {step}" if step else "the start"
        self._progress.say(f"{name}: measuring {place}")
        with self._progress.measuring(self._measure.num_batches) as show:

            def on_batch(done: int) -> None:
                self._guard.alive()
                show(done)

            results = self._preemption_guard.interruptible(
                self._measure, params, on_batch
            )
        if results is None:
            return
        self._writer.write_items(step, self._measure.items)
        scalars = metrics.evaluation_scalars(results)
        self._writer.write(step, scalars)
        budget = self._start.budget
        budget.observe(step, results)
        losses = [v for k, v in results.items() if k.endswith("/loss")]
        told = [f"mean loss {np.mean(losses):.4f}"] if losses else []
        if step and budget.limits:
            told.append(budget.describe(results))
        text = ", ".join([f"{name}: measured {place}", *told])
        self._progress.say(text, step=step, **scalars)


def _say_what_is_read(config, data: pipeline.Data, progress: metrics.Progress) -> None:
    progress.say("\n".join([_mixture_table(data.report), *_limits(data)]))
    if reads_teacher(config, data):
        top_k = config.objective.teacher_top_k
        what = f"its top {top_k} tokens" if top_k else "its hidden states"
        progress.say(f"teacher: {what} are read, it is not run")
    progress.say("the first evaluation and the first step compile their programs")


def _load_frozen(
    phase: phase_lib.Phase, data: pipeline.Data, program: Program
) -> tuple[transformer.Params | None, dict[str, np.ndarray], transformer.Params | None]:
    """The frozen parameters of the steps, the reference's log-probabilities, the start.

    The last is the whole starting model, if evaluations measure the KL from it.
    The log-probabilities cover measured pairs and, with
    `preference.reference="precomputed"`, training pairs: "pairs/NAME" or "sources/NAME" ->
    nats, float32 [examples].
    """
    config = phase.config

    load = functools.cache(lambda: phase.starting_params(phase.frozen_dtype))
    frozen = start = None
    if program.frozen is not None:
        frozen = frozen_part(phase, data)(load())
    if config_lib.measures_kl(config):
        start = load()
    references = {}
    if config.objective.kind == "preference":
        eval_step = phase.eval_step()
        pairs = {f"pairs/{name}": rows for name, rows in data.pairs.items()}
        if config.preference.reference == "precomputed":
            used = (rows for rows in data.packed if rows.source.share)
            pairs |= {f"sources/{rows.source.name}": rows for rows in used}
        for name, rows in pairs.items():
            nats, _, _ = evaluator.kept_sums(
                phase.folder / f"reference.{name.replace('/', '.')}.npz",
                phase.start_key,
                lambda batch: eval_step(load(), batch),
                rows,
                config.eval.batch_size,
            )
            references[name] = -nats.astype(np.float32)
    return frozen, references, start


def _put_rows(batch: dict[str, np.ndarray], config, mesh) -> Batch:
    """Puts this host's rows of a global batch on its devices."""
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
        """Excludes the time since the last read."""
        self._last = step, time.monotonic()

    def rate(self, step: int, tokens_per_step: float) -> float:
        now = time.monotonic()
        last, self._last = self._last, (step, now)
        if last is None:
            return math.nan
        return (step - last[0]) * tokens_per_step / (now - last[1])


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _recorded(phase: phase_lib.Phase, data, step: int) -> tuple[bool, bool]:
    """Whether the run's record has the measures and the answers of a step."""
    # A row of measures has no learning rate; it may hold only its step.
    measured = any(
        row["step"] == step and "learning_rate" not in row
        for row in metrics.read(phase.folder)
    )
    answered = not data.prompts or any(
        row["step"] == step for row in metrics.read(phase.folder, metrics.SAMPLES_FILE)
    )
    return tuple(hosts.of_first([measured, answered]).tolist())


def _recorded_evaluations(phase, limits: Mapping[str, float]) -> list[dict[str, Any]]:
    """The measures with a budget of each recorded evaluation, equal on all hosts."""
    rows = metrics.evaluations(metrics.read(phase.folder)) if limits else []
    if jax.process_count() > 1:
        names = sorted(limits)
        count = int(hosts.of_first(len(rows)))
        table = np.full((count, len(names) + 1), np.nan)
        for number, row in enumerate(rows[:count]):
            table[number] = [row["step"], *(row.get(n, np.nan) for n in names)]
        # As integers, because jax would round them to float32.
        bits = np.ascontiguousarray(hosts.of_first(table.view(np.uint32)))
        rows = [
            {"step": int(step)}
            | {n: v for n, v in zip(names, values, strict=True) if not np.isnan(v)}
            for step, *values in bits.view(np.float64).tolist()
        ]
    return rows


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


def _goodput_recorder(phase: phase_lib.Phase) -> goodput.Recorder | None:
    """The recorder of `metrics.goodput_job`, on the first host.

    Each phase is a job of its own, because its steps begin at 1.
    """
    job = phase.config.metrics.goodput_job
    if not job or not hosts.is_first():
        return None
    return goodput.Recorder(f"{job}-{phase.name}" if phase.name else job)


def _announce(phase: phase_lib.Phase) -> None:
    """Prints how much the phase trains, and from which step."""
    config, adapters = phase.config, ""
    if phase.lora:
        trained = lora_lib.abstract_adapters(
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
    planned = utilization.planned_memory(phase) / 2**30
    available = utilization.memory_of(phase.mesh.local_devices[0]) / 2**30
    phase.announce(
        f"{adapters}{tokens:,} tokens a step, {steps_text}, at most {planned:.1f} of "
        f"{available:.1f} GiB a device by formula",
        resumed,
    )


def _mixture_table(report: list[dict[str, Any]]) -> str:
    """A table of what the phase reads of each source."""
    columns = {
        "held out": "{held_out:,}",
        "samples": "{documents:,}",
        "loss tokens": "{loss_tokens:,}",
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
            notes.append(f"{source['name']}: read from data.prepared")
        found = tally.lines(source, source.get("examples"))
        notes += [f"{source['name']}: {line}" for line in found]
    return "\n".join([table, *notes])


def _limits(data: pipeline.Data) -> list[str]:
    limited = "; ".join(data.limited)
    return [f"measured, to eval.max_tokens of each: {limited}"] if limited else []


def _results(folder: epath.Path, data: pipeline.Data, budget: Budget) -> dict[str, Any]:
    """Collects results from the run's record, which survives interruptions."""
    rows = metrics.read(folder)
    if budget.spent_at is not None:
        rows = [row for row in rows if row["step"] <= budget.end]
    evaluations = metrics.evaluations(rows)
    rates = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    skipped = [int(row["skipped"]) for row in rows if "skipped" in row]
    return {
        "before": next((e for e in evaluations if e["step"] == 0), None),
        "after": evaluations[-1] if evaluations else {},
        "tokens_per_second": float(np.median(rates)) if rates else None,
        "mixture": data.report,
        **({"skipped": skipped[-1]} if skipped else {}),
        **({"keep_budget": budget.result()} if budget.limits else {}),
    }
