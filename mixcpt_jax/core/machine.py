"""Whether this machine has an accelerator, found without jax."""

import importlib.util
import os
import pathlib
from collections.abc import MutableMapping

# Of PCI devices: Google, NVIDIA, AMD's GPUs.
_ACCELERATOR_VENDORS = ("0x1ae0", "0x10de", "0x1002")


def choose_platform(
    environment: MutableMapping[str, str] = os.environ,
    system: pathlib.Path = pathlib.Path("/"),
) -> None:
    """Avoids libtpu's warnings on a machine that has the package `libtpu` but no TPU.

    Sets `JAX_PLATFORMS=cpu`, before jax is imported, if that is not set and neither a
    device file nor the PCI bus shows an accelerator.
    """
    if "JAX_PLATFORMS" in environment or not importlib.util.find_spec("libtpu"):
        return
    if any(name.startswith(("TPU_", "COLAB_TPU")) for name in environment):
        return
    for pattern in ("accel*", "vfio/*", "nvidia*", "kfd"):
        if any((system / "dev").glob(pattern)):
            return
    for file in (system / "sys/bus/pci/devices").glob("*/vendor"):
        if file.read_text().strip() in _ACCELERATOR_VENDORS:
            return
    environment["JAX_PLATFORMS"] = "cpu"
