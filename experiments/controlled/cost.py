"""What a step of each arm costs, from the step as it is compiled for this machine.

    python -m experiments.controlled.cost

Writes `cost.json`: arm -> floating point operations of matrix products a token, and the
bytes of the step's arguments (weights, optimizer, teacher) and of its temporary arrays.
Seconds are in the records of the cells.
"""

import json
import pathlib
import tempfile

import jax

from experiments.arms import ARMS
from experiments.controlled import world
from experiments.controlled.config import BATCH_SIZE, ROW_LENGTH, Cell, make
from mixcpt_jax import config as config_lib
from mixcpt_jax import hlo, main, phase, train

FILE = pathlib.Path(__file__).parent / "cost.json"


def measure(arm: str, folder: pathlib.Path, start: pathlib.Path) -> dict[str, float]:
    """The cost of an arm's step on one device; `start` is a base's workdir."""
    cell = Cell(str(folder), arm, start=str(start))
    config = config_lib.for_phase(make(cell), "cpt")
    config.mesh.data, config.mesh.fsdp = 1, 1
    begun = phase.start(config, str(folder / "runs" / arm), arm)
    data = begun.load_data()
    with jax.set_mesh(begun.mesh):
        program = train.make_program(begun, data)
        batch = {
            name: jax.ShapeDtypeStruct((BATCH_SIZE, ROW_LENGTH), array.dtype)
            for name, array in data.packed[0].empty_row().items()
        }
        lowered = program.train_step.lower(program.state, program.frozen, batch)
        compiled = lowered.compile()
    memory = compiled.memory_analysis()
    return {
        "flops_per_token": hlo.Module(compiled.as_text()).flops
        / BATCH_SIZE
        / ROW_LENGTH,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def run() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        world.write(folder, 0)
        start = folder / "base"
        main.run(make(Cell(str(folder), base_steps=1)), str(start))
        costs = {arm: measure(arm, folder, start) for arm in ARMS}
    FILE.write_text(json.dumps(costs, indent=1) + "\n")


if __name__ == "__main__":
    run()
