"""The study of a real book: its cells are valid, and its data are split correctly."""

import json
import pathlib

import pytest

from experiments import cells, tables
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


def test_cells_have_unique_names():
    planned = [cell for part in run.PARTS for cell in run.plan(part, "data")]
    assert len({cells.name(cell, run.STUDY) for cell in planned}) == len(planned)


@pytest.mark.skipif(not SHARED.exists(), reason="the book is not in ../shared/data")
def test_unread_modules_and_their_questions_are_separate(tmp_path):
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


def test_the_table_has_a_row_for_every_arm_and_phase():
    measures = {key: 0.5 for key, _ in tables.BOOK.values()}

    def record(arm, seed, align="", phases=("cpt",)):
        after = {phase: {"after": measures} for phase in phases}
        return {"arm": arm, "rate": 1e-4, "seed": seed, "align": align, "phases": after}

    records = [
        {**record("start", 0, phases=("evaluate",)), "rate": 0.0},
        record("mixture_lssd", 0),
        record("mixture_lssd", 1),
        record("plain", 0),
        record("mixture_lssd", 0, "dpo", ("cpt", "select", "sft", "dpo")),
    ]
    _, _, *rows = tables.real_table(records, tables.BOOK, is_aligned=False).splitlines()
    assert [row.split("|")[2].strip() for row in rows] == ["1", "1", "2"]
    assert rows[0].startswith("| start")
    _, _, *rows = tables.real_table(records, tables.BOOK, is_aligned=True).splitlines()
    assert [row.split("|")[1].strip().rpartition(" ")[2] for row in rows] == [
        "start", "CPT", "SFT", "DPO",
    ]  # fmt: skip
    assert all("50.0" in row and "1.65" in row for row in rows)


def test_changes_compare_the_same_questions():
    def record(arm, answers, phase="cpt", **settings):
        questions = dict.fromkeys(run.QUESTIONS, answers)
        return {
            "arm": arm, "rate": 1e-4, "seed": 0, "align": "",
            "phases": {phase: {"questions": questions}},
        } | settings  # fmt: skip

    records = [
        record("mixture_lssd", "0111" * 25),
        record("plain", "1100" * 25),
        record("plain", "0000" * 25, seed=1),
        record("plain", "0000" * 25, align="dpo"),
        record("start", "1100" * 25, "evaluate", rate=0.0),
    ]
    header, _, plain, lssd = tables.real_changes_table(
        records, tables.BOOK
    ).splitlines()
    assert header.count("|") == 2 + len(run.QUESTIONS)
    assert plain.count(" +0.0 (") == lssd.count(" +25.0 (") == len(run.QUESTIONS)


def test_an_answer_is_correct_if_its_question_or_all_tokens_are():
    items = {"exam/exam": [1, 0], "cloze/correct": [2, 2], "cloze/tokens": [2, 3]}
    assert cells._answered(items, "exam") == cells._answered(items, "cloze") == [1, 0]
