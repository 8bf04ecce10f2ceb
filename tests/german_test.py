"""The German study: its cells are valid, and its data are split correctly."""

import pytest

from experiments import cells
from experiments.german import data, run
from experiments.german.config import make
from mixcpt_jax import config as config_lib

PLANNED = [run.healing("data")] + [
    cell for part in run.PARTS for cell in run.plan(part, "data", "start")
]


@pytest.mark.parametrize("arm", sorted({cell.arm for cell in PLANNED}))
def test_every_cell_is_a_valid_config(arm):
    cell = next(cell for cell in PLANNED if cell.arm == arm)
    config = make(cell)
    for phase in config.phases:
        config_lib.validate(config_lib.for_phase(config, phase), num_devices=1)


def test_arms_read_the_same_tokens_of_the_domain():
    configs = [make(cell) for cell in PLANNED if cell.arm not in ("start", "none")]
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
