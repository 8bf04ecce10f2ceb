"""The controlled study: its world, its records, its tables and a tiny run."""

import dataclasses
import itertools
import json
import re
import sys

import numpy as np
import processes
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import cells, figures, tables
from experiments.arms import ARMS
from experiments.controlled import run, world
from experiments.controlled.config import MERGED_SHARES, Cell, make
from mixcpt_jax import config as config_lib
from mixcpt_jax.models import pretrained, tokenizer

POINTS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("world")
    world.write(path, 0, world.TINY)
    return path


def read(folder, name):
    return [
        json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()
    ]


def names(records):
    text = json.dumps(records)
    return set(re.findall(r"[A-Z][a-z]+ [A-Z][a-z]+(?=[ ?.])", text))


def test_a_world_is_a_function_of_its_seed(folder, tmp_path):
    world.write(tmp_path / "same", 0, world.TINY)
    world.write(tmp_path / "other", 1, world.TINY)
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "same" / file.name).read_bytes()
    assert read(folder, "prompts") != read(tmp_path / "other", "prompts")


def test_domain_people_appear_in_domain_documents_alone(folder):
    text = {f.stem: f.read_text() for f in folder.glob("*.jsonl")}
    people = {question["context"] for question in read(folder, "domain_use")}
    assert len(people) == world.TINY.domain * len(world.ATTRIBUTES)
    domain = names([r["text"] for r in read(folder, "domain_documents")])
    domain = {name for name in domain if text["domain_use"].count(name) > 1}
    assert len(domain) == world.TINY.domain
    for file in ("general_documents", "strangers", "general_questions", "preferences"):
        assert not any(name in text[file] for name in domain), file


def test_the_mixture_never_names_the_untold(folder):
    told = (folder / "instructions.jsonl").read_text()
    told += (folder / "preferences.jsonl").read_text()
    asked = " ".join(q["instruction"] for q in read(folder, "untold_chat"))
    untold = {name for name in names(read(folder, "untold_documents")) if name in asked}
    assert untold
    assert not any(name in told for name in untold)


@pytest.mark.parametrize("group", ["domain", "untold", "rehearsed"])
def test_questions_have_true_known_answers(folder, group):
    documents = " ".join(r["text"] for r in read(folder, "general_documents"))
    documents += " ".join(r["text"] for r in read(folder, "domain_documents"))
    for probe in read(folder, f"{group}_memory"):
        assert probe["context"] + probe["target"] in documents
    values = {v for words, _, _ in world.ATTRIBUTES.values() for v in words.split()}
    for question in read(folder, f"{group}_use"):
        assert question["target"].strip() in values
        assert question["context"].endswith("\n\nAnswer:")


def test_pairs_differ_in_form_only(folder):
    for pair in read(folder, "preferences"):
        value = re.fullmatch(r"Answer: (\w+)\.", pair["chosen"])[1]
        assert re.search(rf"\b{value}\b", pair["rejected"])
        assert not pair["rejected"].startswith("Answer")


def test_the_vocabulary_covers_the_world_and_fits_the_model(folder):
    loaded = tokenizer.load(str(folder))
    texts = [record["text"] for record in read(folder, "domain_documents")]
    for ids, text in zip(loaded.encode_batch(texts), texts):
        assert loaded.decode(ids) == text
    tokenizer.check_vocabulary(
        loaded, pretrained.read_model_config(str(folder)).vocab_size, ""
    )


@pytest.mark.parametrize("arm", ["base", *ARMS])
def test_every_cell_is_a_valid_config(folder, arm):
    for base in run.BASES:
        cell = Cell(str(folder), arm, base, start="runs/base", align="dpo", samples=10)
        config = make(cell)
        for phase in config.phases or (None,):
            one = config_lib.for_phase(config, phase) if phase else config
            config_lib.validate(one, num_devices=1)
        if arm != "base" and ARMS[arm].general is not None:
            total = sum(source.weight for source in config.sources.values())
            assert total == pytest.approx(1)


