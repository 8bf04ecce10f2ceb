"""Runs the controlled study, several small cells in parallel, one core each.

    python -m experiments.controlled.run [--part core] [--seeds 0 1] [--arms lssd] [--tiny]

A cell is one arm at one learning rate from the base of one seed, run by the phases of
`mixcpt_jax.main`. Its record goes to `results/`. A cell with a record is not run again: the
same command resumes an interrupted study.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator

from experiments import cells
from experiments.arms import ARMS
from experiments.controlled import world
from experiments.controlled.config import Cell, make

BASES = ("documents", "chat", "narrow")
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
RATE = 2e-3
CLAIMS = ("plain", "mixture_ntp", "mixture_lssd", "mixture_mft80")
DEFAULT = "mixture_lssd20"  # of `config`
BEST = ("mixture_mft80", "mixture_ntp")
# Further arms for the base to which general questions are new.
OF_DOCUMENTS = (
    "mixture_mft50",
    "mixture_lssd20",
    "lssd",
    "ntp_kl",
    "lssd_ntp",
    "lssd50_ntp",
    "lssd20_ntp",
    "replay",
)
# Arms of the part "keep", on the chat base: rates and number of seeds.
KEEP_RATES = RATES[1:]
KEEP = {
    "plain_merged": (RATES[2:], 5),
    "mixture_lssd20_merged": (RATES[3:], 5),
    "self_replay": (KEEP_RATES, 5),
    "self_replay_lssd20": (KEEP_RATES, 3),
    "comprehension": (KEEP_RATES, 3),
    "plain_teacher": (KEEP_RATES, 3),
    "plain_excess": (KEEP_RATES, 3),
    "mixture_ntp_teacher": (KEEP_RATES, 3),
    "mixture_ntp_excess": (KEEP_RATES, 3),
    "plain_budget": (KEEP_RATES, 5),
    "mixture_lssd20_budget": (KEEP_RATES[:2], 3),
    "mixture_lssd_longer": ((RATE,), 1),
    "mixture_lssd20_longer": ((RATE,), 1),
}
# Rates at which every arm forgets, one seed.
HIGH_RATES = (8e-3, 1.6e-2)
HIGH = ("plain", "mixture_ntp", "mixture_lssd20", "ntp_kl", "self_replay")
PARTS = ("core", "arms", "selection", "shares", "narrow", "keep", "high")
RESULTS = pathlib.Path(__file__).parent / "results"


def plan(part: str, seed: int) -> Iterator[Cell]:
    """The cells of a part of the study with one seed; worlds and starts are not set.

    A base trained on documents alone cannot answer before SFT, so SFT follows every arm
    on it. DPO follows at one rate.
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
    elif part == "arms":
        for base, arms in (("chat", ARMS), ("documents", OF_DOCUMENTS)):
            for arm in arms:
                seeds = 5 if (base, arm) == ("chat", DEFAULT) else 3
                if seed < seeds and arm not in CLAIMS and arm not in KEEP:
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
                yield from sweep("chat", arm, (RATE,), share=share)
    elif part == "narrow" and seed < 3:
        for arm in (*CLAIMS, "mixture_lssd20"):
            yield from sweep("narrow", arm)
    elif part == "keep":
        for arm, (rates, seeds) in KEEP.items():
            if seed < seeds:
                yield from sweep("chat", arm, rates)
    elif part == "high" and seed == 0:
        for arm in HIGH:
            yield from sweep("chat", arm, HIGH_RATES)


def run_cell(cell: Cell, workdir: str) -> cells.Record:
    """Runs or resumes a cell, and returns its record."""
    record = cells.run(cell, make, workdir)
    for phase in record.get("phases", {}).values():
        if "answers" in phase:
            lines = pathlib.Path(cell.world, "prompts.jsonl").read_text().splitlines()
            answers = (answer for _, answer in phase["answers"])
            phase["answers"] = grade(map(json.loads, lines), answers)
    return record


def grade(
    prompts: Iterable[dict[str, str]], answers: Iterable[str]
) -> dict[str, dict[str, float]]:
    """Group of prompts -> shares of answers in the required form and with the value."""
    groups: dict[str, list[tuple[bool, bool]]] = {}
    values = {v for words, _, _ in world.ATTRIBUTES.values() for v in words.split()}
    forms = {world.ANSWER.format(value=value) for value in values}
    for prompt, answer in zip(prompts, answers, strict=True):
        marks = answer in forms, prompt["value"] in re.findall(r"\w+", answer)
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


def _summary(record: cells.Record) -> str:
    phase, last = list(record["phases"].items())[-1]
    shown = ("domain_use/exact", "untold_use/exact", "untold_memory/exact")
    values = ", ".join(f"{key} {last['after'][key]:.2f}" for key in shown)
    return f"{record['seconds']:.0f} s; after {phase}: {values}"


STUDY = cells.Study(make, run_cell, lambda cell: f"{cell.base}-{cell.arm}", _summary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=["core"])
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--workers", type=int, default=0, help="0: one a core")
    arguments, root, results = cells.parse_flags(parser, "controlled", RESULTS)
    tiny = arguments.tiny
    records = cells.Records(results, STUDY)
    with cells.Workers(arguments.workers, root / "compiled") as workers:
        for part in arguments.part:
            for seed in arguments.seeds[: 1 if tiny else None]:
                planned = (c for c in plan(part, seed) if c.arm in arguments.arms)
                _run_seed(planned, seed, root, records, workers, tiny)


def _run_seed(planned, seed, root, records, workers, tiny) -> None:
    """Runs the cells of a seed that have no record: first the bases, then the arms."""
    folder = root / f"world-{seed}"
    world.write(folder, seed, world.TINY if tiny else world.FULL)
    steps = {"base_steps": 20, "domain_steps": 6} if tiny else {}
    bases = {base: Cell(str(folder), base=base, seed=seed, **steps) for base in BASES}
    starts = {base: root / cells.name(cell, STUDY) for base, cell in bases.items()}
    arms = [
        dataclasses.replace(
            cell, world=str(folder), start=str(starts[cell.base]), **steps
        )
        for cell in planned
        if not tiny or (cell.rate == RATE and cell.base == "documents")
    ]
    needed = {cell.base for cell in arms if not records.has(cell)}
    for base in sorted(needed):
        if records.has(bases[base]) and not starts[base].exists():
            # The record of a base needs its checkpoint.
            records.remove(bases[base])
    for _ in workers.run(
        STUDY, (bases[base] for base in sorted(needed)), root, records
    ):
        pass
    for workdir in workers.run(STUDY, arms, root, records):
        shutil.rmtree(workdir)


if __name__ == "__main__":
    main()
