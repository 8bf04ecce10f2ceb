"""Runs the German study, one cell after the other.

    python -m experiments.german.run --handbook=FOLDER --data=FOLDER [--part=...] [--tiny]

`--handbook` is the folder of the unpacked package `debian-handbook`, `--data` a folder of
general text, see `data.write`. A cell with a record in `results/` is not run again, and an
interrupted cell resumes from its last checkpoint.
"""

import argparse
import dataclasses
import itertools
import pathlib
import shutil
from collections.abc import Iterator

from experiments import cells
from experiments.german import data
from experiments.german.config import Cell, make

# At the first rate little is forgotten, at the others plain pre-training forgets.
RATES = (3e-4, 1e-3, 2e-3)
# By importance: the claims first, then similar arms.
CLAIMS = ("plain", "mixture_lssd20", "mixture_ntp", "self_replay")
NEIGHBOURS = (
    "plain_merged",
    "mixture_lssd20_merged",
    "mixture_lssd50",
    "ntp_kl",
    "lssd20",
    "mixture_mft80",
    "lora_lssd20",
    "mixture_lssd20_budget",
)
PARTS = ("arms", "seeds", "neighbours")
# Exams and clozes of which each answer is recorded, so that a change has an interval.
QUESTIONS = (
    "translation",
    "last_words",
    "arc_easy",
    "piqa",
    "openbook_qa",
    "lambada",
)
RESULTS = pathlib.Path(__file__).parent / "results"
HEALING_RATE = 2e-4
# A trial of the code: one rate of the claims, with few tokens and questions.
TINY = {"updates": 2, "healing_steps": 2, "questions": 4, "row_length": 64}


def healing(folder: str) -> Cell:
    """The cell that creates the start of all other cells."""
    return Cell(folder, arm="start", rate=HEALING_RATE)


def plan(part: str, folder: str, start: str) -> Iterator[Cell]:
    """The cells of a part of the study, in the order in which they run."""
    if part == "arms":
        yield Cell(folder, start)
        for rate in (RATES[1], RATES[0], RATES[2]):
            for arm in CLAIMS:
                yield Cell(folder, start, arm, rate)
        yield Cell(folder)  # the four-bit file, to see what healing changes
    elif part == "seeds":
        for seed in (1, 2):
            for rate in RATES:
                for arm in CLAIMS:
                    yield Cell(folder, start, arm, rate, seed)
    else:
        for rate in RATES:
            for arm in NEIGHBOURS:
                yield Cell(folder, start, arm, rate)


def trained(cell: Cell) -> Cell:
    """The cell whose training a cell measures: another one for a merge, else itself."""
    return dataclasses.replace(cell, arm=cell.arm.removesuffix("_merged"))


def run_cell(cell: Cell, workdir: str) -> cells.Record:
    """Runs or resumes a cell, and returns its record."""
    return cells.run(cell, make, workdir, () if cell.arm == "start" else QUESTIONS)


STUDY = cells.Study(
    make, run_cell, lambda cell: cell.arm, lambda record: f"{record['seconds']:.0f} s"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--handbook", required=True, help="the unpacked package")
    parser.add_argument("--data", required=True, help="general text, see `data.write`")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    arguments, root, results = cells.parse_flags(parser, "german", RESULTS)
    tiny = arguments.tiny
    settings = TINY if tiny else {}
    folder, start = root / "data", root / "start"
    data.write(pathlib.Path(arguments.handbook), pathlib.Path(arguments.data), folder)
    records = cells.Records(results, STUDY)
    model = start / "export/hf"
    if not (model / "config.json").exists():
        cell = dataclasses.replace(healing(str(folder)), **settings)
        record = run_cell(cell, str(start))
        records.add(cell, record | {"revision": cells.revision()})
    planned = {
        part: [
            dataclasses.replace(cell, **settings)
            for cell in plan(part, str(folder), str(model))
            if not tiny or cell.rate in (0, RATES[1])
        ]
        for part in PARTS
    }
    # One worker with all cores: two need twice the memory.
    for cell in (cell for part in arguments.part for cell in planned[part]):
        if records.has(cell):
            continue
        # A merge finds the end of training here, or trains again if it is gone.
        workdir = root / cells.name(trained(cell), STUDY)
        record = run_cell(cell, str(workdir)) | {"revision": cells.revision()}
        records.add(cell, record)
        print(f"{cells.name(cell, STUDY)}: {STUDY.summary(record)}", flush=True)
        others = itertools.chain.from_iterable(planned.values())
        users = (other for other in others if trained(other) == trained(cell))
        if all(records.has(user) for user in users):
            shutil.rmtree(workdir)


if __name__ == "__main__":
    main()
