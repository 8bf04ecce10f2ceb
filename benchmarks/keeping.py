"""What each way of keeping knowledge costs beside plain continual pre-training.

    python -m benchmarks.keeping [--rounds 3]

A student of 8 layers of width 256 and a teacher of 12 layers of width 384 share 8,192
tokens; weights are random, in float32, and rows have 256 tokens. Each line runs one
compiled program on one CPU device:

- four training steps: next-token prediction; the default objective, with the start as the
  teacher; the same with `objective.token_weighting`; and with `teacher.path`;
- measures of held-out text, alone and with the KL from the start;
- one share of a merge: the weights between start and end, and measures of a batch of text;
- sampling, 8 samples of 64 tokens.

FLOPs per token are those of `plan` (`step_plan.count_flops`). Memory is the program's
arguments and temporary memory, as XLA announces them. Time is processor time of all
threads, so other work on the machine changes it little; the rounds of the programs
alternate, and the median counts. The token of a line is a token trained on, measured or
sampled.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import plan_check
from mixcpt_jax import config as config_lib
from mixcpt_jax.evaluation import generation
from mixcpt_jax.models import pretrained, transformer
from mixcpt_jax.planning import step_plan
from mixcpt_jax.runtime import metrics, sharding
from mixcpt_jax.training import steps

ROWS, LENGTH, VOCABULARY = 4, 256, 8192
SAMPLES, NEW_TOKENS = 8, 64
TRAINED = {
    "next-token prediction alone": {"objective.lssd_weight": 0.0},
    "default objective": {},
    "with token weighting": {"objective.token_weighting": "teacher_probability"},
    "with another teacher": {"teacher.path": "teacher.json"},
}


class Side(NamedTuple):
    """A program: what it does, and its costs.

    Attributes:
      flops: per token.
      num_bytes: of memory.
      tokens: of one run.
      run: runs it once and waits.
    """

    flops: float
    num_bytes: int
    tokens: int
    run: Callable[[], Any]


def write_architecture(file: pathlib.Path, layers: int, width: int) -> str:
    architecture = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    file.write_text(json.dumps(architecture))
    return str(file)


def make_config(folder: pathlib.Path, changes: dict[str, Any]):
    config = config_lib.default()
    config.model.architecture = str(folder / "student.json")
    config.model.update(compute_dtype="float32", remat="none")
    config.sources.domain = config_lib.source()
    config.data.update(row_length=LENGTH, batch_size=ROWS)
    config.eval.batch_size = ROWS
    config.update_from_flattened_dict(changes)
    if config.teacher.path:
        config.teacher.path = str(folder / config.teacher.path)
    return config


def train(config, mesh) -> Side:
    step = step_plan.compile_step(config, mesh)
    flops = step_plan.flops_of(step.phase, step.data)
    state, *others = plan_check.random_arguments(step)

    def run():
        nonlocal state
        state, values = step.compiled(state, *others)
        return values

    return Side(flops.model, size_of(step.compiled), ROWS * LENGTH, run)


def size_of(compiled: jax.stages.Compiled) -> int:
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def measuring(model_config: transformer.ModelConfig, forward_flops: float):
    """The programs that run no training step."""
    params, start = (
        transformer.init_params(model_config, jax.random.key(seed)) for seed in (0, 1)
    )
    shape = (ROWS, LENGTH)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, shape, np.int32)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape),
        "segment_ids": np.ones(shape, np.int32),
    }
    network = transformer.make_forward(model_config)
    score = jax.jit(steps.make_eval_step(network))

    def merged(start, end, batch):
        share = jnp.float32(0.5)
        between = jax.tree.map(lambda a, b: (1 - share) * a + share * b, start, end)
        return steps.make_eval_step(network)(between, batch)

    sampler = jax.jit(
        generation.make_generate(model_config, VOCABULARY, "float32"),
        static_argnames=("max_new_tokens", "sampling"),
    )
    prompts = (
        np.zeros((SAMPLES, 8), np.int32),
        np.ones(SAMPLES, np.int32),
        np.arange(SAMPLES, dtype=np.int32),
        0,
        np.array([VOCABULARY - 1], np.int32),
    )
    sampling = {
        "max_new_tokens": NEW_TOKENS,
        "sampling": generation.SamplingParams(1.0),
    }
    alone, both = score.lower(params, batch), score.lower(params, batch, start)
    share = jax.jit(merged).lower(start, params, batch)
    alone, both, share = (lowered.compile() for lowered in (alone, both, share))
    sample = sampler.lower(params, *prompts, **sampling).compile()
    measured = ROWS * LENGTH
    return {
        "measures of text": Side(
            forward_flops, size_of(alone), measured, lambda: alone(params, batch)
        ),
        "measures, with the KL from the start": Side(
            2 * forward_flops,
            size_of(both),
            measured,
            lambda: both(params, batch, start),
        ),
        "a share of a merge": Side(
            forward_flops,
            size_of(share),
            measured,
            lambda: share(start, params, batch),
        ),
        "sampling": Side(
            forward_flops,
            size_of(sample),
            SAMPLES * NEW_TOKENS,
            lambda: sample(params, *prompts),
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        student = write_architecture(folder / "student.json", 8, 256)
        write_architecture(folder / "teacher.json", 12, 384)
        mesh = sharding.make_mesh(config_lib.default().mesh, jax.devices()[:1])
        sides = {
            name: train(make_config(folder, changes), mesh)
            for name, changes in TRAINED.items()
        }
        model_config = pretrained.read_model_config(student)
    passes = (
        step_plan.count_flops(model_config, LENGTH, frozen=frozen).model
        for frozen in ("whole", "none")
    )
    sides |= measuring(model_config, next(passes) - next(passes))
    seconds = {name: [] for name in sides}
    for number in range(args.rounds + 1):
        for name, side in sides.items():
            started = time.process_time()
            jax.block_until_ready(side.run())
            if number:  # the first one warms up
                seconds[name].append((time.process_time() - started) / side.tokens)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    plain, time_of_plain = (next(iter(values.values())) for values in (sides, medians))
    print(
        metrics.table(
            ["per token", "MFLOPs", "of plain", "MiB", "ms", "of plain"],
            [
                [
                    name,
                    f"{side.flops / 1e6:.1f}",
                    f"{side.flops / plain.flops:.2f}",
                    f"{side.num_bytes / 2**20:.0f}",
                    f"{1000 * medians[name]:.2f}",
                    f"{medians[name] / time_of_plain:.2f}",
                ]
                for name, side in sides.items()
            ],
        )
    )


if __name__ == "__main__":
    main()
