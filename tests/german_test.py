"""The German study: its cells are valid, and its data are split correctly."""

import json
import pathlib
import re
import sys

import numpy as np
import processes
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import cells, tables
from experiments.arms import ARMS
from experiments.german import config, data, figure, run
from mixcpt_jax import config as config_lib

PLANNED = [run.healing("data")] + [
    cell
    for part in run.PARTS
    for cell in run.plan(part, config.Cell("data", "start"), pathlib.Path("runs"))
]
OF_EACH_KIND = {
    (cell.arm, bool(cell.trained), bool(cell.samples)): cell for cell in PLANNED
}


@pytest.mark.parametrize("cell", OF_EACH_KIND.values(), ids=map(str, OF_EACH_KIND))
def test_every_cell_is_a_valid_config(cell):
    made = config.make(cell)
    for phase in made.phases:
        config_lib.validate(config_lib.for_phase(made, phase), num_devices=1)


def test_arms_read_the_same_tokens_of_the_domain():
    configs = [
        config.make(cell)
        for cell in PLANNED
        if cell.arm not in ("start", "none") and not cell.trained
    ]
    assert len({c.train.num_steps * c.sources.domain.weight for c in configs}) == 1


def test_cells_have_unique_names():
    names = {cells.name(cell, run.STUDY) for cell in PLANNED}
    assert len(names) == len(PLANNED)


def test_english_paragraphs_are_distinguished_from_german():
    assert data.is_german("Der Server ist ein Programm, das auf Anfragen wartet.")
    assert not data.is_german("The server is a program that waits for requests.")


def test_a_cloze_asks_for_the_last_word_of_a_sentence():
    paragraph = (
        "Ein Administrator muss sich aus der Ferne mit einem Rechner verbinden können, "
        "denn Server in eigenen Räumen haben selten eine Tastatur. Dazu dient heute SSH "
        "(siehe 9.2)."
    )
    (cloze,) = data.last_words([[paragraph]])
    assert cloze["target"] == " Tastatur"
    assert paragraph.startswith(cloze["context"] + cloze["target"])


def test_the_tables_show_both_starts_and_each_merge():
    measures = {key: 0.5 for key, _ in tables.GERMAN.values()}

    def record(arm, phases, **settings):
        questions = dict.fromkeys(run.QUESTIONS, "0111" * 25)
        found = {p: {"after": measures, "questions": questions} for p in phases}
        return {"arm": arm, "rate": 0.0, "seed": 0, "phases": found} | settings

    records = [
        record("none", ["evaluate"], start="hf"),
        record("none", ["evaluate"], start=""),
        record("plain_merged", ["cpt", "merge"], start="hf", rate=1e-3),
    ]
    records[2]["phases"]["merge"]["curve"] = [measures | {"share": 0.2}]
    _, _, *rows = tables.real_table(
        records, tables.GERMAN, is_aligned=False
    ).splitlines()
    names = [row.split("|")[1].strip() for row in rows]
    assert names == ["four-bit file", "start", f"{ARMS['plain'].label}, 0.001"]
    _, _, merge = tables.real_merge_table(records, tables.GERMAN).splitlines()
    cells_of_merge = [cell.strip() for cell in merge.split("|")]
    assert cells_of_merge[1:3] == [f"{ARMS['plain_merged'].label}, 0.001", "0.2"]
    _, _, change = tables.real_changes_table(records, tables.GERMAN).splitlines()
    assert change.count(" +0.0 (") == len(run.QUESTIONS)


def _write_handbook(folder):
    """Six pages in both languages, in the form of the package."""
    german = "Der Server {} ist ein Programm, das auf die Anfragen der Nutzer wartet."
    english = "The server {} is a program that waits for the requests of its users."
    for tongue, sentence in (("de-DE", german), ("en-US", english)):
        pages = folder / data.HANDBOOK / tongue
        pages.mkdir(parents=True)
        for page in range(6):
            paragraphs = "".join(
                f'<div class="para">{sentence.format(10 * page + i)} '
                f"{sentence.format(10 * page + i)}</div>"
                for i in range(8)
            )
            (pages / f"page{page}.html").write_text(
                f"<title>{page}. Server</title>{paragraphs}"
            )


def _write_general(folder):
    """A few records of each file of the folder of general text."""
    exam = {"question": "Which is red?", "choices": ["grass", "blood"], "answer": 1}
    files = {
        "general/instructions": {"instruction": "Name a color.", "output": "Red."},
        "general/preferences": {"prompt": "Hi", "chosen": "Hello.", "rejected": "No."},
        "anatomy/docs": {"text": "The heart is a muscle that moves the blood. " * 8},
        "general_eval/lambada": {"context": "The heart moves the", "continuation": "b"},
        **dict.fromkeys(
            (f"general_eval/{name}" for name in ("arc_easy", "piqa", "openbook_qa")),
            exam,
        ),
    }
    for name, record in files.items():
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = (record | {"id": str(i)} for i in range(8))
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "general_eval/wikitext2_valid.txt").write_text("A wiki has pages. " * 40)


