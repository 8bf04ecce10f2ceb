"""Runs the German study, one cell after the other.

    python -m experiments.german.run --handbook=FOLDER --data=FOLDER [--part=...] [--tiny]

`--handbook` is the folder of the unpacked package `debian-handbook`, `--data` a folder of
general text, see `data.write`. A cell with a record in `results/` is not run again, and an
interrupted cell resumes from its last checkpoint.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator

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
# Arms, their rates and numbers of samples for the phases after CPT.
ALIGNED, ALIGNED_RATES = ("plain", "mixture_lssd20"), RATES[:2]
SAMPLES = (0, 10, 50, 200)
PARTS = ("arms", "seeds", "neighbours", "aligned")
# Exams and clozes of which each answer is recorded, so that a change has an interval.
QUESTIONS = (
    "translation",
    "last_words",
    "arc_easy",
    "piqa",
    "openbook_qa",
    "lambada",
)
EXAMS_AFTER_CPT = ("translation", "arc_easy", "piqa")
RESULTS = pathlib.Path(__file__).parent / "results"
HEALING_RATE = 2e-4
# A trial of the code: one rate of the claims, with few tokens and questions.
TINY = {"updates": 2, "healing_steps": 2, "questions": 4, "row_length": 64}


def healing(folder: str) -> Cell:
    """The cell that creates the start of all other cells."""
    return Cell(folder, arm="start", rate=HEALING_RATE)


def plan(part: str, start: Cell, root: pathlib.Path) -> Iterator[Cell]:
    """The cells of a part of the study, in the order in which they run.

    Args:
      part: of `PARTS`.
      start: the cell that measures the healed model.
      root: folder of the cells' runs.
    """
    cell = functools.partial(dataclasses.replace, start)
    if part == "arms":
        yield start
        for rate in (RATES[1], RATES[0], RATES[2]):
            for arm in CLAIMS:
                yield cell(arm=arm, rate=rate)
        yield cell(start="")  # the four-bit file, to see what healing changes
    elif part == "seeds":
        for seed in (1, 2):
            for rate in RATES:
                for arm in CLAIMS:
                    yield cell(arm=arm, rate=rate, seed=seed)
    elif part == "neighbours":
        for rate in RATES:
            for arm in NEIGHBOURS:
                yield cell(arm=arm, rate=rate)
    else:
        for rate in ALIGNED_RATES:
            for arm in ALIGNED:
                training = cell(arm=arm, rate=rate)
                folder = str(root / cells.name(training, STUDY))
                for samples in SAMPLES:
                    yield dataclasses.replace(training, trained=folder, samples=samples)


def trained(cell: Cell) -> Cell:
    """The cell whose training a cell uses: another one for a merge, and after CPT."""
    arm = cell.arm.removesuffix("_merged")
    return dataclasses.replace(cell, arm=arm, trained="", samples=0)


def run_cell(cell: Cell, workdir: str) -> cells.Record:
    """Runs or resumes a cell, and returns its record."""
    if not cell.trained:
        return cells.run(cell, make, workdir, () if cell.arm == "start" else QUESTIONS)
    return _run_aligned(cell, workdir)


def _run_aligned(cell: Cell, workdir: str) -> cells.Record:
    """Runs the phases after CPT, and CPT if its checkpoint is gone.

    In the record, answers are outcomes, as the questions are: whether each is in the form
    that its prompt asks for, and whether it is right.
    """
    training = cells.run(trained(cell), make, cell.trained)
    if "failed" in training:
        return training
    record = cells.run(cell, make, workdir, EXAMS_AFTER_CPT)
    asked = pathlib.Path(cell.data, "asked.jsonl").read_text().splitlines()
    for phase in record.get("phases", {}).values():
        if "answers" in phase:
            answers = (answer for _, answer in phase["answers"])
            phase["answers"] = grade(map(json.loads, asked), answers)
    return record


def grade(prompts: Iterable[dict], answers: Iterable[str]) -> dict[str, str]:
    """For each prompt, whether the answer is a choice, "1" or "0", and the right one.

    Case, and a period at the end, make no difference.
    """
    marks = {"form": "", "right": ""}
    for prompt, answer in zip(prompts, answers, strict=True):
        choices = [_plain(choice) for choice in prompt["choices"]]
        form = _plain(answer) in choices
        marks["form"] += str(int(form))
        marks["right"] += str(int(form and _plain(answer) == choices[prompt["answer"]]))
    return marks


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").casefold()


STUDY = cells.Study(
    make,
    run_cell,
    lambda cell: cell.arm + ("_aligned" if cell.trained else ""),
    lambda record: f"{record['seconds']:.0f} s",
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
    data.write_prompts(folder)
    records = cells.Records(results, STUDY)
    model = start / "export/hf"
    if not (model / "config.json").exists():
        cell = dataclasses.replace(healing(str(folder)), **settings)
        record = run_cell(cell, str(start))
        records.add(cell, record | {"revision": cells.revision()})
    planned = {
        part: [
            cell
            for cell in plan(part, Cell(str(folder), str(model), **settings), root)
            if not tiny or cell.rate in (0, RATES[1])
        ]
        for part in PARTS
    }
    # One worker with all cores: two need twice the memory.
    for cell in (cell for part in arguments.part for cell in planned[part]):
        if records.has(cell):
            continue
        # A merge finds the end of training here, or trains again if it is gone.
        training = root / cells.name(trained(cell), STUDY)
        workdir = root / cells.name(cell, STUDY) if cell.trained else training
        record = run_cell(cell, str(workdir)) | {"revision": cells.revision()}
        records.add(cell, record)
        print(f"{cells.name(cell, STUDY)}: {STUDY.summary(record)}", flush=True)
        if cell.trained:
            shutil.rmtree(workdir)
        others = itertools.chain.from_iterable(planned.values())
        users = (other for other in others if trained(other) == trained(cell))
        if all(records.has(user) for user in users):
            shutil.rmtree(training)


if __name__ == "__main__":
    main()
