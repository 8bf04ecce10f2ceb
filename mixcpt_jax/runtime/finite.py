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
    """

    key: str
    layer: int | None
    largest: float

    def __str__(self) -> str:
        layer = "" if self.layer is None else f" of layer {self.layer}"
        return f"{self.key}{layer}"


def find_broken(params: Any, dtype: str | None = None) -> Broken | None:
    """The first parameter with a NaN, an infinity or a value beyond a dtype's range.

    Every device reduces its shards of all parameters in one program.

    Args:
      params: nested dict of arrays, sharded in any way. Those under "layers" have one
        tensor for each layer, on the first axis.
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
    stacked = tuple(key.startswith("layers/") for key in keys)
    where = leaves[0].sharding
    everywhere = NamedSharding(where.mesh, P()) if hasattr(where, "mesh") else None
    largest = jax.device_get(_make_survey(stacked, everywhere)(leaves))
    for key, is_stacked, tops in zip(keys, stacked, largest, strict=True):
        limit = float(jnp.finfo(dtype or tops.dtype).max)
        above = np.ravel(tops).astype(np.float64) > limit
        for layer in np.flatnonzero(above).tolist():
            at = layer if is_stacked else None
            return Broken(key, at, float(np.ravel(tops)[layer]))
    return None


@functools.cache
def _make_survey(stacked: tuple[bool, ...], everywhere: NamedSharding | None):
    """The largest magnitude of each tensor, infinite if it holds a NaN.

    NaNs are replaced first: XLA's maximum on CPUs loses them.
    """

    def survey(leaves):
        return [
            jnp.max(
                jnp.where(jnp.isnan(leaf), jnp.inf, jnp.abs(leaf)),
                axis=tuple(range(int(is_stacked), leaf.ndim)),
            )
            for leaf, is_stacked in zip(leaves, stacked, strict=True)
        ]

    return jax.jit(survey, out_shardings=everywhere)
