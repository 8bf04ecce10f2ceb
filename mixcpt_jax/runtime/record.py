"""A phase's record: files of rows that it writes, and reads again when it resumes.

A row is a JSON object on its own line, with the step that it belongs to. Each checkpoint
adds a part to a copy of the files: the rows since the checkpoint before. It holds the
lengths and hashes of the files up to its step. A resumed run compares the files with these,
and restores a file that differs from the copy.
"""

import base64
import contextlib
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from absl import logging
from etils import epath

from mixcpt_jax.core import paths, small_files
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.core.small_files import RESTORE

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
# A part of the copy: `after` is the step of the part before it, or -1.
_PART: small_files.Shape = {"after": int, "files": {str: str}}
# Maximum bytes of the copy of a file.
_MAX_BYTES = 2**31
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
      copies: name of a file -> its text at that checkpoint. A file without a copy keeps
        its own rows.

    Returns:
      Name of a file -> its rows.

    Raises:
      InputError: a row is damaged, and there is no copy to restore it from.
    """
    return {
        name: _restore(workdir / name, step, copies.get(name))
        for name in (METRICS, SAMPLES, ITEMS)
    }


class Copy:
    """Writes a copy of a record in parts, so that a save costs what is new."""

    def __init__(self, folder: epath.Path):
        """
        Args:
          folder: of the parts, `STEP.json` each; it need not exist.
        """
        self._folder = folder
        self._last = -1
        self._lengths: dict[str, list[Any]] = {}

    def add(
        self, step: int, texts: Mapping[str, str], needed: Iterable[int]
    ) -> dict[str, list[Any]]:
        """Writes the part of a step.

        The first part of a process holds everything. Then parts of earlier processes are
        deleted, except those of checkpoints.

        Args:
          step: of the checkpoint that is about to be saved.
          texts: name of a file -> its text.
          needed: the steps of the checkpoints that exist.

        Returns:
          Name of a file -> its bytes and their SHA-256, for `read_copy`.
        """
        if not texts:
            return {}
        contents = {name: text.encode() for name, text in texts.items()}
        before = self._lengths.items()
        if any(
            _hash(contents.get(name, b"")[:size]) != digest
            for name, (size, digest) in before
        ):
            self._last, self._lengths = -1, {}
        if self._last < 0:
            _delete_unused(self._folder, needed)
        files = {}
        for name, content in contents.items():
            start, _ = self._lengths.get(name, (0, ""))
            files[name] = pack(content[start:])
            self._lengths[name] = [len(content), _hash(content)]
        self._folder.mkdir(parents=True, exist_ok=True)
        part = paths.to_json({"after": self._last, "files": files})
        paths.replace(_part(self._folder, step), part)
        self._last = step
        return dict(self._lengths)


def read_copy(
    workdir: epath.Path, folder: epath.Path, step: int, lengths: Mapping[str, list[Any]]
) -> dict[str, str]:
    """The files of a record as they were at a step: from themselves, else from the copy.

    Args:
      workdir: the phase's folder.
      folder: of the parts.
      step: of a checkpoint.
      lengths: what `Copy.add` returned for it.

    Raises:
      InputError: a file and its copy both differ from what was written.
    """
    texts, parts = {}, None
    for name, (size, digest) in lengths.items():
        if name not in _SHAPES:
            raise InputError(
                f"{folder}: {name!a:.80} is no file of a record; {RESTORE}"
            )
        content = b""
        with contextlib.suppress(InputError):
            content = small_files.read_bytes(
                workdir / name, most_bytes=small_files.MOST_BYTES_OF_ROWS
            )[:size]
        if _hash(content) != digest:
            parts = parts or _join(folder, step)
            content = parts.get(name, b"")
        if _hash(content) != digest:
            raise InputError(
                f"{workdir / name}: is not what was written up to step {step}, and neither "
                f"is its copy in {folder}; {RESTORE}"
            )
        texts[name] = content.decode()
    return texts


def _join(folder: epath.Path, step: int) -> dict[str, bytes]:
    """The files that a part and all parts before it make."""
    found: dict[str, list[bytes]] = {}
    for part in _chain(folder, step):
        for name, packed in part["files"].items():
            found.setdefault(name, []).append(unpack(packed, f"{folder}: {name}"))
    return {name: b"".join(reversed(contents)) for name, contents in found.items()}


def _chain(folder: epath.Path, step: int) -> list[dict[str, Any]]:
    """A part, and all parts before it, the last first."""
    parts = []
    while step >= 0:
        file = _part(folder, step)
        part = small_files.read_json(
            file, _PART, most_bytes=small_files.MOST_BYTES_OF_ROWS
        )
        if part["after"] >= step:
            raise InputError(f"{file}: is not before step {step}; {RESTORE}")
        parts.append(part)
        step = part["after"]
    return parts


def _delete_unused(folder: epath.Path, needed: Iterable[int]) -> None:
    """Deletes the parts that the copies at some steps do not have."""
    if not folder.exists():
        return
    used = set()
    for step in needed:
        used.add(step)
        with contextlib.suppress(InputError):  # reported when it is read
            used |= {part["after"] for part in _chain(folder, step)}
    names = {_part(folder, step).name for step in used}
    for file in folder.glob("*.json"):
        if file.name not in names:
            file.unlink()


def _part(folder: epath.Path, step: int) -> epath.Path:
    return folder / f"{step}.json"


def pack(content: bytes) -> str:
    """Bytes as a short text."""
    return base64.b64encode(zlib.compress(content)).decode()


def unpack(text: str, place: str) -> bytes:
    """The bytes that `pack` was given.

    Raises:
      InputError: the text is not from `pack`; the message begins with `place`.
    """
    try:
        return zlib.decompressobj().decompress(base64.b64decode(text), _MAX_BYTES)
    except (ValueError, zlib.error) as error:
        raise InputError(f"{place}: is damaged ({error}); {RESTORE}") from error


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


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
            "%s: its %d rows are of an attempt that ended before its first checkpoint, so "
            "the phase starts at step 0",
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
