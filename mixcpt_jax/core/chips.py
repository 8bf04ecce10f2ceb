"""Peak figures of chips.

Peaks and bandwidths are those of Google's system architecture pages
(docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x) and of "How to Scale Your Model"
(jax-ml.github.io/scaling-book); usable memory is the compiler's figure.
"""

import dataclasses
import math
import re
from typing import NamedTuple

from mixcpt_jax.core.errors import InputError

GIB = 2**30

# Bytes per second between a chip and the memory of its host. Google publishes none; this
# assumes PCIe 3.0 with 16 lanes, in one direction at a time.
HOST_BANDWIDTH = 16e9


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU generation.

    jax has one device per chip, but two per TPU7x: there, all figures are of one core.

    Attributes:
      name: as in a topology, "v5e:4x4".
      device_kind: as in `jax.Device.device_kind`.
      flops: bfloat16, per second.
      hbm_bandwidth: bytes per second.
      hbm_bytes: memory that a program may use.
      link_bandwidth: bytes per second from one neighbor in the torus.
      wraps_from: a side of a slice with at least this many chips is a ring; a shorter one
        is a line.
      cycles: of a core, per second; NaN if not published.
      dcn_bandwidth: bytes per second over the data center network, which connects slices.
      config_name: of the compiler, where it needs one for one device per chip.
      num_devices: of jax, per chip.
      device: what such a device is.
    """

    name: str
    device_kind: str
    flops: float
    hbm_bandwidth: float
    hbm_bytes: int
    link_bandwidth: float
    wraps_from: int
    cycles: float
    dcn_bandwidth: float
    config_name: str | None = None
    num_devices: int = 1
    device: str = "chip"


# Google publishes no bandwidth between slices of v4; v5p's is taken. A pod of 256 v5e chips
# has 6.4 Tbit/s. A TPU7x chip has 2,307 TFLOP/s, 7,380 GB/s, links of 90 GB/s, 100 Gbit/s.
# fmt: off
CHIPS = (
    Chip("v4", "TPU v4", 275e12, 1200e9, int(30.75 * GIB), 45e9, 4, 1.05e9, 6.25e9,
         config_name="megacore"),
    Chip("v5e", "TPU v5 lite", 197e12, 819e9, int(15.75 * GIB), 45e9, 16, 1.5e9, 3.125e9),
    Chip("v5p", "TPU v5", 459e12, 2765e9, int(95.74 * GIB), 90e9, 4, 1.75e9, 6.25e9),
    Chip("v6e", "TPU v6 lite", 918e12, 1638e9, int(31.25 * GIB), 90e9, 16, 1.75e9, 12.5e9),
    Chip("tpu7x", "TPU7x", 1153.5e12, 3690e9, int(94.75 * GIB), 45e9, 4, math.nan, 6.25e9,
         num_devices=2, device="core"),
)
# fmt: on


class Topology(NamedTuple):
    """What a name of slices means: "v5e:16x16", or "v5e:16x16*4" for four of them.

    Attributes:
      chip: of all slices.
      sides: numbers of chips along the axes of a slice's torus.
      num_slices: how many slices there are.
    """

    chip: Chip
    sides: tuple[int, ...]
    num_slices: int

    @classmethod
    def parse(cls, name: str) -> "Topology":
        """
        Raises:
          InputError: the chip is not supported, or the rest is not of this form.
        """
        chip = of_topology(name)
        found = re.fullmatch(r"[^:]*:(\d+(?:x\d+)*)(?:\*([1-9]\d{0,3}))?", name)
        if not found:
            raise InputError(
                f"{name}: no slice has this shape; write it as v5e:16x16 or v5p:2x2x1, and "
                "v5e:16x16*4 for four slices"
            )
        return cls(chip, tuple(map(int, found[1].split("x"))), int(found[2] or 1))

    @property
    def num_devices(self) -> int:
        """The devices of jax in one slice."""
        return math.prod(self.sides) * self.chip.num_devices

    @property
    def of_slice(self) -> str:
        """The name of one slice."""
        return f"{self.chip.name}:{'x'.join(map(str, self.sides))}"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A model of GPU, by the manufacturer's data sheet.

    Attributes:
      name: how its `jax.Device.device_kind` begins.
      flops: bfloat16 with float32 sums, dense, per second.
      hbm_bandwidth: bytes per second.
    """

    name: str
    flops: float
    hbm_bandwidth: float


# The first match counts.
_GPUS = (
    Gpu("NVIDIA B200", 2250e12, 8000e9),
    Gpu("NVIDIA GH200", 989e12, 4000e9),
    Gpu("NVIDIA H200", 989e12, 4800e9),
    Gpu("NVIDIA H100 PCIe", 756e12, 2000e9),
    Gpu("NVIDIA H100", 989e12, 3350e9),
    Gpu("NVIDIA A100", 312e12, 1555e9),
    Gpu("NVIDIA A10G", 70e12, 600e9),
    Gpu("NVIDIA A10", 125e12, 600e9),
    Gpu("NVIDIA L40S", 362e12, 864e9),
    Gpu("NVIDIA L40", 181e12, 864e9),
    Gpu("NVIDIA L4", 121e12, 300e9),
    Gpu("NVIDIA RTX A6000", 155e12, 768e9),
    Gpu("NVIDIA GeForce RTX 4090", 165e12, 1008e9),
    Gpu("NVIDIA GeForce RTX 3090", 71e12, 936e9),
)


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOPs per second of a kind of device; None if it is not known."""
    found = of_device_kind(device_kind) or _gpu(device_kind)
    return found.flops if found else None


def flops_per_byte(device_kind: str) -> float | None:
    """FLOPs in the time it takes to read one byte of memory; None if not known."""
    found = of_device_kind(device_kind) or _gpu(device_kind)
    return found.flops / found.hbm_bandwidth if found else None


def _gpu(device_kind: str) -> Gpu | None:
    return next((gpu for gpu in _GPUS if device_kind.startswith(gpu.name)), None)


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
