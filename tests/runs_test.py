"""A model is found wherever it is, and is the same everywhere."""

import pathlib

import jax
import numpy as np
import pytest

from mixcpt_jax import model, phase, runs, weights
from mixcpt_jax.errors import InputError


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_run_is_what_its_last_training_phase_made(tiny_run, tiny_model):
    last = runs.load(tiny_run)
    assert last.place == f"{tiny_run}/adapters"
    by_name = runs.load(f"{tiny_run}/adapters")
    assert_equal(last.params, by_name.params)
    wanted = phase.abstract_params(last.config, last.mesh, "float32")
    assert last.params.keys() == wanted.keys()  # the adapters are merged
    whole, start = runs.load(f"{tiny_run}/whole"), runs.load(tiny_model)
    for earlier in (whole, start):
        moved = [
            np.abs(a - b).max()
            for a, b in zip(
                jax.tree.leaves(last.params), jax.tree.leaves(earlier.params)
            )
        ]
        assert max(moved) > 0
    assert last.tokenizer.fingerprint == start.tokenizer.fingerprint


def test_a_folder_and_an_export(tiny_model, tiny_run):
    found = runs.load(tiny_model)
    plain = weights.load_params(tiny_model, model.abstract_params(found.config))
    assert_equal(found.params, plain)
    exported = runs.load(f"{tiny_run}/export")
    assert_equal(exported.params, runs.load(f"{tiny_run}/export/hf").params)
    assert_equal(exported.params, runs.load(tiny_run).params)
    halves = runs.load(tiny_model, "bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(halves.params)} == {"bfloat16"}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none", "none: no such folder"),
        ("none.gguf", "none.gguf: no such file"),
        ("", "no checkpoints and no finished phase"),
    ],
)
def test_where_nothing_is(tmp_path, path, message):
    with pytest.raises(InputError, match=message):
        runs.load(str(pathlib.Path(tmp_path, path)))
    with pytest.raises(InputError, match="dtype 'int4': use"):
        runs.load(str(tmp_path), "int4")
