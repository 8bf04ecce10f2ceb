"""The weight of each objective on each token of a packed row.

The weight of a target is its loss mask times its source's weight for the objective
(`config.objective_weights`: `sources.NAME.ntp_weight`, else `objective.ntp_weight`). So a
token outside of the loss mask, and padding, has weight 0 in every objective. What depends
on the teacher's probabilities, `objective.token_weighting`, is a factor in the loss
(`objectives.streamed`).
"""

from collections.abc import Mapping

import numpy as np

from mixcpt_jax.config import OBJECTIVES

Arrays = dict[str, np.ndarray]


def of_row(loss_mask: np.ndarray, objectives: Mapping[str, float]) -> Arrays:
    """The arrays `ntp_weights`, ..., one for each of `OBJECTIVES`.

    Args:
      loss_mask: of the row, float32 [row_length].
      objectives: objective -> its source's weight; those that are missing have 0.
    """
    return {
        f"{name}_weights": loss_mask * np.float32(objectives.get(name, 0.0))
        for name in OBJECTIVES
    }
