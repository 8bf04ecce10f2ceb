"""Records stay valid for their cells when defaults change."""

import dataclasses
import json

import ml_collections
import pytest

from experiments import arms, cells
from experiments.book import config as book_config
from experiments.book import run as book
from experiments.controlled import config as controlled_config
from experiments.controlled import run as controlled
from experiments.german import config as german_config
from experiments.german import run as german
from mixcpt_jax import config as config_lib

STUDIES = {
    "book": (book, book_config.Cell),
    "controlled": (controlled, controlled_config.Cell),
    "german": (german, german_config.Cell),
}
FILES = [
    pytest.param(name, file, id=f"{name}-{file.stem}")
    for name, (study, _) in STUDIES.items()
    for file in sorted(study.RESULTS.glob("*.json"))
]


def cell_of(cell_type, record):
    """The cell of a record; fields that are newer have their defaults."""
    fields = {f.name for f in dataclasses.fields(cell_type)}
    given = {name: record[name] for name in fields & record.keys()}
    if isinstance(given.get("data"), dict):
        given["data"] = "data"  # a record has the hashes of the data there
    return cell_type(**given)


@pytest.mark.parametrize(("name", "file"), FILES)
def test_a_recorded_cell_does_not_run_again(name, file):
    study, cell_type = STUDIES[name]
    records = json.loads(file.read_text())["cells"]
    digests = {
        cells.digest(cell_of(cell_type, record), study.STUDY.make)
        for record in (records[0], records[-1])
    }
    assert digests == {records[0]["config"], records[-1]["config"]}


@pytest.mark.parametrize(("name", "file"), FILES)
def test_a_cell_runs_with_the_recorded_settings(name, file):
    """Defaults that have changed since must not change what a new record is compared to."""
    study, cell_type = STUDIES[name]
    content = json.loads(file.read_text())
    made = study.STUDY.make(cell_of(cell_type, content["cells"][0]))
    config = json.loads(made.to_json())
    for section in ("data", "model", "optimizer", "lora", "mesh"):
        recorded, now = content["config"][section], config[section]
        for key in (recorded.keys() & now.keys()) - {"path", "learning_rate"}:
            assert now[key] == recorded[key], f"{section}.{key}"


@pytest.mark.parametrize(("name", "file"), FILES)
def test_a_recorded_config_has_the_objective_of_its_arm(name, file):
    content = json.loads(file.read_text())
    arm = content["cells"][0]["arm"]
    if arm not in arms.ARMS:
        pytest.skip("a base, or the model as it is: no arm")
    config = ml_collections.ConfigDict(content["config"])
    for source, entry in config.sources.items():
        if entry.weight:
            objectives = arms.ARMS[arm].domain
            if source != "domain":
                objectives = arms.ARMS[arm].general
            found = config_lib.objective_weights(config, source)
            assert {o: w for o, w in found.items() if w} == objectives


def test_the_objective_changes_the_name_of_a_cell():
    cell = book_config.Cell("data", "start")

    def make(ntp, lssd):
        def make_cell(cell):
            config = book.STUDY.make(cell)
            config.objective.ntp_weight, config.objective.lssd_weight = ntp, lssd
            return config

        return make_cell

    weights = ((0.8, 0.2), (0.0, 1.0), (1.0, 0.0))
    assert len({cells.digest(cell, make(*pair)) for pair in weights}) == 3