def test_arms_read_the_same_tokens_of_the_domain(folder):
    tokens = set()
    for arm in ARMS:
        config = make(Cell(str(folder), arm, start="runs/base"))
        tokens.add(round(config.train.num_steps * config.sources.domain.weight))
    assert len(tokens) == 1


def test_cells_have_unique_names():
    planned = {
        dataclasses.replace(cell, world="w", start="s")
        for part in run.PARTS
        for seed in range(5)
        for cell in run.plan(part, seed)
    }
    of_two_seeds = [cell for cell in planned if cell.seed < 2]
    names = {cells.name(cell, run.STUDY) for cell in of_two_seeds}
    assert len(names) == len(of_two_seeds)
    for arm in run.CLAIMS:
        sweep = [
            cell
            for cell in planned
            if (cell.base, cell.arm, cell.rule) == ("chat", arm, "first")
        ]
        assert len({cell.seed for cell in sweep}) >= 5
        assert len({cell.rate for cell in sweep}) >= 4


def test_a_record_is_replaced_when_its_cell_changes(tmp_path):
    records = cells.Records(tmp_path, run.STUDY)
    cell = Cell("here/world-0", "plain", start="here/base")
    other = dataclasses.replace(cell, rate=2e-3)

    def record(cell, **more):
        digest = cells.digest(cell, make)
        return vars(cells._without_folders(cell)) | {"config": digest} | more

    assert not records.has(cell)
    records.add(cell, record(cell, n=1))
    records.add(other, record(other) | {"config": "that of an older program"})
    records.add(cell, record(cell, n=2))
    stored = cells.load(tmp_path)
    assert [r.get("n") for r in stored] == [2, None]
    assert records.has(cell)
    assert records.has(dataclasses.replace(cell, world="there/world-0", start="base"))
    assert not records.has(dataclasses.replace(cell, world="here/world-1"))
    assert not records.has(other)
    records.remove(cell)
    assert not records.has(cell)


@pytest.mark.parametrize("form", [world.ANSWER, *world.REJECTED])
def test_grade_finds_the_value_in_any_form(form):
    prompt = {"group": "domain", "value": "owl"}
    (marks,) = run.grade([prompt], [form.format(value="owl")]).values()
    assert marks == {"form": form == world.ANSWER, "value": 1}
    (marks,) = run.grade([prompt], [form.format(value="owls")]).values()
    assert marks["value"] == 0


def test_grade_separates_form_and_value():
    prompts = [{"group": "domain", "value": "owl"}] * 4
    answers = ["Answer: owl.", "Answer: cat.", "It is owl.", "Answer: owl. owl."]
    assert run.grade(prompts, answers) == {"domain": {"form": 0.5, "value": 0.75}}


@given(POINTS)
def test_hypervolume_is_the_dominated_area(points):
    # The area of a union of rectangles, cell by cell of the grid their corners make.
    xs, ys = (np.unique([0.0, *column]) for column in zip(*points))
    area = sum(
        (x1 - x0) * (y1 - y0)
        for x0, x1 in itertools.pairwise(xs)
        for y0, y1 in itertools.pairwise(ys)
        if any(x >= x1 and y >= y1 for x, y in points)
    )
    assert tables.hypervolume(points) == pytest.approx(area, abs=1e-12)


@given(POINTS, st.floats(0.01, 0.99))
def test_use_at_a_level_is_on_the_curve_and_at_least_that_of_its_points(points, level):
    use = tables.use_at(points, level)
    assert use >= max([y for x, y in points if x >= level], default=0.0)
    assert use <= max([y for _, y in points])
    if all(x < level for x, _ in points):
        assert use == 0


@given(POINTS, st.floats(0.01, 0.99))
def test_kept_at_a_use_is_on_the_curve_and_at_least_that_of_its_points(points, level):
    kept = tables.kept_at(points, level)
    assert kept >= max([x for x, y in points if y >= level], default=0.0)
    assert kept <= max([x for x, _ in points])
    if all(y < level for _, y in points):
        assert kept == 0


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.parent.name)
def test_a_page_equals_the_results(page):
    text = page.read_text()
    assert tables.fill(text, cells.load(run.RESULTS)) == text


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.parent.name)
def test_a_table_is_written_from_the_results(page):
    by_hand = re.sub(
        r"<!-- ([\w-]+) -->.*?<!-- /\1 -->", "", page.read_text(), flags=re.DOTALL
    )
    assert not re.findall(r"^\|.*\d\.\d.*$", by_hand, flags=re.MULTILINE)


