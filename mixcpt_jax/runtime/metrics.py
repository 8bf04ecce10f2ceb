"""Where a run's numbers go: metrics.jsonl, TensorBoard, W&B and the terminal.

`metrics.jsonl` is the record: one object per line, with its step. The others are copies.
Each has its own writer thread, so no step waits for them or fails with them: TensorBoard's
queue blocks while a disk hangs, and W&B waits for its server. Only the first host writes.
"""

import contextlib
import io
import json
import math
import queue
import tempfile
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ml_collections
import numpy as np
from absl import logging
from etils import epath
from rich import console as rich_console
from rich import progress as rich_progress

from mixcpt_jax.core import paths, small_files
from mixcpt_jax.core import text as text_lib
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.runtime import lease, record, terminal, timing

FILE = record.METRICS
SAMPLES_FILE = record.SAMPLES
SAMPLES_PAGE = "samples.md"
ITEMS_FILE = record.ITEMS
read = record.read
_WANDB_ID_FILE = "wandb_id"
_EVALUATION = "eval/"
_SECONDS_BETWEEN_LINES = 20.0
_SECONDS_BETWEEN_UPLOADS = 60.0
_MOST_WAITING = 10_000
_PATIENCE = 60.0


def evaluation_scalars(results: Mapping[str, float]) -> dict[str, float]:
    """The measures of an evaluation under their names in a row of metrics."""
    return {f"{_EVALUATION}{name}": value for name, value in results.items()}


def evaluation_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """`step` of a row, and its measures under their own names."""
    measures = ((k, v) for k, v in row.items() if k.startswith(_EVALUATION))
    names = {key.removeprefix(_EVALUATION): value for key, value in measures}
    return {"step": row["step"], **names}


