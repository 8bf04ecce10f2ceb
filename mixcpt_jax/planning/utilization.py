"""How well a run uses its devices: achieved FLOPs, MFU, memory."""

import math
import os

import jax

from mixcpt_jax.core import chips, mesh_shape
from mixcpt_jax.data import pipeline
from mixcpt_jax.planning import step_plan
from mixcpt_jax.training import phase as phase_lib


class Utilization:
    """The use that a training phase makes of its devices.

    FLOPs are those of the model by `step_plan.count_flops`: of student, teacher, head and
    attention, without rematerialization.
    """

    def __init__(self, phase: phase_lib.Phase, data: pipeline.Data):
        flops = step_plan.flops_of(phase, data)
        self._devices = phase.mesh.local_devices
        self._flops_per_token = flops.model / phase.mesh.size
        self._peak = chips.peak_flops(self._devices[0].device_kind) or math.nan

    def of(self, tokens_per_second: float) -> dict[str, float]:
        """The use at a speed.

        Args:
          tokens_per_second: of all devices; NaN if unknown.

        Returns:
          `tflops_per_device`; `mfu`, the share of the device's bfloat16 peak, NaN if the
          peak is not known; and, where devices report it, `memory_gib` and
          `peak_memory_gib` of the fullest local device.
        """
        achieved = self._flops_per_token * tokens_per_second
        use = {"tflops_per_device": achieved / 1e12, "mfu": achieved / self._peak}
        memory = [m for device in self._devices if (m := _memory(device))]
        if memory:
            in_use, peak, _ = map(max, zip(*memory, strict=True))
            use |= {"memory_gib": in_use / 2**30, "peak_memory_gib": peak / 2**30}
        return use


def planned_memory(phase: phase_lib.Phase) -> float:
    """Bytes of a device that a step needs at most, see `step_plan.step_memory`."""
    config = phase.config
    mesh = mesh_shape.mesh_shape(config.mesh, phase.mesh.size)
    rows = config.data.batch_size / mesh[0] / mesh[1]
    rows = math.ceil(rows / config.optimizer.accumulation_steps)
    return step_plan.step_memory(
        config, phase.model_config, mesh, rows, config.data.row_length
    )


def memory_of(device: jax.Device) -> float:
    """Bytes of memory that a program may use on a device."""
    if chip := chips.of_device_kind(device.device_kind):
        return chip.hbm_bytes
    if found := _memory(device):
        return found[2]
    # Virtual CPU devices share the memory of their host.
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages / jax.local_device_count()


def _memory(device: jax.Device) -> tuple[int, int, int] | None:
    """Bytes in use, their peak and the limit of a device; None if it does not say."""
    found = device.memory_stats() if device.platform != "cpu" else None
    if not found or "bytes_in_use" not in found:
        return None
    peak = found.get("peak_bytes_in_use", found["bytes_in_use"])
    return found["bytes_in_use"], peak, found.get("bytes_limit", 0)
