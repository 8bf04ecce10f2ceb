"""Coverage of intervals, and the exact test."""

import numpy as np
import pytest
import scipy.stats

from mixcpt_jax.core import intervals


def ratio(sums):
    return sums[..., 0] / sums[..., 1]


def test_intervals_cover_the_truth():
    """For a ratio of sums with dependent terms, such as nats and tokens."""
    rng = np.random.default_rng(0)
    trials, covered, widths = 200, 0, []
    for trial in range(trials):
        lengths = rng.integers(5, 50, 100)
        nats = lengths * rng.gamma(4, 0.5, 100)  # a mean of 2 per token
        columns = np.stack([nats, lengths], axis=1)
        estimate = intervals.bootstrap(columns, ratio, seed=trial)
        assert estimate.value == pytest.approx(nats.sum() / lengths.sum())
        assert estimate.low < estimate.value < estimate.high
        covered += estimate.low <= 2.0 <= estimate.high
        widths.append(estimate.high - estimate.low)
    # 95 % minus about 1 %, the bias of the percentile method at 100 items; 200 trials miss
    # this by chance once in a million.
    assert scipy.stats.binomtest(covered, trials, 0.94).pvalue > 1e-6
    # The width of the delta method.
    lengths = np.arange(5, 50)
    deviation = np.sqrt(np.mean(lengths**2) / np.mean(lengths) ** 2 / 100)
    assert np.mean(widths) == pytest.approx(2 * 1.96 * deviation, rel=0.05)


def test_a_share_has_the_binomial_interval():
    right = np.arange(400) < 240
    columns = np.stack([right, np.ones(400)], axis=1)
    estimate = intervals.bootstrap(columns, ratio)
    expected = scipy.stats.binom.interval(0.95, 400, 0.6)
    # Quantiles of 10,000 draws are off by a step or so.
    np.testing.assert_allclose(
        [estimate.low * 400, estimate.high * 400], expected, atol=2
    )
    assert intervals.bootstrap(columns, ratio) == estimate


def test_a_paired_difference_cancels_the_common_part():
    rng = np.random.default_rng(1)
    common = rng.normal(0, 10, 50)
    ones = np.ones(50)
    columns = np.stack([common, ones, common + 0.1 + rng.normal(0, 0.1, 50), ones], 1)
    estimate = intervals.bootstrap(
        columns, lambda s: s[..., 2] / s[..., 3] - s[..., 0] / s[..., 1]
    )
    assert 0 < estimate.low < estimate.value < estimate.high < 0.2


@pytest.mark.parametrize(
    ("alone", "other_alone"), [(0, 0), (0, 5), (1, 0), (3, 3), (10, 25), (80, 40)]
)
def test_mcnemar_is_a_binomial_test(alone, other_alone):
    pairs = [(1, 0)] * alone + [(0, 1)] * other_alone + [(1, 1)] * 7 + [(0, 0)] * 4
    found = intervals.mcnemar(*np.array(pairs).T)
    assert found[:2] == (alone, other_alone)
    trials = alone + other_alone
    expected = scipy.stats.binomtest(alone, trials).pvalue if trials else 1.0
    assert found.p_value == pytest.approx(expected, rel=1e-12)


def test_texts_of_one_length_give_the_t_interval_of_their_differences():
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(2, 20))
    expected = scipy.stats.ttest_1samp((after - before) / 7, 0).confidence_interval()
    found = intervals.change_of_ratio(before, after, np.full(20, 7))
    np.testing.assert_allclose(found, expected)


def test_longer_texts_weigh_more():
    before, after = np.array([0.0, 0.0, 0.0]), np.array([9.0, 0.0, 0.0])
    low, high = intervals.change_of_ratio(before, after, np.array([10, 1, 1]))
    assert (low + high) / 2 == pytest.approx(9 / 12)


@pytest.mark.parametrize("kept", [0.5, 0.9, 1.0])
def test_the_interval_of_a_share_has_its_coverage(kept):
    """For exams of 40 questions: at least 95 %, minus noise, contain the truth."""
    rng = np.random.default_rng(1)
    before = rng.random((1000, 40)) < 0.3
    after = np.where(
        rng.random(before.shape) < kept, before, rng.random(before.shape) < 0.4
    )
    truth = (1 - kept) * 0.1
    found = np.array(
        [intervals.change_of_share(b, a) for b, a in zip(before, after, strict=True)]
    )
    covered = (found[:, 0] <= truth) & (truth <= found[:, 1])
    assert covered.mean() > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 1000)


def test_without_data_there_is_no_interval():
    none = np.array([])
    assert intervals.change_of_ratio(np.ones(1), np.ones(1), np.ones(1)) is None
    assert intervals.change_of_share(none, none) is None
