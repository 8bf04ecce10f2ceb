"""Runs the study of a book, cells side by side, one a core.

    python -m experiments.book.run [--data=../shared/data] [--part=...] [--workers=2]

As in the controlled study a cell whose record is in `results/` is not run again, and one
that was stopped goes on from its last checkpoint.
"""

import argparse
import pathlib
import shutil
from collections.abc import Iterator

from experiments import cells
from experiments.book import data
from experiments.book.config import Cell, make

RATES = (1e-4, 3e-4)
ARMS = ("plain", "mixture_ntp", "mixture_mft50", "mixture_lssd", "mixture_mft80")
# Those that more seeds tell apart, and that are aligned.
BEST = ("mixture_lssd", "mixture_mft80")
PARTS = ("arms", "seeds", "alignment")
RESULTS = pathlib.Path(__file__).parent / "results"


def plan(part: str, folder: str) -> Iterator[Cell]:
    """The cells of a part of the study."""
    if part == "arms":
        yield Cell(folder)
        for rate in reversed(RATES):
            for arm in ARMS:
                yield Cell(folder, arm, rate)
    elif part == "seeds":
        for seed in (1, 2):
            for rate in reversed(RATES):
                for arm in BEST:
                    yield Cell(folder, arm, rate, seed)
    else:
        for arm in BEST:
            yield Cell(folder, arm, RATES[0], align="dpo")


def run_cell(cell: Cell, workdir: str) -> cells.Record:
    """Runs a cell to its end, or goes on with it, and returns its record."""
    return cells.run(cell, make(cell), workdir)


def open_records(folder: pathlib.Path) -> cells.Records:
    return cells.Records(folder, lambda cell: cell.arm, make)


def name(cell: Cell) -> str:
    """A folder's name, unlike any other cell's and any other config's."""
    parts = [cell.arm, f"{cell.rate:g}", f"seed{cell.seed}", cell.align or "cpt"]
    return "-".join([*parts, cells.digest(make(cell))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="../shared/data", help="see README.md here")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--workers", type=int, default=0, help="0: one a core")
    parser.add_argument("--workdir", default="runs/book")
    parser.add_argument("--results", default=RESULTS)
    arguments = parser.parse_args()
    root = pathlib.Path(arguments.workdir)
    folder = root / "data"
    if not (folder / "done").exists():
        data.write(pathlib.Path(arguments.data), folder)
    records = open_records(pathlib.Path(arguments.results))
    revision = cells.revision()
    planned = [cell for part in arguments.part for cell in plan(part, str(folder))]
    calls = [
        (cell, str(root / name(cell))) for cell in planned if not records.has(cell)
    ]
    with cells.Workers(arguments.workers, root / "compiled") as workers:
        for (cell, workdir), record in workers.run(run_cell, calls):
            records.add(cell, record | {"revision": revision})
            shutil.rmtree(workdir)
            print(f"{name(cell)}: {record.get('failed', 'done')}", flush=True)


if __name__ == "__main__":
    main()
