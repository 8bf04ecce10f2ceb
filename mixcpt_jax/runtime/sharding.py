"""The device mesh, and the table from logical axes to mesh axes.

A batch is split over `data` and `fsdp`. Parameters and their optimizer moments are split
over `fsdp` (along the hidden size) and `tensor` (along heads, MLP columns and the
vocabulary); `data` holds copies of them. All axes are Auto: the compiler places the
collectives, `constrain` fixes the sharding of activations, and `scatter_gradient` how
gradients are reduced.

The devices of `mesh.fsdp` lie on two axes of the mesh, `fsdp` and `expert`. Together they
split a hidden size. In a mixture of experts, `expert` splits the experts, and `fsdp` the
hidden size of each.
"""

import functools
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mixcpt_jax.core.errors import InputError
from mixcpt_jax.core.mesh_shape import MESH_AXES, mesh_shape

DATA, FSDP, TENSOR = MESH_AXES
EXPERT = "expert"
SPLIT_AXES = (FSDP, EXPERT)
BATCH_AXES = (DATA, *SPLIT_AXES)

RULES: Mapping[str, Any] = {
    "batch": BATCH_AXES,
    "length": None,
    "layers": None,
    "hidden": SPLIT_AXES,
    "experts": EXPERT,
    "expert_hidden": FSDP,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "mlp": TENSOR,
    "vocab": TENSOR,
    # The hidden size of activations is not split: their rows already use the fsdp axis.
    "activation": None,
}


def device_kind() -> str:
    """The kind of device that computations are traced for, as `jax.Device.device_kind`.

    It is the kind of the mesh's devices, or without a mesh of the default device: "cpu",
    "TPU v5 lite" and so on. The mesh may have abstract devices, to compile for them.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind


def platform() -> str:
    """The platform of the same devices: "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def compute_capability() -> float:
    """Of the default device if that is an NVIDIA GPU, such as 9.0 for an H100; else 0."""
    found = getattr(jax.devices()[0], "compute_capability", "")
    # On an AMD GPU it is a name, such as "gfx942".
    return float(found) if re.fullmatch(r"\d+\.\d+", str(found)) else 0.0


def make_mesh(sizes: Mapping[str, int], devices=None) -> Mesh:
    """Builds the `(data, fsdp, expert, tensor)` mesh over all devices of all hosts.

    An axis may use a part of a side of the torus, such as data=4 and fsdp=64 of 16x16.

    Args:
      sizes: of `config.mesh`; its `expert`, 1 if it is left out, divides `fsdp`.
      devices: None: all.

    Raises:
      InputError: the sizes do not match the devices, or the devices belong to several
        slices.
    """
    devices = jax.devices() if devices is None else devices
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1:
        raise InputError(
            f"mesh: the devices are of {len(slices)} slices, which is not supported; "
            "start the run on one slice"
        )
    data, fsdp, tensor = mesh_shape(sizes, len(devices))
    expert = sizes.get(EXPERT, 1)
    if fsdp % expert:
        raise InputError(f"mesh.expert={expert}: must divide mesh.fsdp, {fsdp}")
    # `jax.make_mesh` splits a side of the torus only on v5e.
    laid_out = mesh_utils.create_device_mesh(
        (data, fsdp // expert, expert, tensor), devices, allow_split_physical_axes=True
    )
    axes = DATA, *SPLIT_AXES, TENSOR
    return Mesh(laid_out, axes, axis_types=(AxisType.Auto,) * len(axes))


def sizes_of(mesh: Mesh) -> dict[str, int]:
    """The sizes from which `make_mesh` builds a mesh; without `expert` if it is 1."""
    data, fsdp, expert, tensor = mesh.shape.values()
    sizes = {DATA: data, FSDP: fsdp * expert, TENSOR: tensor}
    return sizes | ({EXPERT: expert} if expert > 1 else {})


def make_topology_mesh(topology: str, sizes: Mapping[str, int]) -> Mesh:
    """A mesh over the abstract chips of a TPU slice, to compile for it.

    Needs the `libtpu` package but no TPU. `jit(f).lower(...)` takes `jax.ShapeDtypeStruct`s
    with shardings of this mesh.

    Args:
      topology: such as "v5e:4x4" or "v5p:2x2x1".
      sizes: as for `make_mesh`; their product is the number of the slice's chips in the
        mesh. One may be -1.

    Raises:
      InputError: no slice has that shape, or the sizes do not match it.
    """
    # Without these settings, libtpu waits for a metadata server that only cloud machines
    # have, takes a lock against other processes, as if it had a chip, and complains that it
    # does not know its machine. The topology, not the machine, decides what is compiled.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=topology
        ).devices
    except RuntimeError as error:  # jax's own errors are RuntimeErrors too
        if "not installed" in str(error):
            raise InputError(
                f"{topology}: the compiler for TPUs is not installed; run "
                "`pip install 'jax[tpu]'`, which needs no TPU"
            ) from error
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise InputError(
            f"{topology}: no slice has this shape ({error}); use one such as v5e:4x4, "
            "v5e:16x16, v5p:2x2x1, v5p:4x4x4 or v6e:4x4"
        ) from error
    size = int(np.prod([sizes[axis] for axis in MESH_AXES]))
    return make_mesh(sizes, devices[:size] if size > 0 else devices)


