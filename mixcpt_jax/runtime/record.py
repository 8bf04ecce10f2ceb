"""A phase's record: files of rows that it writes, and reads again when it resumes.

A row is a JSON object on its own line, with the step that it belongs to. A checkpoint holds
a copy of the rows up to its step. A resumed run compares the files with the copy, and
restores a file that differs.
"""

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath

from mixcpt_jax.core import paths, small_files
from mixcpt_jax.core.errors import InputError

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
ITEMS = "items.jsonl"
TIMING = "timing.jsonl"  # of this process's work, so no checkpoint holds a copy

Row = dict[str, Any]

_SHAPES: dict[str, small_files.Shape] = {
    METRICS: {"step": int, str: float},
    SAMPLES: {
        "step": int,
        "messages": [{"role": str, "content": str}],
        "answer": str,
    },
    ITEMS: {"step": int, "items": {str: [(float, None)]}},
    TIMING: {
        "step": int,
        "began": float,
        "time": float,
        "seconds": {str: float},
        str: float,
    },
}
_REMEDY = (
    "run the command that wrote it, which restores it from a checkpoint, or put back a "
    "copy of it, or delete the line"
)


def read(workdir: epath.Path, name: str = METRICS) -> list[Row]:
    """The rows of a file; a last line that a kill cut short is dropped.

    Raises:
      InputError: names the first line that is not a row.
    """
    rows, damage = _read(workdir / name)
    if damage:
        raise InputError(damage)
    return rows


def read_timing(workdir: epath.Path) -> list[Row]:
    """The rows of `timing.jsonl` before the first damaged one; no run needs them."""
    rows, damage = _read(workdir / TIMING)
    if damage:
        logging.warning("%s; it and the rows after it are left out", damage)
    return rows


def text_of(row: Row) -> str:
    """A row as a line of text."""
    return paths.to_json(row) + "\n"


def restore(
    workdir: epath.Path, step: int, copies: Mapping[str, str]
) -> dict[str, list[Row]]:
    """Restores a record to its state at a step.

    Rows after the step are dropped, because the run computes them again.

    Args:
      workdir: the phase's folder.
      step: of the checkpoint that the run resumes from; -1: none.
      copies: name of a file -> its rows in that checkpoint. A file without a copy keeps its
        own rows.

    Returns:
      Name of a file -> its rows.

    Raises:
      InputError: a row is damaged, and there is no copy to restore it from.
    """
    return {
        name: _restore(workdir / name, step, copies.get(name))
        for name in (METRICS, SAMPLES, ITEMS)
    }


def is_copy(name: str, text: str) -> bool:
    """Whether a text holds rows of a file of this name."""
    if name not in _SHAPES:
        return False
    rows, damage = _rows_in(text.encode(), name, name)
    return not damage and len(rows) == text.count("\n")


def is_whole(workdir: epath.Path, copies: Mapping[str, str]) -> bool:
    """Whether the files can be read and begin with the rows of the copies."""
    for name in (METRICS, SAMPLES, ITEMS):
        rows, damage = _read(workdir / name)
        if damage or _first_difference(rows, _rows_of(copies.get(name, ""))):
            return False
    return True


def _restore(path: epath.Path, step: int, copy: str | None) -> list[Row]:
    existed = path.exists()
    rows, damage = _read(path)
    kept = [row for row in rows if row["step"] <= step]
    if copy is not None:
        copied = _rows_of(copy)
        if number := _first_difference(rows, copied):
            found = (
                "is gone" if not existed else f"line {number} is not what was written"
            )
            logging.warning(
                "%s: %s; restored from the copy in checkpoint %d", path, found, step
            )
            kept = copied
        else:
            # Measures of the checkpoint's step may have been written after the checkpoint.
            later = rows[len(copied) :]
            kept = copied + [
                row for row in later if row["step"] == step and row not in copied
            ]
    elif damage and step >= 0 and len(kept) == len(rows):
        raise InputError(damage)
    elif step < 0 and rows:
        logging.warning(
            "%s: there is no checkpoint of the work that its %d rows are from; the run "
            "starts from the beginning",
            path,
            len(rows),
        )
    if existed or kept:
        paths.replace(path, "".join(map(text_of, kept)))
    return kept


def _first_difference(rows: list[Row], copied: list[Row]) -> int:
    """The first line, from 1, that differs from the copy; 0: the file begins with it."""
    for number, row in enumerate(copied, 1):
        if number > len(rows) or rows[number - 1] != row:
            return number
    return 0


def _read(path: epath.Path) -> tuple[list[Row], str]:
    """The rows before the first damaged line, and what is wrong with that line."""
    if not path.exists():
        return [], ""
    content = small_files.read_bytes(path, _REMEDY, small_files.MOST_BYTES_OF_ROWS)
    return _rows_in(content, path.name, str(path))


def _rows_in(content: bytes, name: str, place: str) -> tuple[list[Row], str]:
    *lines, rest = content.split(b"\n")
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        try:
            row = small_files.parse(line, f"{place}:{number}", _SHAPES[name], _REMEDY)
        except InputError as error:
            return rows, str(error)
        rows.append(row)
    with contextlib.suppress(InputError):  # a kill may have cut it short
        rows.append(small_files.parse(rest, place, _SHAPES[name]))
    return rows, ""


def _rows_of(text: str) -> list[Row]:
    return [json.loads(line) for line in text.splitlines()]
