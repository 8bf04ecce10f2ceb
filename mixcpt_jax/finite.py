"""Whether parameters hold numbers, asked on the devices.

A model with a NaN in it still answers every question, one of them always first, so its
accuracy looks like a measurement. So whoever reads parameters stops at what is not finite.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


class Broken(NamedTuple):
    """A parameter that holds values which are not finite.

    Attributes:
      key: such as "layers/query".
      layer: of a parameter that is stacked over layers; else None.
      largest: its largest magnitude before the cast.
    """

    key: str
    layer: int | None
    largest: float

    def __str__(self) -> str:
        layer = "" if self.layer is None else f" of layer {self.layer}"
        return f"{self.key}{layer}"


def find_broken(params: Any, dtype: str | None = None) -> Broken | None:
    """The first parameter that holds a NaN or an infinity; None if there is none.

    Every device reduces what it has of the parameters, once, in one program.

    Args:
      params: nested dict of arrays, sharded in any way. Those under "layers" have one
        tensor for each layer, on the first axis.
      dtype: what they are cast to before; None: to nothing.
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
    survey = jax.jit(
        functools.partial(_survey, stacked=stacked, dtype=dtype),
        out_shardings=everywhere,
    )
    for key, is_stacked, (counts, largest) in zip(
        keys, stacked, jax.device_get(survey(leaves)), strict=True
    ):
        for layer in np.flatnonzero(counts).tolist():
            at = layer if is_stacked else None
            return Broken(key, at, float(np.ravel(largest)[layer]))
    return None


def _survey(leaves, stacked: tuple[bool, ...], dtype: str | None):
    """Of each tensor: how many values are not finite, and the largest magnitude."""
    found = []
    for leaf, is_stacked in zip(leaves, stacked, strict=True):
        axes = tuple(range(int(is_stacked), leaf.ndim))
        cast = leaf if dtype is None else leaf.astype(dtype)
        counts = jnp.sum(~jnp.isfinite(cast), axis=axes, dtype=jnp.int32)
        found.append((counts, jnp.max(jnp.abs(leaf), axis=axes).astype(jnp.float32)))
    return found