@pytest.mark.slow
def test_a_tiny_study_runs_and_runs_nothing_twice(longer_model, project, tmp_path):
    handbook, general, workdir = (tmp_path / n for n in ("handbook", "general", "runs"))
    _write_handbook(handbook)
    _write_general(general)
    program = (
        "from experiments.german import config, data, run\n"
        f"config.GGUF, data.NUM_UNREAD = {longer_model!r}, 2\n"
        "run.NEIGHBOURS, run.ALIGNED = ('plain_merged',), ('plain',)\n"
        "run.SAMPLES = 0, 2\n"
        "run.main()"
    )
    command = [sys.executable, "-c", program, "--tiny", "--part"]
    command += ["arms", "neighbours", "aligned"]
    command += [f"--handbook={handbook}", f"--data={general}", f"--workdir={workdir}"]

    def once():
        return processes.lines_of(command, project)

    assert len(once()) == 5 + len(run.CLAIMS)
    assert once() == []  # every cell has a record
    records = [r for r in cells.load(workdir / "results") if r["arm"] != "start"]
    aligned = [r for r in records if r.get("trained")]
    _, _, *rows = tables.aligned_table(aligned, tables.GERMAN_ALIGNED).splitlines()
    assert [row.split("|")[2].strip() for row in rows] == ["CPT", "SFT", "DPO"]
    records = [r for r in records if not r.get("trained")]
    assert len(records) == 3 + len(run.CLAIMS)
    rows = tables.real_table(records, tables.GERMAN, is_aligned=False).splitlines()[2:]
    assert len(rows) == len(records)
    phases = {record["arm"]: record["phases"] for record in records}
    assert phases["plain_merged"]["cpt"] == phases["plain"]["cpt"]  # not trained again
    curve = phases["plain_merged"]["merge"]["curve"]
    assert {row["share"] for row in curve} >= set(config.MERGED_SHARES)
    assert [folder.name for folder in workdir.glob("*-seed*")] == []


def test_an_answer_is_graded_by_its_form_and_by_what_it_says():
    prompt = {"prompt": "Red?", "choices": ["Blood.", "grass"], "answer": 0}
    answers = ["blood", " Blood.\n", "grass", "It is blood.", ""]
    assert run.grade([prompt] * 5, answers) == {"form": "11100", "right": "11000"}


@given(st.integers(0, 10**6), st.integers(2, 5), st.data())
def test_every_instruction_has_one_right_answer_and_shows_its_choices(number, n, draw):
    answer = draw.draw(st.integers(0, n - 1))
    choices = [f"thing {place}" for place in range(n)]
    question = {"question": "Question: What?", "choices": choices, "answer": answer}
    asked = data.ask(number, question)
    right = asked["choices"][asked["answer"]]
    assert all(choice in asked["prompt"] for choice in asked["choices"])
    if number % 3 == 0:
        assert right == choices[answer]
    elif number % 3 == 1:
        assert f"\n{right}) {choices[answer]}\n" in asked["prompt"]
    else:
        assert (f"answer: {choices[answer]}\n" in asked["prompt"]) == (right == "yes")


def test_the_instructions_are_of_questions_that_no_exam_asks(tmp_path):
    exam = [
        {"question": f"Question: Is it {n}?", "choices": ["a", "b"], "answer": 0}
        for n in range(3 * data.NUM_PROMPTS)
    ]
    file = tmp_path / "arc_easy_exam.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in exam))
    data.write_prompts(tmp_path)
    text = (tmp_path / "asked.jsonl").read_text()
    numbers = {int(n) for n in re.findall(r"Is it (\d+)", text)}
    assert len(numbers) == data.NUM_PROMPTS
    assert min(numbers) >= len(exam) // 2
    data.write_prompts(tmp_path)
    assert (tmp_path / "asked.jsonl").read_text() == text


def test_the_aligned_table_compares_the_form_with_plain_training():
    def record(arm, form):
        after = {key: 0.5 for key, _ in tables.GERMAN_ALIGNED.values()}
        sft = {"after": after, "answers": {"form": form, "right": form}}
        phases = {"select": {"after": {}}, "sft": sft}
        return {"arm": arm, "rate": 1e-3, "samples": 10, "phases": phases}

    records = [record("plain", "0011" * 25), record("mixture_lssd20", "1011" * 25)]
    table = tables.aligned_table(records, tables.GERMAN_ALIGNED)
    plain, mixture = (
        [cell.strip() for cell in row.split("|")[2:6]] for row in table.splitlines()[2:]
    )
    assert plain == ["SFT", "10", "50.0", ""]
    assert mixture[:3] == ["SFT", "10", "75.0"]
    assert mixture[3].startswith("+25.0 (")
    assert tables.aligned_table([], tables.GERMAN_ALIGNED) == "Not run yet."


def _record(german, english, questions="0"):
    after = {"unread_pages/loss": np.log(german), "wikitext/loss": np.log(english)}
    answers = {name: questions for name in figure.EXAMS}
    phase = {"after": after, "questions": answers}
    return {"rate": 1e-3, "phases": {"cpt": phase}}


def test_figure_takes_the_geometric_mean_of_the_seeds():
    found = figure.perplexities([_record(10, 20), _record(40, 80)])
    np.testing.assert_allclose(found[1e-3], (40, 20))


def test_figure_reads_the_training_of_an_arm_that_generates_its_general_text():
    record = _record(10, 20)
    record["phases"] = {"generate": {"after": {}}} | record["phases"]
    np.testing.assert_allclose(figure.perplexities([record])[1e-3], (20, 10))
    start = _record(1, 1, "0" * 9)
    start["phases"] = {"evaluate": start["phases"]["cpt"]}
    record["phases"]["cpt"]["questions"] = start["phases"]["evaluate"]["questions"]
    assert all(change == 0 for change, *_ in figure.changes(start, record).values())


def test_figure_shows_changes_in_points_with_intervals_over_questions():
    start, end = _record(1, 1, "0011" * 25), _record(1, 1, "1011" * 25)
    for change, low, high in figure.changes(start, end).values():
        assert change == 25
        assert 10 < low < 25 < high < 40


@pytest.mark.slow
def test_figure_has_a_light_and_a_dark_file(tmp_path):
    figure.draw(cells.load(run.RESULTS), tmp_path / "a.png")
    light, dark = (tmp_path / name for name in ("a.png", "a-dark.png"))
    assert light.read_bytes() != dark.read_bytes()
