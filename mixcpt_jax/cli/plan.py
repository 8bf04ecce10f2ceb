"""Memory and time of a training step on a TPU slice, without the slice.

    python -m mixcpt_jax plan --config=configs/llama3_8b.py --topology=v5e:4x4 \\
        [--phase=cpt] [--search] [--output=plan.json] [--config.data.batch_size=32 ...]

Compiles the training step of a phase for the slice, from shapes alone: no TPU, no weights
and no text are needed, only the package `libtpu`, which comes with `jax[tpu]`. Prints,
and writes as JSON,

- the memory of a chip: the step's arguments, the compiler's temporary memory, and the
  chip's capacity. The compiler itself decides whether the step fits;
- FLOPs: of the model (`count_flops`), of rematerialization, and of the compiled program;
- bytes between chips, and whether computation overlaps with the transfers;
- what waits in the host's memory, if anything, and how long the chip waits for it;
- modeled time: each instruction runs at the peak of matrix products or of memory, whichever
  bounds it, one after another; collectives run at the bandwidth of their group's links. It
  is a lower bound, so tokens per second and MFU are upper bounds.

For a step that does not fit it prints by how much, and settings that would fit. `--search`
tries meshes, rematerialization and microbatches, and prints those that fit, fastest first.
"""

import os
from typing import Any

from absl import flags

from mixcpt_jax import main as command_line
from mixcpt_jax.core import paths
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.runtime import terminal

flags.adopt_module_key_flags(command_line)
_TOPOLOGY = flags.DEFINE_string(
    "topology", "", "The slice, such as v5e:4x4; empty: mesh.topology."
)
_SEARCH = flags.DEFINE_bool(
    "search", False, "Search for the fastest settings that fit."
)
_OUTPUT = flags.DEFINE_string("output", "", "A JSON file for the results.")


def main(argv: list[str]) -> None:
    # Shapes need no device, and the compilation cache cannot load programs for absent
    # devices.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    config, workdir = command_line.read(argv)
    output = _OUTPUT.value and paths.output_file(_OUTPUT.value)
    name, config = command_line.training_phase(
        command_line.phase_configs(config, workdir)
    )
    topology = _TOPOLOGY.value or config.mesh.topology
    if not topology:
        raise InputError(
            "--topology: is missing; name the slice, as in --topology=v5e:4x4"
        )
    # Imported here so that --help does not wait for jax.
    from mixcpt_jax.planning import step_plan

    if _SEARCH.value:
        plans = step_plan.search(config, topology)
        terminal.show(step_plan.search_table(plans))
        result: Any = plans
    else:
        result = step_plan.make(config, topology)
        terminal.show(f"{name}: {step_plan.describe(result)}")
        if not result["fits"]:
            terminal.show(step_plan.advise(config, topology))
    if output:
        paths.replace(output, paths.to_json(result, indent=1))


def start() -> None:
    """Runs the command from the command line."""
    command_line.launch(main)
