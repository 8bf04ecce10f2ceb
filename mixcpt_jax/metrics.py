"""Where a run's numbers go: metrics.jsonl, TensorBoard, W&B and the terminal.

`metrics.jsonl` is the record: one object per line, with its step. The others are copies
of it. Only the first host writes.
"""

import io
import json
import math
import tempfile
import time
from collections.abc import Iterable
from typing import IO, Any

import ml_collections
from etils import epath
from rich import console as rich_console
from rich import progress as rich_progress

from mixcpt_jax import paths

FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
SAMPLES_PAGE = "samples.md"
_SECONDS_BETWEEN_LINES = 20.0
_SECONDS_BETWEEN_UPLOADS = 60.0


def means(metrics: dict[str, tuple[Any, Any]]) -> dict[str, float]:
    """(sum, count) pairs, already on the host, to means; an empty count is left out."""
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
          resume_step: lines after this step belong to work that was lost with the
            process that did it, and are dropped.
          run_config: the whole config, for W&B.
          is_first_host: the other hosts write nothing.
        """
        self._file = self._tensorboard = self._wandb = self._to_upload = None
        if not is_first_host:
            return
        self._workdir = workdir
        for name in (FILE, SAMPLES_FILE):
            if (workdir / name).exists():
                rows = read(workdir, name)
                kept = [row for row in rows if row["step"] <= resume_step]
                _write_lines(workdir / name, kept)
        self._file = _append_to(workdir / FILE)
        if config.tensorboard:
            import tensorboardX  # its import is slow

            folder = workdir / "tensorboard"
            if paths.is_remote(folder):
                self._to_upload = tempfile.TemporaryDirectory(prefix="mixcpt-events-")
                folder = self._to_upload.name
            self._tensorboard = tensorboardX.SummaryWriter(
                str(folder), purge_step=resume_step + 1
            )
        if config.wandb_project:
            import wandb  # optional: only those who ask for it need it

            self._wandb = wandb.init(
                project=config.wandb_project, config=run_config, resume="allow"
            )

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception) -> None:
        if self._file:
            self.save()
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._to_upload:
            self._to_upload.cleanup()
        if self._wandb:
            self._wandb.finish()

    def save(self) -> None:
        """What was written is in its place when this returns, in a bucket too."""
        if self._file:
            self._file.flush()
        if self._to_upload:
            self._tensorboard.flush()
            for file in epath.Path(self._to_upload.name).iterdir():
                paths.copy_file(file, self._workdir / "tensorboard" / file.name)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes one row; what is not a finite number, which JSON lacks, is left out."""
        if not self._file:
            return
        scalars = {k: float(v) for k, v in scalars.items() if math.isfinite(v)}
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        if self._tensorboard:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(scalars, step=step)

    def write_samples(
        self, step: int, conversations: list[list[dict[str, str]]], answers: list[str]
    ) -> None:
        """Adds answers to `samples.jsonl`, and to `samples.md` beside earlier ones."""
        if not self._file or not answers:
            return
        rows = read(self._workdir, SAMPLES_FILE)
        rows += [
            {"step": step, "messages": messages, "answer": answer}
            for messages, answer in zip(conversations, answers, strict=True)
        ]
        _write_lines(self._workdir / SAMPLES_FILE, rows)
        paths.replace(self._workdir / SAMPLES_PAGE, _samples_page(rows))
        if self._tensorboard:
            for number, row in enumerate(rows[-len(answers) :]):
                text = f"{row['messages'][-1]['content']}\n\n---\n\n{row['answer']}"
                self._tensorboard.add_text(f"samples/{number}", text, step)


def _append_to(path: epath.Path) -> IO[str]:
    """A file to append lines to."""
    if paths.is_remote(path):
        return _Upload(path)
    return open(path, "a", buffering=1)  # each line at once


class _Upload(io.StringIO):
    """What an object, to which nothing can be appended, shall hold.

    It is written anew when asked to, and after a while by itself.
    """

    def __init__(self, path: epath.Path):
        super().__init__(path.read_text() if path.exists() else "")
        self.seek(0, io.SEEK_END)
        self._path = path
        self._uploaded = time.monotonic()

    def write(self, text: str) -> int:
        size = super().write(text)
        if time.monotonic() - self._uploaded > _SECONDS_BETWEEN_UPLOADS:
            self.flush()
        return size

    def flush(self) -> None:
        self._path.write_text(self.getvalue())
        self._uploaded = time.monotonic()


def read(workdir: epath.Path, name: str = FILE) -> list[dict[str, Any]]:
    """The rows of a JSONL file; a last line cut short by a kill is left out."""
    path = workdir / name
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Progress:
    """A progress bar in a terminal, a line now and then elsewhere."""

    def __init__(self, name: str, first_step: int, num_steps: int, enabled: bool):
        self._console = rich_console.Console(stderr=True)
        self._name, self._num_steps = name, num_steps
        self._next_line = 0.0
        self._enabled = enabled
        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("loss {task.fields[loss]:.4f}"),
            rich_progress.TextColumn("{task.fields[rate]:,.0f} tokens/s"),
            rich_progress.TimeRemainingColumn(),
            console=self._console,
            disable=not (enabled and self._console.is_terminal),
        )
        self._task = self._bar.add_task(
            name, total=num_steps, completed=first_step, loss=math.nan, rate=math.nan
        )
        self._first_update = None  # (step, time): what comes before it is compilation

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        self._bar.update(self._task, completed=step, loss=loss, rate=tokens_per_second)
        if self._console.is_terminal or not self._enabled:
            return
        now = time.monotonic()
        first_step, first_time = self._first_update = self._first_update or (step, now)
        if now >= self._next_line or step == self._num_steps:
            self._next_line = now + _SECONDS_BETWEEN_LINES
            done = step - first_step
            left = (now - first_time) / done * (self._num_steps - step) if done else 0.0
            self.say(
                f"{self._name} {step}/{self._num_steps} loss {loss:.4f}"
                + (
                    f" {tokens_per_second:,.0f} tokens/s, {left:.0f} s left"
                    if done
                    else ""
                )
            )

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._enabled:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; the first column is text, the rest are numbers."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

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


def _write_lines(path: epath.Path, rows: Iterable[dict[str, Any]]) -> None:
    paths.replace(path, "".join(json.dumps(row) + "\n" for row in rows))
