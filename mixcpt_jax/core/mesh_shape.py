"""The sizes of the mesh's axes, from a config and a number of devices."""

from collections.abc import Mapping

import numpy as np

from mixcpt_jax.core.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")


def mesh_shape(sizes: Mapping[str, int], num_devices: int) -> tuple[int, int, int]:
    """Fills in the axis that is -1, so that the mesh uses every device.

    Raises:
      InputError: the sizes do not match `num_devices` devices.
    """
    shape = [sizes[axis] for axis in MESH_AXES]
    if shape.count(-1) > 1 or any(s < 1 and s != -1 for s in shape):
        raise InputError(
            f"mesh: {_sizes(sizes)}: sizes must be >= 1, and one may be -1 (the rest)"
        )
    known = int(np.prod([s for s in shape if s != -1]))
    if -1 in shape and num_devices % known == 0:
        shape[shape.index(-1)] = num_devices // known
    if int(np.prod(shape)) != num_devices:
        raise InputError(
            f"mesh: {_sizes(sizes)} does not lay out {num_devices} devices; "
            "make the product of the sizes equal to that, or set one axis to -1"
        )
    return tuple(shape)


def _sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    return {axis: sizes[axis] for axis in MESH_AXES}
