"""Runs the controlled study, several small cells side by side, one a core.

    python -m experiments.controlled.run [--part=core] [--tiny] [--workers=2]

A cell is one arm at one learning rate from one seed's base, run by the phases of
`mixcpt_jax.main`. Its record goes to `results/`, and a cell whose record is there is not
run again: the same command goes on where it was stopped.
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from typing import Any

from experiments.controlled import world
from experiments.controlled.config import ARMS, Cell, make

BASES = ("documents", "chat", "narrow")
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
RATE = 2e-3
CLAIMS = ("plain", "mixture_ntp", "mixture_lssd", "mixture_mft80")
BEST = ("mixture_mft80", "mixture_ntp")
PARTS = ("core", "arms", "selection", "shares", "narrow")
RESULTS = pathlib.Path(__file__).parent / "results"


def cells(part: str, seed: int) -> Iterator[Cell]:
    """The cells of a part of the study with one seed; worlds and starts are not set.

    A base that has read documents only cannot answer before SFT, so SFT follows every
    arm on it. DPO follows at one rate.
    """

    def sweep(base: str, arm: str, rates=RATES, **settings) -> Iterator[Cell]:
        for rate in rates:
            align = "sft" if base == "documents" else ""
            if part == "core" and rate == RATE:
                align = "dpo"
            cell = Cell("", arm, base, rate=rate, seed=seed, align=align)
            yield dataclasses.replace(cell, **settings)

    if part == "core":
        for base in ("chat", "documents"):
            for arm in CLAIMS:
                yield from sweep(base, arm)
    elif part == "arms" and seed < 3:
        for base in ("chat", "documents"):
            for arm in ARMS:
                if arm not in CLAIMS:
                    yield from sweep(base, arm)
    elif part == "selection" and seed < 3:
        for arm in BEST:
            for rule in ("random", "perplexity", "format_alignment"):
                for samples in (10, 50, 200):
                    yield from sweep(
                        "chat", arm, (RATE,), align="dpo", rule=rule, samples=samples
                    )
    elif part == "shares" and seed < 3:
        for arm in BEST:
            for share in (0.1, 0.3, 0.7, 0.9):
                yield from sweep("chat", arm, RATES[1:3], share=share)
    elif part == "narrow" and seed < 3:
        for arm in (*CLAIMS, "mixture_lssd20"):
            yield from sweep("narrow", arm)


def run_cell(cell: Cell, workdir: str, revision: str) -> dict[str, Any]:
    """Runs a cell to its end, or goes on with it, and returns its record."""
    # Imported here: the process that hands out cells needs no jax.
    import jax

    from mixcpt_jax import main

    config = make(cell)
    started = time.monotonic()
    record = dataclasses.asdict(cell) | {
        "config": _hash(config.to_json()),
        "revision": revision,
        "jax": jax.__version__,
    }
    try:
        folders, results = main.run(config, workdir)
    except FloatingPointError as error:
        return record | {"failed": str(error)}
    finally:
        # Else a worker that runs a hundred cells keeps what it compiled for each.
        jax.clear_caches()
    phases = {
        name if config.phases else cell.arm: _phase_record(
            pathlib.Path(folders[name]), result
        )
        for name, result in results.items()
    }
    first = pathlib.Path(next(iter(folders.values())))
    files = json.loads((first / "provenance.json").read_text())["files"]
    return record | {
        "data": {name: "".join(hashes.values()) for name, hashes in files.items()},
        "phases": phases,
        "seconds": time.monotonic() - started,
    }


def _phase_record(folder: pathlib.Path, result: dict[str, Any]) -> dict[str, Any]:
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
        config = json.loads((folder / "config.json").read_text())
        prompts = pathlib.Path(config["eval"]["prompts"]).read_text().splitlines()
        record["answers"] = grade(
            map(json.loads, prompts), (row["answer"] for row in rows)
        )
    return record


def grade(
    prompts: Iterable[dict[str, str]], answers: Iterable[str]
) -> dict[str, dict[str, float]]:
    """By group of prompts, the shares of answers in the wanted form and with the value."""
    groups: dict[str, list[tuple[bool, bool]]] = {}
    values = {v for words, _, _ in world.ATTRIBUTES.values() for v in words.split()}
    forms = {world.ANSWER.format(value=value) for value in values}
    for prompt, answer in zip(prompts, answers, strict=True):
        words = answer.replace(".", " ").split()
        marks = answer in forms, prompt["value"] in words
        groups.setdefault(prompt["group"], []).append(marks)
    return {
        group: {
            key: sum(column) / len(column)
            for key, column in zip(
                ("form", "value"), zip(*marks, strict=True), strict=True
            )
        }
        for group, marks in groups.items()
    }


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _revision() -> str:
    """The commit, with a plus where the code at hand differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "mixcpt_jax", "experiments/*.py")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