def test_every_page_with_results_is_checked(project):
    folders = project / "experiments", project
    pages = {page for folder in folders for page in folder.glob("*.md")}
    pages |= set((project / "experiments").glob("*/README.md"))
    with_results = {
        page for page in pages if re.search(r"^\|.*\d\.\d", page.read_text(), re.M)
    }
    assert with_results <= set(tables.PAGES)


def _records(curves_by_arm):
    """Records of the chat base from (kept, use) at each rate, by arm and seed."""
    shared = {"base": "chat", "share": 0.0, "rule": "first"}

    def record(arm, seed, rate, point, phase):
        kept, use = point
        after = {"untold_use/exact": kept, "domain_use/exact": use}
        return shared | {
            "arm": arm, "seed": seed, "rate": rate, "phases": {phase: {"after": after}},
        }  # fmt: skip

    records = []
    for arm, seeds in curves_by_arm.items():
        for seed, points in enumerate(seeds):
            for rate, point in zip(run.RATES, points, strict=True):
                records.append(record(arm, seed, rate, point, "cpt"))
    for seed in range(max(map(len, curves_by_arm.values()))):
        records.append(record("base", seed, 0.0, (1.0, 0.0), "base"))
    return records


def test_a_constraint_is_judged_at_the_same_use():
    """An arm that keeps a tenth more at any use gains ten points at each level."""
    uses = (0.2, 0.4, 0.6, 0.9)

    def curve(loss):
        return [(1 - loss - use / 2, use) for use in uses]

    records = _records(
        {
            "mixture_ntp": [curve(0.2), curve(0.2), curve(0.2)],
            "mixture_lssd20": [curve(0.1), curve(0.1), curve(0.1)],
            # Reaches a use of 0.5 in one seed, and of 0.7 in none.
            "mixture_lssd": [curve(0.1)[:2] * 2, curve(0.1)[:2] * 2,
                             [*curve(0.1)[:3], (0.6, 0.6)]],
        }
    )  # fmt: skip
    table = tables.constraint_table(records, "chat")
    rows = _rows(table)
    assert [row[0] for row in rows] == [
        ARMS["mixture_lssd20"].label, ARMS["mixture_lssd"].label,
    ]  # fmt: skip
    assert rows[0][1] == "3"
    assert rows[0][3:] == ["+10.0 ± 0.0"] * 3
    assert rows[1][3:] == ["+10.0 ± 0.0", "+10.0 (1 of 3)", "not reached"]


def _rows(table):
    _, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
    )
    return rows


def test_a_merge_is_compared_with_the_sweep_of_its_arm():
    """A merge that keeps a tenth more at any use covers a tenth more area at its top."""
    sweep = [(0.9, 0.2), (0.8, 0.4), (0.6, 0.6), (0.3, 0.8)]
    shares = [(1.0, 0.0), (1.0, 0.2), (0.9, 0.4), (0.7, 0.6), (0.4, 0.8), (0.3, 0.8)]
    records = _records({"plain": [sweep] * 3})
    for seed in range(3):
        curve = [
            {"share": a, "untold_use/exact": kept, "domain_use/exact": use}
            for a, (kept, use) in zip((0, *MERGED_SHARES), shares, strict=True)
        ]
        records.append(
            {"base": "chat", "arm": "plain_merged", "rate": 4e-3, "seed": seed,
             "share": 0.0, "rule": "first", "phases": {"merge": {"curve": curve}}}
        )  # fmt: skip
    (row,) = _rows(tables.merge_table(records))
    # Widths of the steps at uses of 0.2, 0.4, 0.6 and 0.8: each is 0.1 longer.
    assert row[1:4] == ["3", "60.0 (60 to 60)", "+8.0 ± 0.0"]
    assert row[5:] == ["20 / 100", "40 / 90", "60 / 70", "80 / 40", "80 / 30"]


