"""How much of `train.keep_budget` a phase has spent, evaluation by evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any

from mixcpt_jax import config as config_lib


class Budget:
    """Follows the evaluations of a phase until one exceeds a budget.

    Attributes:
      limits: measure -> how much worse than at the start it may become; may be empty.
      end: the last evaluated step within all budgets, with which the phase ends if the next
        evaluation exceeds one; None without budgets or before the first evaluation.
      spent_at: the step of the first evaluation that exceeds a budget, or None.
    """

    def __init__(self, limits: Mapping[str, float]):
        self.limits = dict(limits)
        self.end: int | None = None
        self.spent_at: int | None = None
        self._before: Mapping[str, float] = {}
        self._after: Mapping[str, float] = {}

    def observe(self, step: int, measures: Mapping[str, float]) -> None:
        """Takes the next evaluation; the first one is that of the start.

        Raises:
          InputError: the start has no value of a measure with a budget.
        """
        if not self.limits or self.spent_at is not None:
            return
        if self.end is None:
            config_lib.require_measured("train.keep_budget", self.limits, measures)
            self._before = measures
        if config_lib.is_within(self.limits, self._before, measures):
            self.end, self._after = step, measures
        else:
            self.spent_at = step

    def replay(self, evaluations: Sequence[Mapping[str, Any]]) -> None:
        """Takes recorded evaluations, each with its `step`."""
        for evaluation in evaluations:
            self.observe(evaluation["step"], evaluation)

    def spent(self, measures: Mapping[str, float] | None = None) -> dict[str, float]:
        """How much of each budget is spent by an evaluation, or at `end` by default."""
        measures = self._after if measures is None else measures
        return {
            name: config_lib.lost(name, self._before[name], measures[name])
            for name in self.limits
            if name in measures
        }

    def describe(self, measures: Mapping[str, float]) -> str:
        """Such as "spent 0.012 of 0.05 of general/loss"."""
        spent = self.spent(measures)
        return ", ".join(
            f"spent {spent[name]:.4g} of {limit:g} of {name}"
            for name, limit in self.limits.items()
            if name in spent
        )

    def result(self) -> dict[str, Any]:
        """For `results.json`: where the phase ends, and what it has spent there."""
        spent = self.spent()
        return {
            "step": self.end,
            "exceeded_at": self.spent_at,
            "measures": {
                name: {"spent": spent[name], "budget": limit}
                for name, limit in self.limits.items()
            },
        }
