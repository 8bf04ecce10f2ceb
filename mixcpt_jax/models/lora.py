"""Low-rank adapters of frozen kernels: shapes, initialization and merge.

`transformer.Layer` applies them. Adapters are a separate tree,
`{"layers": {"query_lora_a": ...}}`, so that only they are trained and saved.

Shape suffixes: N layers, I inputs and O outputs of a kernel, R rank of an adapter.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from mixcpt_jax.core.errors import InputError
from mixcpt_jax.models.transformer import (
    ModelConfig,
    Params,
    abstract_params,
    param_axes,
)

LORA_TARGETS = ("query", "key", "value", "output", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Lora:
    """The settings of low-rank adapters (Hu et al., arXiv 2106.09685).

    A kernel `W` acts as `W + (alpha / rank) a b`, with `a` of `[in, rank]` and `b` of
    `[rank, out]`.

    Attributes:
      rank: columns of `a`.
      alpha: scales the update, so that the learning rate need not depend on the rank.
      targets: the kernels that have adapters, from `LORA_TARGETS`.

    Raises:
      InputError: a target is not a kernel, or the rank is not positive.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self):
        unknown = set(self.targets) - set(LORA_TARGETS)
        if unknown or not self.targets:
            raise InputError(
                f"lora: targets {self.targets}: choose one or more of "
                f"{', '.join(LORA_TARGETS)}"
            )
        if self.rank < 1:
            raise InputError(f"lora: rank {self.rank}: must be >= 1")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def check_targets(config: ModelConfig, lora: Lora) -> None:
    """Raises `InputError` if a target is a kernel of experts."""
    of_experts = [name for name in lora.targets if name in ("gate", "up", "down")]
    if config.num_experts and of_experts:
        raise InputError(
            f"lora.targets: {', '.join(of_experts)} are kernels of experts, which have no "
            "adapters; choose some of query, key, value, output"
        )


def abstract_adapters(config: ModelConfig, lora: Lora, dtype=jnp.float32) -> Params:
    """Shapes and dtypes of the adapters: `{"layers": {"query_lora_a": ...}}`.

    `a` is `[N, in, rank]` and `b` is `[N, rank, out]`, for each target.

    Raises:
      InputError: see `check_targets`.
    """
    check_targets(config, lora)
    kernels = abstract_params(config, dtype)["layers"]
    adapters = {}
    for name in lora.targets:
        layers, rows, columns = kernels[name].shape
        for suffix, shape in (("a", (rows, lora.rank)), ("b", (lora.rank, columns))):
            adapters[f"{name}_lora_{suffix}"] = jax.ShapeDtypeStruct(
                (layers, *shape), dtype
            )
    return {"layers": adapters}


def init_adapters(
    config: ModelConfig, lora: Lora, key: jax.Array, dtype=jnp.float32
) -> Params:
    """Adapters that do not change the network's function: `b` is zero.

    `a` is normal with variance `1 / in`, so its product with normed activations has their
    scale. Jit it with `out_shardings` to create the adapters sharded.
    """

    def init(path, leaf, key):
        if path[-1].key.endswith("_b"):
            return jnp.zeros(leaf.shape, leaf.dtype)
        normal = jax.random.normal(key, leaf.shape) / math.sqrt(leaf.shape[1])
        return normal.astype(leaf.dtype)

    abstract = abstract_adapters(config, lora, dtype)
    leaves, structure = jax.tree.flatten(abstract)
    keys = jax.tree.unflatten(structure, jax.random.split(key, len(leaves)))
    return jax.tree.map_with_path(init, abstract, keys)


def adapter_axes(config: ModelConfig, lora: Lora) -> Params:
    """The logical axes of the adapters; outer dimensions are sharded as the kernel's."""
    kernels = param_axes(config)["layers"]
    axes = {}
    for name in lora.targets:
        layers, rows, columns = kernels[name]
        axes[f"{name}_lora_a"] = (layers, rows, None)
        axes[f"{name}_lora_b"] = (layers, None, columns)
    return {"layers": axes}


def with_adapters(params: Params, adapters: Params) -> Params:
    """One tree of parameters and adapters for the forward pass; copies no array."""
    return params | {"layers": params["layers"] | adapters["layers"]}


def merge_adapters(params: Params, adapters: Params, lora: Lora) -> Params:
    """The base's parameters plus the adapters: `W + (alpha / rank) a b`.

    The sum is computed in float32 and rounded once to the base's dtype. Jittable.
    """
    layers = dict(params["layers"])
    for name in lora.targets:
        a_NxIxR, b_NxRxO = (
            adapters["layers"][f"{name}_lora_{suffix}"].astype(jnp.float32)
            for suffix in ("a", "b")
        )
        # Highest precision: a TPU would round the factors to bfloat16.
        update_NxIxO = lora.scale * jnp.matmul(a_NxIxR, b_NxRxO, precision="highest")
        kernel = layers[name]
        layers[name] = (kernel.astype(jnp.float32) + update_NxIxO).astype(kernel.dtype)
    return params | {"layers": layers}