def evaluations(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`evaluation_of` each row that has measures."""
    return [found for found in map(evaluation_of, rows) if len(found) > 1]


def means(metrics: dict[str, tuple[Any, Any]]) -> dict[str, float]:
    """The means of (sum, count) pairs on the host; omits pairs with a count of 0."""
    return {
        name: float(total) / float(count)
        for name, (total, count) in metrics.items()
        if count
    }


class Writer:
    """Appends scalars; use it as a context manager."""

    def __init__(
        self,
        workdir: epath.Path,
        config: ml_collections.ConfigDict,
        resume_step: int,
        run_config: dict[str, Any],
        is_first_host: bool = True,
    ):
        """Opens the run's files.

        Args:
          workdir: the phase's folder.
          config: `config.metrics`.
          resume_step: lines after this step are dropped, because their steps are trained
            again.
          run_config: the whole config, for W&B.
          is_first_host: the other hosts write nothing.
        """
        self._file = self._to_upload = None
        self._copies: dict[str, _Copy] = {}
        if not is_first_host:
            return
        self._workdir = workdir
        # The files are written from these rows and are not read again.
        self._rows = record.restore(workdir, resume_step, {})
        self._lines = {
            name: [record.text_of(row) for row in rows]
            for name, rows in self._rows.items()
        }
        file = workdir / FILE
        self._file = _lines_of(file)
        # A kill may have cut the last row short.
        times = "".join(map(record.text_of, record.read_timing(workdir)))
        paths.replace(workdir / record.TIMING, times)
        self._timing = _lines_of(workdir / record.TIMING)
        if config.tensorboard:
            folder = workdir / "tensorboard"
            if paths.is_remote(folder):
                self._to_upload = tempfile.TemporaryDirectory(prefix="mixcpt-events-")
                folder = self._to_upload.name
            self._copies["TensorBoard"] = _Copy(
                "TensorBoard",
                lambda: _TensorBoard(str(folder), resume_step, run_config),
            )
        if config.wandb_project:
            project = config.wandb_project
            self._copies["W&B"] = _Copy(
                "W&B", lambda: _Wandb(project, workdir, run_config)
            )

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, *exception) -> None:
        # Report the first error, not a later one.
        untold = () if kind is None else (InputError,)
        with contextlib.suppress(*untold):
            self.save()
        if self._file:
            self._file.close()
            self._timing.close()
        for copy in self._copies.values():
            copy.close()
        if self._to_upload:
            self._to_upload.cleanup()

    def save(self) -> None:
        """Returns when everything is written to its destination, also in a bucket.

        Raises:
          InputError: see `write`.
        """
        if self._file:
            self._check(must_ask=True)
            self._file.flush()
            self._timing.flush()
        for copy in self._copies.values():
            copy.put(lambda place: place.flush())
        for copy in self._copies.values():
            copy.wait()
        if self._to_upload:
            for file in epath.Path(self._to_upload.name).iterdir():
                paths.copy_file(file, self._workdir / "tensorboard" / file.name)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes one row; omits values that are not finite, which JSON cannot represent.

        Raises:
          InputError: another process owns the folder, or the file was deleted or changed by
            something else; then nothing is written.
        """
        if not self._file:
            return
        self._check()
        scalars = {k: float(v) for k, v in scalars.items() if math.isfinite(v)}
        line = record.text_of({"step": step, **scalars})
        self._lines[FILE].append(line)
        self._file.write(line)
        for copy in self._copies.values():
            copy.put(lambda place: place.write(step, scalars))

    def write_timing(self, row: Mapping[str, Any]) -> None:
        """Adds a row to `timing.jsonl`; its numbers go to the copies as `timing/...`."""
        if not self._file:
            return
        self._check()
        self._timing.write(record.text_of(row))
        numbers = {
            f"timing/{key}": value
            for key, value in row.items()
            if key not in ("step", "began", "time", "seconds")
        }
        for copy in self._copies.values() if numbers else ():
            copy.put(lambda place: place.write(row["step"], numbers))

    def write_items(self, step: int, items: Mapping[str, np.ndarray]) -> None:
        """Adds values per item to `items.jsonl`; their means are the step's measures.

        The report computes intervals of changes from them, because the items before and
        after are the same.

        Args:
          step: the measured step.
          items: `{text}/loss` and `{text}/kl` (nats), `{text}/correct` and
            `{text}/tokens`, sums over each example; `{exam}/exam` and
            `{pairs}/pair_accuracy`, correct or not.
        """
        if not self._file or not items:
            return
        self._check()
        row = {
            name: np.round(values, 4).tolist()
            if name.endswith(("/loss", "/kl"))
            else np.asarray(values, int).tolist()
            for name, values in items.items()
        }
        rows = [r for r in self._rows[ITEMS_FILE] if r["step"] != step]
        self._replace(ITEMS_FILE, [*rows, {"step": step, "items": row}])

    def write_samples(
        self, step: int, conversations: list[list[dict[str, str]]], answers: list[str]
    ) -> None:
        """Adds answers to `samples.jsonl`, and to `samples.md` below earlier answers."""
        if not self._file or not answers:
            return
        self._check()
        rows = self._rows[SAMPLES_FILE] + [
            {"step": step, "messages": messages, "answer": answer}
            for messages, answer in zip(conversations, answers, strict=True)
        ]
        self._replace(SAMPLES_FILE, rows)
        paths.replace(self._workdir / SAMPLES_PAGE, _samples_page(rows))
        texts = [
            (row["messages"][-1]["content"], row["answer"])
            for row in rows[-len(answers) :]
        ]
        for copy in self._copies.values():
            copy.put(lambda place: place.write_samples(step, texts))

    def texts(self) -> dict[str, str]:
        """Name of a file -> its text, for `record.restore`; {} on other hosts."""
        if not self._file:
            return {}
        return {name: "".join(lines) for name, lines in self._lines.items()}

    def _replace(self, name: str, rows: list[record.Row]) -> None:
        self._rows[name] = rows
        self._lines[name] = [record.text_of(row) for row in rows]
        paths.replace(self._workdir / name, "".join(self._lines[name]))

    def _check(self, must_ask: bool = False) -> None:
        lease.check(self._workdir, must_ask)
        self._file.check()


class _Copy:
    """A copy of the record, which a thread writes in order.

    If the copy fails, or makes no progress for a minute during `wait`, it logs one warning
    and stops writing.
    """

    def __init__(self, name: str, open_place: Callable[[], Any]):
        self._name = name
        self._tasks: queue.Queue = queue.Queue(_MOST_WAITING)
        self._is_given_up = False
        # A daemon thread, so the process can end while the copy hangs.
        threading.Thread(
            target=self._work, args=(open_place,), name=name, daemon=True
        ).start()

    def put(self, task: Callable[[Any], None]) -> None:
        """Queues `task`, which is called with the copy, and returns at once."""
        if self._is_given_up:
            return
        try:
            self._tasks.put_nowait(task)
        except queue.Full:
            self._give_up("is too slow")

    def wait(self) -> None:
        """Returns when all tasks are done, or when the copy was given up."""
        done = self._tasks.all_tasks_done
        with done:
            while left := self._tasks.unfinished_tasks:
                done.wait(_PATIENCE)
                if self._is_given_up:
                    return
                if self._tasks.unfinished_tasks == left:
                    self._give_up(f"has done nothing for {_PATIENCE:.0f} s")
                    return

    def close(self) -> None:
        self.put(lambda place: place.close())
        self.wait()
        if not self._tasks.full():
            self._tasks.put(None)

    def _give_up(self, why: str) -> None:
        if not self._is_given_up:
            self._is_given_up = True
            logging.warning(
                "%s %s; the run continues without it, and %s has all metrics",
                self._name,
                why,
                FILE,
            )

    def _work(self, open_place: Callable[[], Any]) -> None:
        place = None
        while task := self._tasks.get():
            try:
                if place is None:
                    place = open_place()
                if not self._is_given_up:
                    task(place)
            except Exception as error:
                self._give_up(f"fails ({type(error).__name__}: {error})")
            finally:
                self._tasks.task_done()


class _TensorBoard:
    """Scalars, samples, and the config as text."""

    def __init__(self, folder: str, resume_step: int, run_config: dict[str, Any]):
        import tensorboardX  # its import is slow

        self._writer = tensorboardX.SummaryWriter(folder, purge_step=resume_step + 1)
        if run_config and resume_step < 0:
            text = json.dumps(run_config, indent=2, default=str)
            self._writer.add_text("config", textwrap.indent(text, "    "), 0)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def write_samples(self, step: int, texts: list[tuple[str, str]]) -> None:
        for number, (prompt, answer) in enumerate(texts):
            self._writer.add_text(
                f"samples/{number}", f"{prompt}\n\n---\n\n{answer}", step
            )

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """Scalars, samples as a table, and the config; one W&B run per folder."""

    def __init__(self, project: str, workdir: epath.Path, run_config: dict[str, Any]):
        import wandb  # an optional package

        if not (workdir / _WANDB_ID_FILE).exists():
            (workdir / _WANDB_ID_FILE).write_text(uuid.uuid4().hex)
        self._wandb = wandb
        self._run = wandb.init(
            project=project,
            id=small_files.read_text(workdir / _WANDB_ID_FILE),
            name="/".join(workdir.parts[-2:]),
            config=run_config,
            resume="allow",
        )

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def write_samples(self, step: int, texts: list[tuple[str, str]]) -> None:
        table = self._wandb.Table(
            columns=["prompt", "answer"], data=[*map(list, texts)]
        )
        self._run.log({"samples": table}, step=step)

    def flush(self) -> None:
        """Does nothing: W&B sends by itself."""

    def close(self) -> None:
        self._run.finish()


class _Lines:
    """A file on a disk; each line is appended immediately."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._file = open(path, "a", buffering=1)  # noqa: SIM115
        self._size = path.stat().length

    def check(self) -> None:
        """Raises InputError if the file is not as this process left it."""
        _check_size(self._path, self._size)

    def write(self, text: str) -> None:
        self._file.write(text)
        self._size += len(text.encode())

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _lines_of(path: epath.Path) -> "_Lines | _Upload":
    return _Upload(path) if paths.is_remote(path) else _Lines(path)


class _Upload(io.StringIO):
    """The content of an object in a bucket; objects cannot be appended to.

    `flush` overwrites the object, and so does `write` once a minute.
    """

    def __init__(self, path: epath.Path):
        self._size = path.stat().length if path.exists() else None
        super().__init__("" if self._size is None else path.read_text())
        self.seek(0, io.SEEK_END)
        self._path = path
        self._uploaded = time.monotonic()

    def check(self) -> None:
        """Does nothing before `flush`: asking a bucket costs more than writing a line."""

    def write(self, text: str) -> int:
        size = super().write(text)
        if time.monotonic() - self._uploaded > _SECONDS_BETWEEN_UPLOADS:
            self.flush()
        return size

    def flush(self) -> None:
        if self._size is not None:
            _check_size(self._path, self._size)
        content = self.getvalue().encode()
        self._path.write_bytes(content)
        self._size = len(content)
        self._uploaded = time.monotonic()


def _check_size(path: epath.Path, size: int) -> None:
    try:
        found = path.stat().length
    except FileNotFoundError:
        found = None
    if found != size:
        problem = "was deleted" if found is None else f"has {found} bytes, not {size}"
        raise InputError(
            f"{path}: {problem}, which this run did not do, so it stops; run the same "
            "command to restore the file from a checkpoint and resume"
        )


class Progress:
    """A progress bar in a terminal; elsewhere a line every 20 s, or each step as JSON."""

    def __init__(self, name: str, first_step: int, num_steps: int, enabled: bool):
        self._console = rich_console.Console(stderr=True)
        self._name, self._num_steps = name, num_steps
        self._enabled = enabled
        self._pace = _Pace(num_steps)
        self._bar = _rich_bar(self._console, enabled)
        self._task = self._bar.add_task(
            text_lib.value(name), total=num_steps, completed=first_step, reached=""
        )

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()

    def update(
        self,
        step: int,
        scalars: Mapping[str, float],
        tokens_per_second: float,
        **speed: float,
    ) -> None:
        """Shows a finished step; its scalars become fields of a cluster's log."""
        # If nothing in a step contributes to the loss, there is no loss.
        reached = f"loss {scalars['loss']:.4f}" if "loss" in scalars else "no loss"
        if math.isfinite(tokens_per_second):  # unknown after the first step
            reached += f" {tokens_per_second:,.0f} tokens/s"
        if math.isfinite(speed.get("mfu", math.nan)):
            reached += f", MFU {speed['mfu']:.0%}"
        reached += self._pace.left(step)
        self._bar.update(self._task, completed=step, reached=reached)
        if self._console.is_terminal or not self._enabled:
            return
        if self._pace.is_due() or step == self._num_steps or terminal.is_json():
            text = f"{self._name} {step}/{self._num_steps} {reached}"
            rate = {"tokens_per_second": tokens_per_second}
            self.say(text, step=step, **scalars, **rate, **speed)

    @contextlib.contextmanager
    def measuring(self, num_batches: int) -> Iterator[Callable[[int], None]]:
        """A second bar; yields a function to call with the number of finished batches."""
        task = self._bar.add_task("measuring", total=num_batches, reached="")
        name = f"{self._name}: measuring"
        try:
            yield _update_of(self._bar, task, name, num_batches, self.say)
        finally:
            self._bar.remove_task(task)

    def say(self, text: str, **fields: Any) -> None:
        """Prints a line above the bar; the fields are for a cluster's log."""
        if not self._enabled:
            return
        if terminal.is_json() or not self._console.is_terminal:
            terminal.say(text, **fields)
        else:
            text = text_lib.lines(text)
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def bar(name: str, total: int, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """Shows the progress of work; yields a function to call with the amount done.

    Shows a bar in a terminal, elsewhere prints a line every 20 s.
    """
    console = rich_console.Console(stderr=True)
    say = terminal.say if enabled else None
    with _rich_bar(console, enabled, transient=True) as shown:
        task = shown.add_task(text_lib.value(name), total=total, reached="")
        yield _update_of(shown, task, name, total, say)


class _Pace:
    """Estimates the remaining time of some work, and when its next line is due."""

    def __init__(self, total: int, seconds_to_first: float = 0.0):
        self._total = total
        self._next_line = time.monotonic() + seconds_to_first
        self._first = None  # (done, time); the time before it includes compilation

    def left(self, done: int) -> str:
        """Such as ", 12 s left"; empty at the beginning and at the end."""
        now = time.monotonic()
        first_done, first_time = self._first = self._first or (done, now)
        if done in (first_done, self._total):
            return ""
        pace = (now - first_time) / (done - first_done)
        return f", {timing.duration(pace * (self._total - done))} left"

    def is_due(self) -> bool:
        now = time.monotonic()
        if now < self._next_line:
            return False
        self._next_line = now + _SECONDS_BETWEEN_LINES
        return True


def _rich_bar(
    console: rich_console.Console, enabled: bool, transient: bool = False
) -> rich_progress.Progress:
    """A rich bar; its tasks have a field `reached`, a string."""
    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[reached]}"),
        console=console,
        transient=transient,
        disable=not (enabled and console.is_terminal),
    )


