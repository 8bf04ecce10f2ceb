"""The cost of a step of each arm, compiled for this machine.

    python -m experiments.controlled.cost

Writes `cost.json`: arm -> FLOPs of matrix products per token, the bytes of the step's
arguments (weights, optimizer, teacher) and of its temporary arrays, seconds per step (the
median of `ROUNDS` in which all arms alternate), and the number of steps of a cell.
"""

import json
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp

from experiments.arms import ARMS
from experiments.controlled import world
from experiments.controlled.config import BATCH_SIZE, ROW_LENGTH, Cell, make
from mixcpt_jax import config as config_lib
from mixcpt_jax import main
from mixcpt_jax.planning import hlo
from mixcpt_jax.training import phase
from mixcpt_jax.training import program as program_lib

FILE = pathlib.Path(__file__).parent / "cost.json"
ROUNDS = 9


def prepare(arm: str, folder: pathlib.Path, start: pathlib.Path):
    """The cost of an arm without the seconds, and a function that runs a step.

    Args:
      arm: of `ARMS`.
      folder: of the world.
      start: a base's workdir.
    """
    cell = Cell(str(folder), arm, start=str(start))
    config = config_lib.for_phase(make(cell), "cpt")
    begun = phase.start(config, str(folder / "runs" / arm), arm)
    data = begun.load_data()
    with jax.set_mesh(begun.mesh):
        program = program_lib.make_program(begun, data)
        batch = {
            name: jax.ShapeDtypeStruct((BATCH_SIZE, ROW_LENGTH), array.dtype)
            for name, array in data.packed[0].empty_row().items()
        }
        arguments = program.state, program.frozen, batch
        compiled = program.train_step.lower(*arguments).compile()
    memory = compiled.memory_analysis()
    cost = {
        "flops_per_token": hlo.Module(compiled.as_text()).flops
        / BATCH_SIZE
        / ROW_LENGTH,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "steps": data.num_steps,
    }
    # The values do not change the time.
    state, frozen, batch = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), arguments
    )

    def step() -> None:
        nonlocal state
        state, metrics = compiled(state, frozen, batch)
        jax.block_until_ready(metrics)

    step()
    return cost, step


def run() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        world.write(folder, 0)
        start = folder / "base"
        main.run(make(Cell(str(folder), base_steps=1)), str(start))
        prepared = {arm: prepare(arm, folder, start) for arm in ARMS}
    seconds = {arm: [] for arm in ARMS}
    for _ in range(ROUNDS):
        for arm, (_, step) in prepared.items():
            begun = time.perf_counter()
            step()
            seconds[arm].append(time.perf_counter() - begun)
    costs = {
        arm: cost | {"seconds": statistics.median(seconds[arm])}
        for arm, (cost, _) in prepared.items()
    }
    FILE.write_text(json.dumps(costs, indent=1) + "\n")


if __name__ == "__main__":
    run()
