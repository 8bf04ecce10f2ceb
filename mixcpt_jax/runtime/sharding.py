"""The device mesh, and the table from logical axes to mesh axes.

A batch is split over `data` and `fsdp`. Parameters and their optimizer moments are split
over `fsdp` (along the hidden size) and `tensor` (along heads, MLP columns and the
vocabulary); `data` holds copies of them. All axes are Auto: the compiler places the
collectives, `constrain` fixes the sharding of activations, and `scatter_gradient` how
gradients are reduced.

The devices of `mesh.fsdp` lie on two axes of the mesh, `fsdp` and `expert`. Together they
split a hidden size. In a mixture of experts, `expert` splits the experts, and `fsdp` the
hidden size of each.

Devices of different slices have only the data center network (DCN) between them. There the
mesh has one more axis, `slices`, before the others: each slice holds a copy of the
parameters and takes its own rows of a batch, and `sum_over_slices` alone crosses it.
"""

import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mixcpt_jax.core import chips
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.core.mesh_shape import MESH_AXES, mesh_shape

DATA, FSDP, TENSOR = MESH_AXES
EXPERT = "expert"
SPLIT_AXES = (FSDP, EXPERT)
SLICES = "slices"

RULES: Mapping[str, Any] = {
    # "batch": `batch_axes`, which depends on the mesh.
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

    An axis may use a part of a side of the torus, such as data=4 and fsdp=64 of 16x16. On
    several slices the axis `slices` is before the others; `data` of the sizes is then their
    number times the size of the axis `data`.

    Args:
      sizes: of `config.mesh`. `expert`, 1 if it is left out, divides `fsdp`. `slices`, if
        present, is the number of slices; 0: found from the devices.
      devices: of all hosts; None: all devices of this run.

    Raises:
      InputError: the sizes do not match the devices or their slices.
    """
    devices = jax.devices() if devices is None else devices
    data, fsdp, tensor = mesh_shape(sizes, len(devices))
    slices = _by_slice(devices, sizes.get(SLICES, 0))
    if data % len(slices):
        raise InputError(
            f"mesh.data={data} does not divide over {len(slices)} slices; use a multiple, "
            "because each slice holds a copy of the weights"
        )
    expert = sizes.get(EXPERT, 1)
    if fsdp % expert:
        raise InputError(f"mesh.expert={expert}: must divide mesh.fsdp, {fsdp}")
    # `jax.make_mesh` splits a side of the torus only on v5e.
    parts = [
        mesh_utils.create_device_mesh(
            (data // len(slices), fsdp // expert, expert, tensor),
            part,
            allow_split_physical_axes=True,
        )
        for part in slices
    ]
    axes = DATA, *SPLIT_AXES, TENSOR
    if len(slices) == 1:
        (laid_out,) = parts
    else:
        laid_out, axes = np.stack(parts), (SLICES, *axes)
    return Mesh(laid_out, axes, axis_types=(AxisType.Auto,) * len(axes))


def sizes_of(mesh: Mesh) -> dict[str, int]:
    """The sizes from which `make_mesh` builds a mesh; only what is > 1 of the optional."""
    *slices, data, fsdp, expert, tensor = mesh.shape.values()
    sizes = {DATA: data * math.prod(slices), FSDP: fsdp * expert, TENSOR: tensor}
    sizes |= {EXPERT: expert} if expert > 1 else {}
    return sizes | ({SLICES: slices[0]} if slices else {})


def num_slices(mesh: Mesh | AbstractMesh) -> int:
    """How many slices a mesh is over."""
    return mesh.shape.get(SLICES, 1)


def _by_slice(devices: Sequence[jax.Device], number: int) -> list[list[jax.Device]]:
    """The devices of each slice.

    A TPU knows its slice. Other devices may be told: `number` groups, in their order.
    """
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    found = [slices[index] for index in sorted(slices)]
    if not number or number == len(found):
        return found
    if devices[0].platform == "tpu":
        raise InputError(
            f"mesh.slices={number}: the devices are of {len(found)} slices; use that "
            "number, or 0 to find it"
        )
    size, rest = divmod(len(devices), number)
    if rest:
        raise InputError(
            f"mesh.slices={number} does not divide {len(devices)} devices; use a divisor"
        )
    together = [device for part in found for device in part]
    return [together[i : i + size] for i in range(0, len(together), size)]


def make_topology_mesh(topology: str, sizes: Mapping[str, int]) -> Mesh:
    """A mesh over the abstract chips of TPU slices, to compile for them.

    Needs the `libtpu` package but no TPU. `jit(f).lower(...)` takes `jax.ShapeDtypeStruct`s
    with shardings of this mesh.

    Args:
      topology: such as "v5e:4x4", "v5p:2x2x1", or "v5e:4x4*2" for two slices.
      sizes: as for `make_mesh`; their product is the number of chips in the mesh. One may
        be -1.

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
    parts = chips.Topology.parse(topology)
    name = parts.chip.config_name
    options = {"chip_config_name": name} if name else {}
    try:
        devices = topologies.get_topology_desc(
            platform="tpu",
            topology_name=parts.of_slice,
            num_slices=parts.num_slices,
            **options,
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


def batch_axes(mesh: Mesh | AbstractMesh | None = None) -> tuple[str, ...]:
    """The axes of a mesh over which a batch is split.

    Args:
      mesh: None: the present one. Within `sum_over_slices` it is the mesh of a slice.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if num_slices(mesh) == 1 or SLICES in mesh.manual_axes:
        return (DATA, *SPLIT_AXES)
    return (SLICES, DATA, *SPLIT_AXES)


def spec(logical_axes: tuple[str | None, ...]) -> P:
    """The partition spec of an array whose dimensions have these logical axes."""
    rules = {None: None, "batch": batch_axes(), **RULES}
    return P(*(rules[axis] for axis in logical_axes))


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
    """Rows are split over `batch_axes`; no other dimension is split."""
    return NamedSharding(mesh, P(batch_axes(mesh)))


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Fixes the sharding of an activation; does nothing outside a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(logical_axes))


def by_columns(x_BxLxD: jax.Array) -> jax.Array:
    """Activations as a table of embeddings, split over fsdp along D, gives them.

    The compiler finds this sharding by itself, but not within `sum_over_slices`: there the
    gradient of the table would gather the rows of all chips on every chip.
    """
    if SLICES not in jax.sharding.get_abstract_mesh().manual_axes:
        return x_BxLxD
    return jax.lax.with_sharding_constraint(x_BxLxD, P(DATA, None, SPLIT_AXES))


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


def sum_over_slices(
    function: Callable[..., tuple[Any, Any]], specs: Any, batch: Any, *arguments: Any
) -> tuple[Any, Any]:
    """`function(batch, *arguments)`, which returns sums over the rows of the batch.

    On several slices each one runs the function on its own rows, and the results are added
    at the end. So the slices exchange the results and nothing else, once, however many
    collectives the function has. Of a gradient, each chip exchanges its own share.

    Args:
      function: returns a tree of small sums, and a tree of gradients.
      specs: partition specs of the gradients; None on one slice.
      batch: arrays of rows.
      arguments: trees that each slice has a copy of.
    """
    if num_slices(jax.sharding.get_abstract_mesh()) == 1:
        return function(batch, *arguments)

    def of_slice(batch, arguments):
        sums, gradients = function(batch, *arguments)
        gradients = jax.tree.map(_sum_shares, gradients, specs)
        return jax.lax.psum(sums, SLICES), gradients

    return jax.shard_map(
        of_slice,
        axis_names={SLICES},
        in_specs=(P(SLICES), P()),
        out_specs=P(),
        check_vma=False,
    )(batch, arguments)


def _sum_shares(gradient: jax.Array, spec: P) -> jax.Array:
    """Sums a gradient over the slices, and gathers it again in each slice.

    Chips of a slice with copies of it, over `data`, divide it among them, along a dimension
    that is not yet split over fsdp: a part of a part would be padded.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = [*spec, *[None] * (gradient.ndim - len(spec))]
    for i, size in enumerate(gradient.shape):
        names = axes[i] if isinstance(axes[i], tuple) else (axes[i],) if axes[i] else ()
        ways = math.prod(mesh.shape[name] for name in (*names, DATA))
        if FSDP not in names and size % ways == 0:
            axes[i] = (*names, DATA)
            break
    shares = P(*axes)
    fix = jax.lax.with_sharding_constraint
    # Without a constraint on both sides of a change, the compiler makes it elsewhere: in
    # the loop over microbatches, or before the sum.
    gradient = jax.lax.psum(fix(fix(gradient, spec), shares), SLICES)
    return fix(fix(gradient, shares), spec)
