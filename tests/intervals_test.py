import numpy as np
import pytest
from scipy import stats

from mixcpt_jax import intervals


def test_texts_of_one_length_give_the_t_interval_of_their_differences():
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(2, 20))
    expected = stats.ttest_1samp((after - before) / 7, 0).confidence_interval()
    found = intervals.of_ratio(before, after, np.full(20, 7))
    np.testing.assert_allclose(found, expected)


def test_longer_texts_weigh_more():
    before, after = np.array([0.0, 0.0, 0.0]), np.array([9.0, 0.0, 0.0])
    low, high = intervals.of_ratio(before, after, np.array([10, 1, 1]))
    assert (low + high) / 2 == pytest.approx(9 / 12)


@pytest.mark.parametrize("kept", [0.5, 0.9, 1.0])
def test_a_share_is_covered_as_often_as_it_should(kept):
    """Of many exams of 40 questions, at least 19 in 20, less chance, hold the truth."""
    rng = np.random.default_rng(1)
    before = rng.random((1000, 40)) < 0.3
    after = np.where(
        rng.random(before.shape) < kept, before, rng.random(before.shape) < 0.4
    )
    truth = (1 - kept) * 0.1
    found = np.array(
        [intervals.of_share(b, a) for b, a in zip(before, after, strict=True)]
    )
    covered = (found[:, 0] <= truth) & (truth <= found[:, 1])
    assert covered.mean() > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 1000)


def test_newcombes_own_example():
    """Statistics in Medicine 17 (1998), table II, method 10: 9/10 and 3/10."""
    found = intervals.of_counts(0.3, 0.9, 10)
    np.testing.assert_allclose(found, (0.1705, 0.8090), atol=5e-5)


def test_without_data_there_is_none():
    none = np.array([])
    assert intervals.of_ratio(np.ones(1), np.ones(1), np.ones(1)) is None
    assert intervals.of_share(none, none) is None
    assert intervals.of_counts(0.0, 0.0, 0) is None
