"""Models load from every kind of place, with the same weights."""

import pathlib

import jax
import numpy as np
import pytest

from mixcpt_jax.core.errors import InputError
from mixcpt_jax.evaluation import load_model
from mixcpt_jax.models import pretrained, transformer
from mixcpt_jax.training import phase


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_run_is_what_its_last_training_phase_made(tiny_run, tiny_model):
    last = load_model.load(tiny_run)
    assert last.place == f"{tiny_run}/adapters"
    by_name = load_model.load(f"{tiny_run}/adapters")
    assert_equal(last.params, by_name.params)
    wanted = phase.abstract_params(last.config, last.mesh, "float32")
    assert last.params.keys() == wanted.keys()  # the adapters are merged
    whole, start = load_model.load(f"{tiny_run}/whole"), load_model.load(tiny_model)
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
    found = load_model.load(tiny_model)
    plain = pretrained.load_params(
        tiny_model, transformer.abstract_params(found.config)
    )
    assert_equal(found.params, plain)
    exported = load_model.load(f"{tiny_run}/export")
    assert_equal(exported.params, load_model.load(f"{tiny_run}/export/hf").params)
    assert_equal(exported.params, load_model.load(tiny_run).params)
    halves = load_model.load(tiny_model, "bfloat16")
    # Kernels are halved; scales of norms and biases stay whole, see `transformer.cast`.
    for path, x in jax.tree_util.tree_leaves_with_path(halves.params):
        is_kernel = not jax.tree_util.keystr(path).endswith(("norm']", "bias']"))
        assert x.dtype.name == ("bfloat16" if is_kernel else "float32"), path


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none", "none: no such folder"),
        ("none.gguf", "none.gguf: no such file"),
        ("", "no checkpoints and no finished training phase"),
    ],
)
def test_a_path_without_a_model_is_an_input_error(tmp_path, path, message):
    with pytest.raises(InputError, match=message):
        load_model.load(str(pathlib.Path(tmp_path, path)))
    with pytest.raises(InputError, match="dtype 'int4': not supported; use"):
        load_model.load(str(tmp_path), "int4")
