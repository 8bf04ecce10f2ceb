"""The study of a real book: its cells are valid, and its data are cut as they should be."""

import json
import pathlib

import pytest

from experiments import cells
from experiments.book import data, run
from experiments.book.config import make
from mixcpt_jax import config as config_lib

SHARED = pathlib.Path(__file__).parents[1] / "../shared/data"


@pytest.mark.parametrize("part", run.PARTS)
def test_every_cell_is_a_valid_config(part):
    for cell in run.plan(part, "data"):
        config = make(cell)
        for phase in config.phases:
            config_lib.validate(config_lib.for_phase(config, phase), num_devices=1)


def test_arms_read_the_same_tokens_of_the_book():
    configs = [make(cell) for cell in run.plan("arms", "data") if cell.arm != "start"]
    tokens = {round(c.train.num_steps * c.sources.domain.weight) for c in configs}
    assert len(tokens) == 1


def test_cells_have_names_of_their_own():
    planned = [cell for part in run.PARTS for cell in run.plan(part, "data")]
    assert len({cells.name(cell, run.STUDY) for cell in planned}) == len(planned)


@pytest.mark.skipif(not SHARED.exists(), reason="the book is not in ../shared/data")
def test_unread_modules_and_their_questions_are_apart(tmp_path):
    data.write(SHARED, tmp_path)

    def read(name):
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    book, unread = (
        {module["id"] for module in read(name)}
        for name in ("book.jsonl", "unread_modules.jsonl")
    )
    assert len(unread) == data.NUM_UNREAD
    assert not book & unread
    read_questions, unread_questions = (
        read(f"{name}_exam.jsonl") for name in ("read_modules", "unread_modules")
    )
    assert {q["doc_id"] for q in read_questions} <= book
    assert {q["doc_id"] for q in unread_questions} <= unread
    exam = (SHARED / "anatomy/exam.jsonl").read_text().splitlines()
    assert len(read_questions) + len(unread_questions) == len(exam)
    for passage in read("lambada.jsonl"):
        assert passage["target"].startswith(" ")
        assert not passage["context"].endswith(" ")
