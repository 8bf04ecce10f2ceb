"""95 % intervals of measures and of their changes, and a test that compares two models.

An interval covers the choice of texts or questions: how much the number might change with
other items of the same kind. It does not cover the variation between training seeds.

Shape suffixes: N items, C columns, R resamples.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import special

Interval = tuple[float, float]

_Z = special.ndtri(0.975)
_RESAMPLES = 10_000
_MAX_PICKS = 2**22  # maximum in memory at a time


class Estimate(NamedTuple):
    """A value and the interval around it."""

    value: float
    low: float
    high: float


def bootstrap(
    columns_NxC: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    seed: int = 0,
) -> Estimate:
    """A statistic of sums over items, with its percentile bootstrap interval.

    All N items are resampled with replacement 10,000 times; the interval lies between the
    2.5 % and 97.5 % quantiles of the statistic (Efron and Tibshirani, An Introduction to
    the Bootstrap, 1993, section 13.3). The values of two models for one item are columns
    of one row, so their difference is paired.

    Args:
      columns_NxC: the terms of each item in the C sums.
      statistic: `[..., C]` sums -> `[...]`; NaN if it is not defined.
      seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    num_items = len(columns_NxC)
    columns_NxC = np.asarray(columns_NxC, np.float64)
    sums = []
    left = _RESAMPLES
    while left:
        part = min(left, max(1, _MAX_PICKS // num_items))
        picks_RxN = rng.integers(num_items, size=(part, num_items))
        sums.append(np.stack([column[picks_RxN].sum(1) for column in columns_NxC.T], 1))
        left -= part
    values_R = statistic(np.concatenate(sums))
    low, high = np.nanquantile(values_R, [0.025, 0.975])
    return Estimate(float(statistic(columns_NxC.sum(0))), float(low), float(high))


class McNemar(NamedTuple):
    """Numbers of items that only one model has correct, and the p-value of the split."""

    first_alone: int
    second_alone: int
    p_value: float


def mcnemar(first_is_right_N: np.ndarray, second_is_right_N: np.ndarray) -> McNemar:
    """The exact test that two models are correct equally often (McNemar 1947).

    Only items that exactly one model has correct count. If the models are equally good,
    each of these items is a fair coin flip. The p-value is two-sided, from the binomial
    distribution.
    """
    first, second = (np.asarray(x, bool) for x in (first_is_right_N, second_is_right_N))
    first_alone = int(np.sum(first & ~second))
    second_alone = int(np.sum(second & ~first))
    fewer, num_trials = min(first_alone, second_alone), first_alone + second_alone
    p_value = min(1.0, 2 * float(special.bdtr(fewer, num_trials, 0.5)))
    return McNemar(first_alone, second_alone, p_value)


def change_of_ratio(
    before: np.ndarray, after: np.ndarray, count: np.ndarray
) -> Interval | None:
    """The interval of the change of `sum(values) / sum(count)`, such as token accuracy.

    The tokens of one text are not independent, so texts are the independent items: the
    ratio is linearized over texts, and Student's t has one degree of freedom fewer than the
    number of texts.

    Args:
      before, after: the sum over each text, [texts].
      count: number of tokens of each text, [texts].

    Returns:
      Lowest and highest change; None for fewer than two texts.
    """
    texts, total = len(count), count.sum()
    if texts < 2 or not total:
        return None
    change = (after - before).sum() / total
    residuals = after - before - change * count
    error = math.sqrt(texts / (texts - 1) * (residuals**2).sum()) / total
    margin = special.stdtrit(texts - 1, 0.975) * error
    return change - margin, change + margin


def change_of_share(before: np.ndarray, after: np.ndarray) -> Interval | None:
    """The interval of the change of a share of correct answers to the same questions.

    Agresti and Min (2005): Wald's interval for matched pairs, after adding half a question
    to each of the four outcomes. Unlike Wald's interval, it has the stated coverage for a
    few dozen questions, and if no answer changed.

    Args:
      before, after: correct or not, [questions].

    Returns:
      Lowest and highest change; None if there are no questions.
    """
    if not len(before):
        return None
    total = len(before) + 2
    lost = np.sum(before.astype(bool) & ~after.astype(bool)) + 0.5
    gained = np.sum(~before.astype(bool) & after.astype(bool)) + 0.5
    change = (gained - lost) / total
    margin = _Z * math.sqrt(gained + lost - (gained - lost) ** 2 / total) / total
    return max(-1.0, change - margin), min(1.0, change + margin)
