"""Runs the study of a book, cells in parallel, one core each.

    python -m experiments.book.run --data=FOLDER [--part=...] [--workers=2]

As in the controlled study, a cell with a record in `results/` is not run again, and an
interrupted cell resumes from its last checkpoint.
"""

import argparse
import pathlib
import shutil
from collections.abc import Iterator

from experiments import cells
from experiments.book import data
from experiments.book.config import Cell, make

RATES = (1e-4, 3e-4)
ARMS = ("plain", "mixture_ntp", "mixture_mft50", "mixture_lssd", "mixture_lssd20")
# The arms with more seeds, and with the phases after CPT.
BEST = ("mixture_lssd", "mixture_lssd20")
PARTS = ("arms", "seeds", "alignment")
# Exams and clozes whose answers are recorded, so that changes have intervals.
QUESTIONS = (
    "read_modules",
    "unread_modules",
    "arc_easy",
    "piqa",
    "openbook_qa",
    "lambada",
)
RESULTS = pathlib.Path(__file__).parent / "results"


def plan(part: str, folder: str) -> Iterator[Cell]:
    """The cells of a part of the study."""
    if part == "arms":
        yield Cell(folder)
        for rate in reversed(RATES):
            for arm in ARMS:
                yield Cell(folder, arm, rate)
    elif part == "seeds":
        for rate in RATES:
            for seed in (1, 2):
                for arm in BEST:
                    yield Cell(folder, arm, rate, seed)
    else:
        for arm in BEST:
            yield Cell(folder, arm, RATES[0], align="dpo")


def run_cell(cell: Cell, workdir: str) -> cells.Record:
    """Runs or resumes a cell, and returns its record."""
    return cells.run(cell, make, workdir, QUESTIONS)


STUDY = cells.Study(
    make, run_cell, lambda cell: cell.arm, lambda record: f"{record['seconds']:.0f} s"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="see `data.write`")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--workers", type=int, default=0, help="0: one a core")
    parser.add_argument("--workdir", default="runs/book")
    parser.add_argument("--results", default=RESULTS)
    arguments = parser.parse_args()
    root = pathlib.Path(arguments.workdir)
    data.write(pathlib.Path(arguments.data), root / "data")
    records = cells.Records(pathlib.Path(arguments.results), STUDY)
    planned = [
        cell for part in arguments.part for cell in plan(part, str(root / "data"))
    ]
    with cells.Workers(arguments.workers, root / "compiled") as workers:
        for workdir in workers.run(STUDY, planned, root, records):
            shutil.rmtree(workdir)


if __name__ == "__main__":
    main()
