"""Checks on the devices that parameters are finite.

A model with a NaN still answers every question, always with the first choice, so its
accuracy looks like a measurement. So all code that reads parameters refuses values that are
not finite.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


class Broken(NamedTuple):
    """A parameter with values that are not finite.

    Attributes:
      key: such as "layers/query".
      layer: of a parameter that is stacked over layers; else None.
      largest: its largest magnitude; infinite if it holds a NaN.
      expert: of a parameter of experts; else None.
    """

    key: str
    layer: int | None
    largest: float
    expert: int | None = None

    def __str__(self) -> str:
        layer = "" if self.layer is None else f" of layer {self.layer}"
        expert = "" if self.expert is None else f", expert {self.expert}"
        return f"{self.key}{layer}{expert}"


def find_broken(params: Any, dtype: str | None = None) -> Broken | None:
    """The first parameter with a NaN, an infinity or a value beyond a dtype's range.

    Every device reduces its shards of all parameters in one program.

    Args:
      params: nested dict of arrays, sharded in any way. Those under "layers" have one
        tensor for each layer, on the first axis; those of four dimensions have one for
        each layer and expert.
      dtype: the dtype whose range is the limit; None: each parameter's own dtype.

    Returns:
      None if all are finite.
    """
    keys, leaves = [], []
    for path, leaf in jax.tree.leaves_with_path(params):
        keys.append(jax.tree_util.keystr(path, simple=True, separator="/"))
        leaves.append(leaf)
    if not leaves:
        return None
    stacked = tuple(
        key.startswith("layers/") * max(1, leaf.ndim - 2)
        for key, leaf in zip(keys, leaves, strict=True)
    )
    where = leaves[0].sharding
    everywhere = NamedSharding(where.mesh, P()) if hasattr(where, "mesh") else None
    largest = jax.device_get(_make_survey(stacked, everywhere)(leaves))
    for key, tops in zip(keys, largest, strict=True):
        limit = float(jnp.finfo(dtype or tops.dtype).max)
        for index in np.argwhere(tops.astype(np.float64) > limit).tolist():
            layer, expert, *_ = [*index, None, None]
            return Broken(key, layer, float(tops[tuple(index)]), expert)
    return None


@functools.cache
def _make_survey(stacked: tuple[int, ...], everywhere: NamedSharding | None):
    """The largest magnitude of each tensor, infinite if it holds a NaN.

    `stacked` is, for each parameter, how many leading dimensions index its tensors.

    NaNs are replaced first: XLA's maximum on CPUs loses them.
    """

    def survey(leaves):
        return [
            jnp.max(
                jnp.where(jnp.isnan(leaf), jnp.inf, jnp.abs(leaf)),
                axis=tuple(range(number, leaf.ndim)),
            )
            for leaf, number in zip(leaves, stacked, strict=True)
        ]

    return jax.jit(survey, out_shardings=everywhere)