def test_every_arm_of_a_table_is_planned():
    planned = {
        (cell.arm, cell.rate)
        for part in run.PARTS
        for cell in run.plan(part, 0)
        if cell.base == "chat"
    }
    shown = [arm for first, arms in tables.KEEP_GROUPS for arm in (first, *arms)]
    assert {(arm, rate) for arm in shown for rate in run.KEEP_RATES} <= planned
    rates = (*run.RATES, *run.HIGH_RATES)
    assert {(arm, rates[-1]) for arm in run.HIGH} <= planned
    for name in run.KEEP:
        arm = ARMS[name]
        has_own_table = arm.is_merged or arm.budget or arm.has_longer_teacher
        assert name in shown or has_own_table


def test_bars_of_a_plot_stay_within_shares():
    found = [[(0.9, 0.0)], [(1.0, 0.4)], [(1.0, 0.1)]]
    for means, (below, above) in tables._means_and_bars(found):
        for mean, low, high in zip(means, below, above, strict=True):
            assert mean - low >= 0
            assert mean + high <= 100 + 1e-9


def test_the_arms_of_a_plot_look_different():
    for key in ("color", "marker"):
        assert len({getattr(s, key) for s in figures.STYLES.values()}) == len(
            figures.STYLES
        )
    records = cells.load(run.RESULTS)
    for base, labels in tables._LABELS.items():
        shown = {arm for arm in figures.STYLES if tables.curves(records, base, arm)}
        assert set(labels) == shown


@pytest.mark.parametrize(
    "page", sorted(tables.FOLDER.rglob("README.md")), ids=lambda page: page.parent.name
)
def test_each_plot_of_a_page_has_a_dark_theme(page):
    text = page.read_text()
    shown = set(re.findall(r"(?:src=\"|\]\()([\w/-]+\.png)", text))
    for name in shown - {"report.png"}:  # a picture of a page
        dark = f"{name.removesuffix('.png')}-dark.png"
        assert (page.parent / name).exists()
        assert (page.parent / dark).exists()
        assert f'(prefers-color-scheme: dark)" srcset="{dark}"' in text


def test_repeated_cells_are_shown_below_their_records():
    records = cells.load(run.RESULTS)
    again = [
        record
        for record in records
        if record["base"] == "chat"
        and record["arm"] in ("base", "plain", "mixture_ntp")
        and record["seed"] < 3
    ]
    told = tables.reproduced(records, again).split("\n\n")
    assert told[::2] == ["chat base, as recorded:", "chat base, as run here:"]
    recorded, here = told[1::2]
    assert recorded == here == tables.arms_table(again, "chat")
    assert len(here.splitlines()) == 2 + 2


@pytest.mark.long
@pytest.mark.slow
def test_a_tiny_study_runs_and_runs_nothing_twice(project, tmp_path):
    command = [sys.executable, "-m", "experiments.controlled.run", "--tiny"]
    command += [
        "--workdir",
        str(tmp_path / "run"),
        "--results",
        str(tmp_path / "results"),
    ]

    def once():
        return processes.lines_of(command, project)

    first = once()
    assert len(first) == 1 + len(run.CLAIMS)
    assert once() == []
    records = cells.load(tmp_path / "results")
    assert len(records) == len(first)
    for record in records:
        if record["arm"] != "base":
            assert set(record["phases"]) == {"cpt", "sft", "dpo"}
            assert set(record["phases"]["dpo"]["answers"]) == {"domain", "untold"}
            assert record["phases"]["cpt"]["after"]["domain_use/loss"] > 0


def test_selection_takes_samples_that_fit_a_row(folder):
    """So they also fit the model's context, which a selection checks at its start."""
    cell = Cell(
        str(folder), "mixture_ntp", start="runs/base", align="dpo", rule="random"
    )
    config = make(cell)
    assert "select" in config.phases
    assert config.select.max_tokens <= config.data.row_length
