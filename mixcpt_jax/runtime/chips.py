"""Peak figures of chips.

Peaks and bandwidths are those of Google's system architecture pages and of "How to Scale
Your Model" (jax-ml.github.io/scaling-book); usable memory is the compiler's figure.
"""

import dataclasses

from mixcpt_jax.core.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU generation.

    Attributes:
      name: as in a topology, "v5e:4x4".
      device_kind: as in `jax.Device.device_kind`.
      flops: bfloat16, per second.
      hbm_bandwidth: bytes per second.
      hbm_bytes: memory that a program may use.
      link_bandwidth: bytes per second from one neighbor in the torus.
      wraps_from: a side of a slice with at least this many chips is a ring; a shorter one
        is a line.
      cycles: of a core, per second.
    """

    name: str
    device_kind: str
    flops: float
    hbm_bandwidth: float
    hbm_bytes: int
    link_bandwidth: float
    wraps_from: int
    cycles: float

    @property
    def flops_per_byte(self) -> float:
        """FLOPs that the chip can do in the time it takes to read one byte of memory."""
        return self.flops / self.hbm_bandwidth


CHIPS = (
    Chip("v5e", "TPU v5 lite", 197e12, 819e9, int(15.75 * GIB), 45e9, 16, 1.5e9),
    Chip("v5p", "TPU v5", 459e12, 2765e9, int(95.74 * GIB), 90e9, 4, 1.75e9),
    Chip("v6e", "TPU v6 lite", 918e12, 1638e9, int(31.25 * GIB), 90e9, 16, 1.75e9),
)


# Dense bfloat16 FLOPs per second by the manufacturer's data sheets; a device kind begins
# with the name. The first match counts.
_GPU_FLOPS = (
    ("NVIDIA B200", 2250e12),
    ("NVIDIA GH200", 989e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA A100", 312e12),
    ("NVIDIA L40S", 362e12),
    ("NVIDIA L4", 121e12),
)


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOPs per second of a kind of device; None if it is not known."""
    if chip := of_device_kind(device_kind):
        return chip.flops
    return next((f for name, f in _GPU_FLOPS if device_kind.startswith(name)), None)


def of_topology(topology: str) -> Chip:
    """The chip of a slice such as "v5e:4x4".

    Raises:
      InputError: the chip is not supported.
    """
    name = topology.partition(":")[0]
    for chip in CHIPS:
        if chip.name == name:
            return chip
    known = ", ".join(chip.name for chip in CHIPS)
    raise InputError(
        f"{topology}: no such TPU slice; must be one of {known} and a shape, as in "
        "v5e:4x4 or v5p:2x2x1"
    )


def of_device_kind(kind: str) -> Chip | None:
    """The chip of a kind of device, or None."""
    return next((chip for chip in CHIPS if chip.device_kind == kind), None)
