"""Budgets of forgetting: how much worse than the start a measure may become."""

from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from mixcpt_jax.core.errors import InputError

_OF_TEXTS = ("loss", "perplexity", "accuracy", "exact")
# For these measures higher is worse; for all others lower is worse.
_COSTS = ("loss", "perplexity")


def lost(measure: str, before: float, after: float) -> float:
    """How much worse a measure has become; negative if it has improved."""
    is_cost = measure.rpartition("/")[2] in _COSTS
    return after - before if is_cost else before - after


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
            )


def _measures(config: ml_collections.ConfigDict) -> Iterator[str]:
    pairs = {n for n, s in config.sources.items() if s.format == "chat_preference"}
    held_out = {name for name, entry in config.sources.items() if entry.holdout}
    for name in {*config.eval.texts} | held_out - pairs:
        yield from (f"{name}/{suffix}" for suffix in _OF_TEXTS)
    yield from (f"{name}/exam" for name in config.eval.exams)
    yield from (f"{n}/pair_accuracy" for n in {*config.eval.pairs} | held_out & pairs)
