"""Prints the memory that a training step needs on one device, by model and method.

    python -m benchmarks.gpu_memory

By `step_plan.step_memory`, an upper estimate: computed, not measured. The steps have LSSD
with the teacher in the step, full rematerialization, and one row of 4,096 tokens in a
microbatch.
"""

import argparse
import pathlib

from configs import cpt
from mixcpt_jax.core.chips import GIB
from mixcpt_jax.models import pretrained
from mixcpt_jax.planning import step_plan
from mixcpt_jax.runtime import metrics
from mixcpt_jax.training import phase

# Advertised gigabytes -> GiB that a run gets with XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 of
# what the smallest common card of this size reports (L4, L40S, H100).
GPUS = {"24": 0.92 * 22.0, "48": 0.92 * 44.5, "80": 0.92 * 79.0}

_HALF = {"optimizer.moments_dtype": "bfloat16"}
METHODS = {
    "full": {},
    "full, moments in bfloat16": _HALF,
    "full, weights too": _HALF | {"model.param_dtype": "bfloat16"},
    "LoRA, rank 16": {"lora.rank": 16},
}
ARCHITECTURES = pathlib.Path(phase.__file__).parents[1] / "assets" / "architectures"


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    print(table())


def table(names: tuple[str, ...] = ()) -> str:
    """GiB by method, for the named architectures or all, smallest first."""
    rows = []
    for path in ARCHITECTURES.glob("*.json"):
        if names and path.stem not in names:
            continue
        model_config = pretrained.read_model_config(str(path))
        number = phase.num_parameters(model_config)
        cells = []
        for changes in METHODS.values():
            config = cpt.get_config()
            config.mesh.fsdp = 1
            config.update_from_flattened_dict(changes)
            needed = step_plan.step_memory(config, model_config, (1, 1, 1), 1, 4096)
            cells.append(f"{needed / GIB:.1f} {smallest_gpu(needed / GIB)}".strip())
        rows.append((number, [path.stem, f"{number / 1e9:.2f}", *cells]))
    columns = ["model", "billion parameters", *METHODS]
    return metrics.table(columns, [row for _, row in sorted(rows)])


def smallest_gpu(gib: float) -> str:
    """Such as "(24)", the smallest GPU on which a step fits, in GB; "" if none does."""
    return next((f"({size})" for size, room in GPUS.items() if gib <= room), "")


if __name__ == "__main__":
    main()
