"""The weight of each objective on each token of a packed row.

The weight of a target is its loss mask times its source's weight for the objective
(`config.objective_weights`: `sources.NAME.ntp_weight`, else `objective.ntp_weight`). So
padding, and every token outside the loss mask, has weight 0 in every objective.
`objective.token_weighting` depends on the teacher's probabilities, so it is not computed
here but is a factor in the loss (`objectives.streamed`).
"""

from collections.abc import Mapping

import numpy as np

from mixcpt_jax.config import OBJECTIVES

Arrays = dict[str, np.ndarray]


def of_row(loss_mask: np.ndarray, objectives: Mapping[str, float]) -> Arrays:
    """The arrays `ntp_weights`, ..., one for each of `OBJECTIVES`.

    Args:
      loss_mask: of the row, float32 [row_length].
      objectives: objective -> its source's weight; a missing objective has weight 0.
    """
    return {
        f"{name}_weights": loss_mask * np.float32(objectives.get(name, 0.0))
        for name in OBJECTIVES
    }
