"""Compares the plan of a step with a step that ran.

    python -m benchmarks.plan_check [--rows 4] [--row_length 512] [--layers 30]

The step is LSSD with SmolLM2-135M's architecture, its teacher and random weights, on one
CPU device. The table compares the FLOPs of the compiled products with the formula, the
memory that the compiler planned with that of the process, and the FLOPs per second of the
step with those of one large product on the same core.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import resource
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from configs import cpt
from mixcpt_jax.core.chips import GIB
from mixcpt_jax.planning import hlo, step_plan
from mixcpt_jax.runtime import metrics, sharding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--row_length", type=int, default=512)
    parser.add_argument("--remat", nargs="+", default=["full", "dots", "none"])
    arguments = parser.parse_args()
    config = cpt.get_config()
    config.model.architecture = (
        "package:mixcpt_jax/assets/architectures/smollm2_135m.json"
    )
    config.model.compute_dtype = config.model.teacher_dtype = "float32"
    config.data.row_length = arguments.row_length
    config.data.batch_size = config.eval.batch_size = arguments.rows
    rows = []
    for remat in arguments.remat:
        config.model.remat = remat
        # One process per step, whose peak memory is that of the step.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
            figures = pool.submit(measure, config.to_json()).result()
        rows.append([f"remat {remat}", *figures])
    print(
        metrics.table(
            [
                "",
                "products, formula",
                "attention, formula",
                "compiled",
                "compiled / formula",
                "GiB announced",
                "GiB taken",
                "s/step",
                "GFLOP/s",
                "of a product's",
            ],
            rows,
        )
    )


def measure(settings: str) -> list[str]:
    """Compiles and runs one step; returns the measured and the planned numbers."""
    config = ml_collections.ConfigDict(json.loads(settings))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    step = step_plan.compile_step(config, mesh)
    flops = step_plan.flops_of(step.phase, step.data)
    tokens = config.data.batch_size * config.data.row_length
    compiled = hlo.Module(step.compiled.as_text()).flops
    analysis = step.compiled.memory_analysis()
    announced = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    before = _resident()
    state, *others = random_arguments(step)
    seconds = []
    for _ in range(2):
        started = time.monotonic()
        state, values = step.compiled(state, *others)
        jax.block_until_ready(values)
        seconds.append(time.monotonic() - started)
    taken = _peak() - before
    rate = compiled / min(seconds)
    return [
        f"{flops.products * tokens:.4g}",
        f"{flops.attention * tokens:.3g}",
        f"{compiled:.4g}",
        f"{compiled / ((flops.products + flops.attention) * tokens):.3f}",
        f"{announced / GIB:.2f}",
        f"{taken / GIB:.2f}",
        f"{min(seconds):.2f}",
        f"{rate / 1e9:.0f}",
        f"{rate / _product_rate():.2f}",
    ]


def random_arguments(step: step_plan.Step) -> tuple[Any, ...]:
    """Arguments for `step.compiled`."""
    rng = np.random.default_rng(0)

    def make(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            value = 0.02 * rng.standard_normal(leaf.shape, np.float32)
        else:
            value = np.zeros(leaf.shape)
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

    program = step.program
    state, frozen, teacher = (
        jax.tree.map(make, tree)
        for tree in (program.state, program.frozen, program.teacher)
    )
    moments = jax.tree.map(jnp.zeros_like, state.opt_state)
    row = step.data.packed[0][0]
    batch = {
        key: jax.device_put(np.stack([row[key]] * leaf.shape[0]), leaf.sharding)
        for key, leaf in step.batch.items()
    }
    return state._replace(opt_state=moments), frozen, batch, teacher


def _product_rate() -> float:
    """FLOPs per second of one product."""
    x = jnp.ones((2048, 2048), jnp.float32)
    product = jax.jit(lambda x: x @ x).lower(x).compile()
    seconds = []
    for _ in range(4):
        started = time.monotonic()
        product(x).block_until_ready()
        seconds.append(time.monotonic() - started)
    return 2 * 2048**3 / min(seconds)


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
