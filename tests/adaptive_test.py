"""The adaptive weight of the controlled study."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.controlled import adaptive
from mixcpt_jax.data import pipeline
from mixcpt_jax.evaluation import evaluator


@given(
    kls=st.lists(st.floats(0, 5), min_size=1, max_size=10), budget=st.floats(0.01, 2)
)
def test_a_weight_follows_the_kl_within_0_and_1(kls, budget):
    controller = adaptive.Controller(targets=[budget] * len(kls))
    weights = [(controller.observe(kl), controller.weight)[1] for kl in kls]
    assert all(0 <= weight <= 1 for weight in weights)
    assert controller.path == list(zip(kls, weights))
    # The first evaluation raises the weight if and only if it exceeds the budget.
    assert (weights[0] > 0) == (kls[0] / budget - 1 > 0)


def test_a_constant_weight_stays():
    controller = adaptive.Controller(0.2)
    controller.observe(9.0)
    assert controller.weight == 0.2


def test_tokens_have_the_weight_of_the_moment(monkeypatch):
    weights = np.array([[0.0, 1.0, 1.0]])
    batches = [{"ntp_weights": 0.5 * weights, "lssd_weights": 0.5 * weights}] * 2
    monkeypatch.setattr(pipeline, "batches", lambda *args: iter(batches))
    monkeypatch.setattr(
        evaluator.Evaluator, "__call__", lambda this, params, *args: params
    )
    controller = adaptive.Controller(targets=[0.1, 0.1])
    measured = evaluator.Evaluator.__new__(evaluator.Evaluator)
    measured._data = None
    with adaptive.controlled(controller, num_steps=adaptive.EVERY):
        stream = pipeline.batches()
        first = next(stream)
        measured({f"{adaptive.WATCHED}/kl_from_start": 0.15})
        second = next(stream)
    np.testing.assert_array_equal(first["ntp_weights"], weights)
    assert controller.weight == pytest.approx(0.125 + 0.25)
    np.testing.assert_allclose(second["lssd_weights"], 0.375 * weights)
    np.testing.assert_allclose(second["ntp_weights"], 0.625 * weights)