def _update_of(
    shown: rich_progress.Progress,
    task: rich_progress.TaskID,
    name: str,
    total: int,
    say: Callable[[str], None] | None,
) -> Callable[[int], None]:
    """A function that updates a task of a bar, or prints lines if there is no bar."""
    pace = _Pace(total, seconds_to_first=_SECONDS_BETWEEN_LINES)

    def update(done: int) -> None:
        left = pace.left(done)
        shown.update(task, completed=done, reached=left.removeprefix(", "))
        if say and not shown.console.is_terminal and pace.is_due():
            say(f"{name} {done}/{total}{left}")

    return update


def track(done: Iterable[int], name: str, total: int) -> Iterator[int]:
    """Yields from `done`, the numbers of finished batches, and shows them."""
    with bar(name, total) as show:
        for number in done:
            show(number)
            yield number


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; the first column is text, the rest are numbers."""
    cells = [list(map(text_lib.value, row)) for row in (header, *rows)]
    # At least two characters, for a rule that ends with a colon.
    widths = [max(2, *map(len, column)) for column in zip(*cells, strict=True)]

    def line(row):
        first, *numbers = row
        padded = [first.ljust(widths[0])]
        padded += [n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(cells[0]), line(rules), *map(line, cells[1:])])


def _samples_page(rows: list[dict[str, Any]]) -> str:
    """Each prompt with its answers, the earliest first."""
    answers: dict[str, list[str]] = {}
    for row in rows:
        prompt = "\n\n".join(f"**{m['role']}** {m['content']}" for m in row["messages"])
        quoted = row["answer"].replace("\n", "\n> ")
        answers.setdefault(prompt, []).append(f"*step {row['step']}*\n\n> {quoted}")
    pages = ("\n\n".join([prompt, *texts]) for prompt, texts in answers.items())
    return "\n\n---\n\n".join(pages) + "\n"
