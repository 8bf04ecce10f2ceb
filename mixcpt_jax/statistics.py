"""How sure a measure is, and whether two models differ on the same items.

Shape suffixes: N items, C columns, R resamples.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import special

_RESAMPLES = 10_000
_MAX_PICKS = 2**22  # that are in memory at a time


class Estimate(NamedTuple):
    """A value and the interval around it."""

    value: float
    low: float
    high: float


def bootstrap(
    columns_NxC: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """A statistic of sums over items, with its percentile bootstrap interval.

    Items are drawn anew with replacement, as many as there are, 10,000 times; the
    interval is what lies between the quantiles of the statistic (Efron and Tibshirani,
    An Introduction to the Bootstrap, 1993, section 13.3). What two models made of one
    item are columns of one row, so their difference is paired.

    Args:
      columns_NxC: what each item adds to each sum.
      statistic: `[..., C]` sums -> `[...]`; not a number where a resample has none.
      seed: of the draws; the same items and seed are resampled alike.
      level: the share of resamples within the interval.
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
    tail = (1 - level) / 2
    low, high = np.nanquantile(values_R, [tail, 1 - tail])
    return Estimate(float(statistic(columns_NxC.sum(0))), float(low), float(high))


class McNemar(NamedTuple):
    """Items that one model alone has right, and how likely such a split is by chance."""

    first_alone: int
    second_alone: int
    p_value: float


def mcnemar(first_is_right_N: np.ndarray, second_is_right_N: np.ndarray) -> McNemar:
    """The exact test that two models are right equally often (McNemar 1947).

    Only items that one of them alone has right tell; if none of the models were better,
    each of these would be a fair coin. The p-value is two-sided, from the binomial
    distribution.
    """
    first, second = (np.asarray(x, bool) for x in (first_is_right_N, second_is_right_N))
    first_alone = int(np.sum(first & ~second))
    second_alone = int(np.sum(second & ~first))
    fewer, num_trials = min(first_alone, second_alone), first_alone + second_alone
    p_value = min(1.0, 2 * float(special.bdtr(fewer, num_trials, 0.5)))
    return McNemar(first_alone, second_alone, p_value)
