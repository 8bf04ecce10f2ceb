"""Budgets of forgetting: how much worse than the start a measure may become."""

from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from mixcpt_jax.config.defaults import measures_kl
from mixcpt_jax.core.errors import InputError

_OF_TEXTS = ("loss", "perplexity", "accuracy", "exact")
# For these measures higher is worse; for all others lower is worse.
_COSTS = ("loss", "perplexity", "kl_from_start")


def lost(measure: str, before: float, after: float) -> float:
    """How much worse a measure has become; negative if it has improved."""
    is_cost = measure.rpartition("/")[2] in _COSTS
    return after - before if is_cost else before - after


def is_within(
    budgets: Mapping[str, float],
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> bool:
    """Whether every measure is within its budget.

    Args:
      budgets: measure -> how much worse than before it may be: losses, perplexities and
        KL by how much higher, all others by how much lower.
      before: measure -> its value at the start; has every measure with a budget.
      after: measure -> its value now. A perplexity that has overflowed is missing here, and
        exceeds its budget.
    """
    return all(
        name in after and lost(name, before[name], after[name]) <= budget
        for name, budget in budgets.items()
    )


def require_measured(
    place: str, budgets: Mapping[str, float], results: Mapping[str, float]
) -> None:
    """Checks that every measure with a budget has a value at the start.

    Args:
      place: of the budgets in the config.
      budgets: measure -> how much worse it may become.
      results: measure -> its value.

    Raises:
      InputError: names the measure and those that have values.
    """
    for name in budgets:
        if name not in results:
            raise InputError(
                f"{place}: {name!r} has no value, as no token of it counts; measured are "
                f"{', '.join(results)}"
            )


def check_budgets(
    place: str, budgets: Mapping[str, Any], config: ml_collections.ConfigDict
) -> None:
    """Checks that each budget is of a measure that the config has.

    Args:
      place: of the budgets in the config.
      budgets: measure -> how much worse it may become.
      config: of the phase.

    Raises:
      InputError: names the measure and the available ones.
    """
    known = sorted(_measures(config))
    for measure in budgets:
        if measure not in known:
            raise InputError(
                f"{place}: {measure!r} is not measured; measures are "
                f"{', '.join(known) or 'none, so add one to eval.texts or eval.exams'}"
                f"{_missing_kl(measure, config)}"
            )


def _missing_kl(measure: str, config: ml_collections.ConfigDict) -> str:
    if not measure.endswith("/kl_from_start") or measures_kl(config):
        return ""
    return "; kl_from_start is measured with eval.kl_from_start=always"


def _measures(config: ml_collections.ConfigDict) -> Iterator[str]:
    pairs = {n for n, s in config.sources.items() if s.format == "chat_preference"}
    held_out = {name for name, entry in config.sources.items() if entry.holdout}
    for name in {*config.eval.texts} | held_out - pairs:
        yield from (f"{name}/{suffix}" for suffix in _OF_TEXTS)
        if measures_kl(config):
            yield f"{name}/kl_from_start"
    yield from (f"{name}/exam" for name in config.eval.exams)
    yield from (f"{n}/pair_accuracy" for n in {*config.eval.pairs} | held_out & pairs)