def spec(logical_axes: tuple[str | None, ...]) -> P:
    """The partition spec of an array whose dimensions have these logical axes."""
    return P(*(None if axis is None else RULES[axis] for axis in logical_axes))


def shardings(mesh: Mesh, logical_axes: Any) -> Any:
    """Maps a tree of logical-axes tuples to a tree of shardings."""
    return jax.tree.map(
        lambda axes: NamedSharding(mesh, spec(axes)),
        logical_axes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def place(abstract: Any, shardings: Any) -> Any:
    """Gives every `jax.ShapeDtypeStruct` of a tree its sharding."""
    return jax.tree.map(
        lambda leaf, where: leaf.update(sharding=where), abstract, shardings
    )


def describe(shape: Mapping[str, int]) -> str:
    """A mesh's shape as text, such as "data 1 x fsdp 8 x tensor 1"."""
    return " x ".join(f"{axis} {size}" for axis, size in shape.items())


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows are split over `data` and `fsdp`; no other dimension is split."""
    return NamedSharding(mesh, P(BATCH_AXES))


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Fixes the sharding of an activation; does nothing outside a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(logical_axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def scatter_gradient(kernel: jax.Array, logical_axes: tuple[str, ...]) -> jax.Array:
    """Returns the kernel unchanged; its gradient is reduce-scattered on every slice.

    XLA reduce-scatters the gradient of an array that is sharded over all chips of a slice,
    but all-reduces it if the slice is square or has three sides. So the gradient is first
    constrained to half as many parts, each on two chips; the rest needs no communication.

    Args:
      kernel: an array, or one layer of a stack.
      logical_axes: of its dimensions.
    """
    del logical_axes
    return kernel


def _scatter_gradient_forward(kernel, logical_axes):
    return scatter_gradient(kernel, logical_axes), None


def _scatter_gradient_backward(logical_axes, _, gradient):
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape[FSDP] != mesh.size or mesh.size < 8 or mesh.size % 2:
        return (gradient,)
    halved = AbstractMesh(
        (1, mesh.size // 2, 1, 2, 1),
        (DATA, *SPLIT_AXES, "fsdp_halves", TENSOR),
        axis_types=(AxisType.Auto,) * 5,
    )
    where = NamedSharding(halved, spec(logical_axes))
    gradient = jax.lax.with_sharding_constraint(gradient, where)
    return (constrain(gradient, *logical_axes),)


scatter_gradient.defvjp(_scatter_gradient_forward, _scatter_gradient_backward)