class Records:
    """What is known of all cells: a JSON file per base and arm."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _file(self, cell: Cell) -> pathlib.Path:
        return self._folder / f"{cell.base}-{cell.arm}.json"

    def _read(self, cell: Cell) -> list[dict[str, Any]]:
        file = self._file(cell)
        return json.loads(file.read_text())["cells"] if file.exists() else []

    def has(self, cell: Cell) -> bool:
        """Whether a record of this cell, with this config, is there."""
        wanted = _hash(make(cell).to_json())
        return any(record["config"] == wanted for record in self._read(cell))

    def add(self, cell: Cell, record: dict[str, Any]) -> None:
        """Writes the record in the place of an earlier one of the same cell."""
        mine = dataclasses.asdict(cell)
        others = [
            r for r in self._read(cell) if any(r[k] != v for k, v in mine.items())
        ]
        ordered = sorted(
            [*others, record], key=lambda r: (r["seed"], r["rate"], repr(r))
        )
        content = {"config": json.loads(make(cell).to_json()), "cells": ordered}
        temporary = self._file(cell).with_suffix(".incomplete")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.rename(self._file(cell))


def _start_worker(cores: multiprocessing.Queue) -> None:
    os.sched_setaffinity(0, {cores.get()})
    # What is compiled for one seed serves the others.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    os.environ["JAX_PLATFORMS"] = "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=["core"])
    parser.add_argument("--tiny", action="store_true", help="a look at the machinery")
    parser.add_argument("--workers", type=int, default=0, help="0: one a core")
    parser.add_argument("--workdir", help="default: runs/controlled[_tiny]")
    parser.add_argument(
        "--results", help="default: results/ here, or in a tiny workdir"
    )
    arguments = parser.parse_args()
    tiny = arguments.tiny
    root = pathlib.Path(arguments.workdir or f"runs/controlled{'_tiny' * tiny}")
    results = arguments.results or (root / "results" if tiny else RESULTS)
    records = Records(pathlib.Path(results))
    revision = _revision()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "compiled"))
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    available = sorted(os.sched_getaffinity(0))
    for core in available:
        cores.put(core)
    with concurrent.futures.ProcessPoolExecutor(
        min(arguments.workers or len(available), len(available)),
        context,
        _start_worker,
        (cores,),
    ) as workers:
        for part in arguments.part:
            for seed in range(1 if tiny else 5):
                _run_seed(part, seed, root, records, workers, revision, tiny)


def _run_seed(part, seed, root, records, workers, revision, tiny) -> None:
    """Runs the cells of a seed that have no record: first the bases, then the arms."""
    size = world.TINY if tiny else world.FULL
    folder = root / f"world-{seed}"
    if not (folder / "world.json").exists():
        world.write(folder, seed, size)
    bases = {
        base: Cell(str(folder), base=base, seed=seed, base_steps=20 if tiny else 800)
        for base in BASES
    }
    arms = [
        dataclasses.replace(
            cell,
            world=str(folder),
            start=str(root / _name(bases[cell.base])),
            domain_steps=6 if tiny else 56,
        )
        for cell in cells(part, seed)
        if not tiny or (cell.rate == RATE and cell.base == "documents")
    ]
    missing = [cell for cell in arms if not records.has(cell)]
    needed = [bases[base] for base in dict.fromkeys(c.base for c in missing)]
    # A base's record without its checkpoint is of no use.
    needed = [
        base
        for base in needed
        if not (records.has(base) and (root / _name(base)).exists())
    ]
    for some in (needed, missing):
        running = {
            workers.submit(run_cell, cell, str(root / _name(cell)), revision): cell
            for cell in some
        }
        for done in concurrent.futures.as_completed(running):
            cell, record = running[done], done.result()
            records.add(cell, record)
            if cell.arm != "base":
                shutil.rmtree(root / _name(cell))
            print(
                f"{_name(cell)}: {record.get('failed') or _summary(record)}", flush=True
            )


def _name(cell: Cell) -> str:
    """A folder's name, unlike any other cell's and any other config's."""
    parts = [cell.base, cell.arm, f"seed{cell.seed}"]
    if cell.arm != "base":
        parts += [f"{cell.rate:g}", cell.rule, str(cell.samples), f"{cell.share:g}"]
    return "-".join([*parts, _hash(make(cell).to_json())])


def _summary(record: dict[str, Any]) -> str:
    phase, last = list(record["phases"].items())[-1]
    shown = ("domain_use/exact", "untold_use/exact", "untold_memory/exact")
    values = ", ".join(f"{key} {last['after'][key]:.2f}" for key in shown)
    return f"{record['seconds']:.0f} s; after {phase}: {values}"


if __name__ == "__main__":
    main()
