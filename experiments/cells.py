"""Cells and records of the studies: runs each cell once, several in parallel.

A cell is a frozen dataclass with at least `arm`, `rate` and `seed`; a study maps it to a
config. A record holds its results as plain JSON values.
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from mixcpt_jax import config as config_lib
from mixcpt_jax.core import intervals

Record = dict[str, Any]

# Old defaults of settings whose default changed after the first records. A digest leaves
# out settings at their old defaults, so records keep their names and no cell runs again.
_DEFAULTS_OF_RECORDS = {
    "objective.ntp_weight": 0.0,
    "objective.lssd_weight": 1.0,
    "select.method": "format_alignment",
    "eval.max_tokens": 0,
}
# Settings that a digest leaves out at any value: limits, which change nothing that a cell
# computes, and the packing, which no study varies and whose default has changed.
_NOT_IN_DIGESTS = ("data.warn_epochs", "data.max_epochs", "data.packing")


class Study(NamedTuple):
    """How a study runs and describes its cells.

    Attributes:
      make: cell -> its config. It reads no files.
      run: `(cell, workdir) -> record`, see `run`; a function of a module, for workers.
      group: cell -> name of the file that its record is in.
      summary: record -> a few words, for the terminal.
    """

    make: Callable[[Any], ml_collections.ConfigDict]
    run: Callable[[Any, str], Record]
    group: Callable[[Any], str]
    summary: Callable[[Record], str]


def parse(cell_type: type, settings: str) -> Any:
    """A cell from `field=value,...`."""
    types = {field.name: field.type for field in dataclasses.fields(cell_type)}
    given = (pair.split("=", 1) for pair in settings.split(","))
    return cell_type(**{key: types[key](value) for key, value in given})


def digest(cell: Any, make: Callable[[Any], ml_collections.ConfigDict]) -> str:
    """A hash of a cell's config, wherever its files lie; defaults are not in it."""
    config = make(_without_folders(cell))
    settings = config_lib.changed(config.to_dict())
    for key in (*_DEFAULTS_OF_RECORDS, *_NOT_IN_DIGESTS):
        settings.pop(key, None)
    settings |= {
        key: config[key]
        for key, value in _DEFAULTS_OF_RECORDS.items()
        if config[key] != value
    }
    text = json.dumps(settings, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def name(cell: Any, study: Study) -> str:
    """The name of a cell's folder, unique per cell and config."""
    parts = (study.group(cell), f"seed{cell.seed}", digest(cell, study.make))
    return "-".join(parts)


def _without_folders(cell: Any) -> Any:
    """The same cell with paths cut to their last part."""
    fields = dataclasses.asdict(cell).items()
    paths = {k: v for k, v in fields if isinstance(v, str) and "/" in v}
    return dataclasses.replace(
        cell, **{key: pathlib.PurePath(path).name for key, path in paths.items()}
    )


def revision() -> str:
    """The commit, with a plus where the code at hand differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "mixcpt_jax", "configs", "*.py")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def run(
    cell: Any,
    make: Callable[[Any], ml_collections.ConfigDict],
    workdir: str,
    questions: Iterable[str] = (),
) -> Record:
    """Runs or resumes a cell's phases, and returns its record.

    The record has the cell's fields, the digest of its config, and hashes of the data of
    the first phase after generation. For each phase it has the measures at its end, its
    seconds and speed, the curve of a merge, what a generation wrote, what is spent of a
    budget, and its answers, if any, as lists of (prompt, answer). For each exam and cloze
    in `questions` it also has the outcome of every question at the end of each phase: "1"
    if it is correct, else "0".
    """
    # Imported here, because the main process does not need jax.
    import jax

    from mixcpt_jax import main

    started = time.monotonic()
    config = make(cell)
    record = dataclasses.asdict(_without_folders(cell)) | {
        "config": digest(cell, make),
        "jax": jax.__version__,
    }
    try:
        folders, results = main.run(config, workdir)
    except FloatingPointError as error:
        return record | {"failed": str(error)}
    finally:
        # Otherwise a worker keeps the compiled programs of all its cells.
        jax.clear_caches()
    names = config.phases or (cell.arm,)
    phases = {
        name: _phase_record(pathlib.Path(folder), results[key], questions)
        for name, (key, folder) in zip(names, folders.items(), strict=True)
    }
    first = next(folder for name, folder in folders.items() if name != "generate")
    provenance = pathlib.Path(first, "provenance.json").read_text()
    files = json.loads(provenance)["files"]
    return record | {
        "data": {name: "".join(hashes.values()) for name, hashes in files.items()},
        "phases": phases,
        "seconds": time.monotonic() - started,
    }


def _phase_record(
    folder: pathlib.Path, result: Record, questions: Iterable[str]
) -> Record:
    keys = "seconds", "tokens_per_second", "selection", "generated", "keep_budget"
    record = {key: result[key] for key in keys if result.get(key) is not None}
    record["after"] = _rounded(result.get("after") or {})
    if "curve" in result:
        record["curve"] = [_rounded(row) for row in result["curve"]]
    samples = folder / "samples.jsonl"
    if samples.exists():
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        last = max(row["step"] for row in rows)
        record["answers"] = [
            (row["messages"][-1]["content"], row["answer"])
            for row in rows
            if row["step"] == last
        ]
    items = folder / "items.jsonl"
    if questions and items.exists():
        rows = [json.loads(line) for line in items.read_text().splitlines()]
        # A phase whose budget is spent has evaluated later steps, too.
        end = result["after"].get("step", rows[-1]["step"])
        measured = next(row["items"] for row in rows if row["step"] == end)
        record["questions"] = {
            name: "".join(map(str, _answered(measured, name))) for name in questions
        }
    return record


def _rounded(measures: dict[str, float]) -> dict[str, float]:
    return {
        key: float(f"{value:.5g}")
        for key, value in measures.items()
        if not key.endswith(("/perplexity", "step"))
    }


def _answered(items: dict[str, list[float]], name: str) -> list[int]:
    """For each question of an exam or passage of a cloze, 1 if it is correct, else 0."""
    if f"{name}/exam" in items:
        return items[f"{name}/exam"]
    parts = items[f"{name}/correct"], items[f"{name}/tokens"]
    return [int(correct == tokens) for correct, tokens in zip(*parts, strict=True)]


def change(before: str, after: str) -> tuple[float, float, float]:
    """The change of correct answers in points, and its 95 % interval over the questions.

    Args:
      before, after: outcomes of the same questions, see `run`.
    """
    before_N, after_N = (np.array(list(text), int) for text in (before, after))
    low, high = intervals.change_of_share(before_N, after_N)
    return 100 * (after_N.mean() - before_N.mean()), 100 * low, 100 * high


class Records:
    """The records of all cells: JSON files, one per group of cells."""

    def __init__(self, folder: pathlib.Path, study: Study):
        self._folder, self._study = folder, study
        folder.mkdir(parents=True, exist_ok=True)

    def _file(self, cell: Any) -> pathlib.Path:
        return self._folder / f"{self._study.group(cell)}.json"

    def _read(self, cell: Any) -> list[Record]:
        file = self._file(cell)
        return json.loads(file.read_text())["cells"] if file.exists() else []

    def has(self, cell: Any) -> bool:
        """Whether there is a record of this cell with this config."""
        config = digest(cell, self._study.make)
        return any(record["config"] == config for record in self._read(cell))

    def remove(self, cell: Any) -> None:
        """Deletes the record of a cell with its config."""
        content = json.loads(self._file(cell).read_text())
        gone = digest(cell, self._study.make)
        content["cells"] = [r for r in content["cells"] if r["config"] != gone]
        self._write(cell, content)

    def add(self, cell: Any, record: Record) -> None:
        """Writes the record; replaces records of the same cell with other configs.

        The file also holds the whole config of this cell.
        """
        cell = _without_folders(cell)
        mine = {k: v for k, v in dataclasses.asdict(cell).items() if k != "start"}
        others = [
            r for r in self._read(cell) if any(r.get(k) != v for k, v in mine.items())
        ]
        ordered = sorted(
            [*others, record], key=lambda r: (r["seed"], r["rate"], repr(r))
        )
        config = json.loads(self._study.make(cell).to_json())
        self._write(cell, {"config": config, "cells": ordered})

    def _write(self, cell: Any, content: dict[str, Any]) -> None:
        temporary = self._file(cell).with_suffix(".incomplete")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.rename(self._file(cell))


def load(folder: pathlib.Path) -> list[Record]:
    """All records of a study."""
    return [
        record
        for file in sorted(folder.glob("*.json"))
        for record in json.loads(file.read_text())["cells"]
    ]


def parse_flags(
    parser: argparse.ArgumentParser, name: str, folder: pathlib.Path
) -> tuple[argparse.Namespace, pathlib.Path, pathlib.Path]:
    """The flags of a study, its working folder and the folder of its records.

    Args:
      parser: with the study's own flags; those that all studies have are added.
      name: of the study.
      folder: of the committed records.
    """
    parser.add_argument("--tiny", action="store_true", help="a quick trial of the code")
    parser.add_argument("--workdir", help=f"default: runs/{name}[_tiny]")
    parser.add_argument(
        "--results", help="default: results/ here, or in a tiny workdir"
    )
    flags = parser.parse_args()
    root = pathlib.Path(flags.workdir or f"runs/{name}{'_tiny' * flags.tiny}")
    results = flags.results or (root / "results" if flags.tiny else folder)
    return flags, root, pathlib.Path(results)


class Workers:
    """Processes that run cells, one core each; a context manager."""

    def __init__(self, number: int, compiled: pathlib.Path):
        """
        Args:
          number: of processes; 0: one for each core.
          compiled: folder of compiled programs, shared by all seeds.
        """
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
        os.environ["JAX_PLATFORMS"] = "cpu"
        context = multiprocessing.get_context("spawn")
        available = sorted(os.sched_getaffinity(0))
        cores = context.Queue()
        for core in available:
            cores.put(core)
        number = min(number or len(available), len(available))
        # Workers keep the code that they start with.
        self._revision = revision()
        self._pool = concurrent.futures.ProcessPoolExecutor(
            number, context, _start_worker, (cores,)
        )

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(
        self, study: Study, planned: Iterable[Any], root: pathlib.Path, records: Records
    ) -> Iterator[pathlib.Path]:
        """Runs the cells that have no record, and adds their records.

        Yields:
          The folder of each finished cell in `root`, see `name`.
        """
        missing = [cell for cell in planned if not records.has(cell)]
        running = {}
        for cell in missing:
            folder = root / name(cell, study)
            running[self._pool.submit(study.run, cell, str(folder))] = cell, folder
        for done in concurrent.futures.as_completed(running):
            cell, folder = running[done]
            record = done.result() | {"revision": self._revision}
            records.add(cell, record)
            words = record.get("failed") or study.summary(record)
            print(f"{folder.name}: {words}", flush=True)
            yield folder


def _start_worker(cores: multiprocessing.Queue) -> None:
    os.sched_setaffinity(0, {cores.get()})

    def follow() -> None:
        """Ends this process when the main process ends, in any way."""
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
