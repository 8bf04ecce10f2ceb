"""95 % intervals of a change, from what was measured of the same items before and after.

They say how much of a change other questions or texts of the same kind might not show.
They do not say what another seed would.
"""

import math

import numpy as np
from scipy import special

Interval = tuple[float, float]

_Z = 1.959963984540054


def of_ratio(
    before: np.ndarray, after: np.ndarray, count: np.ndarray
) -> Interval | None:
    """Of the change of `sum(values) / sum(count)`, such as accuracy per token.

    Tokens of one text go together, so texts are what is counted: the ratio's
    linearisation over them, and Student's t with one degree of freedom less.

    Args:
      before, after: the sum over each text, [texts].
      count: tokens of each text, [texts].

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


def of_share(before: np.ndarray, after: np.ndarray) -> Interval | None:
    """Of the change of a share of questions answered rightly, question by question.

    Agresti and Min (2005): Wald's interval for matched pairs after half a question is
    added to each of the four outcomes. Unlike Wald's own it stays honest for a few dozen
    questions, and where no answer changed.

    Args:
      before, after: right or not, [questions].

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


def of_counts(before: float, after: float, count: int) -> Interval | None:
    """The same where only the number of questions is known, wider than need be.

    Newcombe (1998), his tenth: from Wilson's intervals of both shares, as if the
    questions were not the same.

    Args:
      before, after: the share answered rightly.
      count: how many questions.

    Returns:
      Lowest and highest change; None if there are no questions.
    """
    if not count:
        return None
    (low_before, high_before), (low_after, high_after) = (
        _wilson(share, count) for share in (before, after)
    )
    change = after - before
    return (
        change - math.hypot(after - low_after, high_before - before),
        change + math.hypot(high_after - after, before - low_before),
    )


def _wilson(share: float, count: int) -> Interval:
    square = _Z**2 / count
    center = share + square / 2
    margin = _Z * math.sqrt((share * (1 - share) + square / 4) / count)
    return (center - margin) / (1 + square), (center + margin) / (1 + square)
