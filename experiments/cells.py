"""What studies share: cells that are run once each, several side by side, and records.

A cell is a frozen dataclass with at least `arm`, `rate` and `seed`; what it means is its
config. A record is what came of it, plain enough for JSON.
"""

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
from typing import Any

import ml_collections

from mixcpt_jax import config as config_lib

Record = dict[str, Any]


def digest(config: ml_collections.ConfigDict) -> str:
    """A few characters that no config has which says something else."""
    text = json.dumps(config_lib.changed(config.to_dict()), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def revision() -> str:
    """The commit, with a plus where the code at hand differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "mixcpt_jax", "configs", "*.py")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def run(cell: Any, config: ml_collections.ConfigDict, workdir: str) -> Record:
    """Runs a cell's phases to their end, or goes on with them; returns its record.

    The record has the cell's fields, a digest of the config, hashes of the data that the
    first phase read, and of each phase what was measured at its end, its seconds and its
    speed, and its answers where it gives some: lists of (prompt, answer).
    """
    # Imported here: the process that hands out cells needs no jax.
    import jax

    from mixcpt_jax import main

    started = time.monotonic()
    record = dataclasses.asdict(cell) | {
        "config": digest(config),
        "jax": jax.__version__,
    }
    try:
        folders, results = main.run(config, workdir)
    except FloatingPointError as error:
        return record | {"failed": str(error)}
    finally:
        # Else a worker that runs a hundred cells keeps what it compiled for each.
        jax.clear_caches()
    names = config.phases or (cell.arm,)
    phases = {
        name: _phase_record(pathlib.Path(folder), results[key])
        for name, (key, folder) in zip(names, folders.items(), strict=True)
    }
    first = pathlib.Path(next(iter(folders.values())))
    files = json.loads((first / "provenance.json").read_text())["files"]
    return record | {
        "data": {name: "".join(hashes.values()) for name, hashes in files.items()},
        "phases": phases,
        "seconds": time.monotonic() - started,
    }


def _phase_record(folder: pathlib.Path, result: Record) -> Record:
    wanted = ("after", "seconds", "tokens_per_second", "selection")
    record = {key: result[key] for key in wanted if result.get(key) is not None}
    record["after"] = {
        key: float(f"{value:.5g}")
        for key, value in record.get("after", {}).items()
        if not key.endswith(("/perplexity", "step"))
    }
    samples = folder / "samples.jsonl"
    if samples.exists():
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        last = max(row["step"] for row in rows)
        record["answers"] = [
            (row["messages"][-1]["content"], row["answer"])
            for row in rows
            if row["step"] == last
        ]
    return record


class Records:
    """What is known of all cells: JSON files, each of the cells that share a group."""

    def __init__(
        self,
        folder: pathlib.Path,
        group: Callable[[Any], str],
        make: Callable[[Any], ml_collections.ConfigDict],
    ):
        """
        Args:
          folder: where the files are.
          group: cell -> name of its file.
          make: cell -> its config. A file holds the whole one of the cell added last.
        """
        self._folder, self._group, self._make = folder, group, make
        folder.mkdir(parents=True, exist_ok=True)

    def _file(self, cell: Any) -> pathlib.Path:
        return self._folder / f"{self._group(cell)}.json"

    def _read(self, cell: Any) -> list[Record]:
        file = self._file(cell)
        return json.loads(file.read_text())["cells"] if file.exists() else []

    def has(self, cell: Any) -> bool:
        """Whether a record of this cell, with this config, is there."""
        wanted = digest(self._make(cell))
        return any(record["config"] == wanted for record in self._read(cell))

    def add(self, cell: Any, record: Record) -> None:
        """Writes the record in the place of an earlier one of the same cell."""
        mine = dataclasses.asdict(cell)
        others = [
            r for r in self._read(cell) if any(r.get(k) != v for k, v in mine.items())
        ]
        ordered = sorted(
            [*others, record], key=lambda r: (r["seed"], r["rate"], repr(r))
        )
        content = {"config": json.loads(self._make(cell).to_json()), "cells": ordered}
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


class Workers:
    """Processes that run cells, each on a core of its own; a context manager."""

    def __init__(self, number: int, compiled: pathlib.Path):
        """
        Args:
          number: of processes; 0: one for each core.
          compiled: folder of compiled programs: what one seed compiles serves others.
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
        self._pool = concurrent.futures.ProcessPoolExecutor(
            number, context, _start_worker, (cores,)
        )

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(
        self, function: Callable[..., Record], calls: Iterable[tuple]
    ) -> Iterator[tuple[tuple, Record]]:
        """Yields each call's arguments with its result, in the order they are done."""
        running = {self._pool.submit(function, *call): call for call in calls}
        for done in concurrent.futures.as_completed(running):
            yield running[done], done.result()


def _start_worker(cores: multiprocessing.Queue) -> None:
    os.sched_setaffinity(0, {cores.get()})

    def follow() -> None:
        """Ends with the process that hands out cells, however that ended."""
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
