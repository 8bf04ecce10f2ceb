"""Compares the plain CPT step with MaxText's, compiled for one slice, by one cost model.

    python3.12 -m venv ENVIRONMENT      # outside of this clone
    ENVIRONMENT/bin/pip install 'jax[tpu]' absl-py aqtp drjax etils flax grain \\
        huggingface-hub jinja2 ml-collections omegaconf optax orbax-checkpoint \\
        pathwaysutils pillow pydantic qwix sentencepiece sympy tensorboardx tiktoken \\
        tokamax transformers
    ENVIRONMENT/bin/pip install --no-deps maxtext
    python -m benchmarks.side_by_side --environment ENVIRONMENT --folder FOLDER

Both compile one step of next-token prediction: float32 weights and moments, bfloat16
products, full rematerialization, the same rows per chip and splash attention. MaxText's
`train_compile` runs in its own environment. The folder keeps the compiled modules, and the
next run reads them. `planning.hlo` reads both: FLOPs of products and kernels,
bytes between chips, the roofline time of `plan`, and the compiler's own estimate in cycles
of a core. Needs libtpu in both environments; each compilation takes minutes.
"""

import argparse
import json
import os
import pathlib
import subprocess
from typing import NamedTuple

import jax

from configs import presets
from mixcpt_jax.core import chips
from mixcpt_jax.core.chips import GIB
from mixcpt_jax.models import pretrained
from mixcpt_jax.planning import hlo, step_plan
from mixcpt_jax.runtime import metrics, sharding

# Name in `assets/architectures` -> in MaxText.
MODELS = {"llama3_8b": "llama3-8b", "qwen25_1b5": "qwen2.5-1.5b"}
SLICE, CHIPS = "v5e-16", 16
ROW_LENGTH = 4096

# Runs in MaxText's environment: compiles as `train_compile` does, and keeps the module.
PROGRAM = """
import json, os, pathlib, sys
os.environ["TPU_SKIP_MDS_QUERY"] = os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
from maxtext.trainers.pre_train import train_compile
compile_step = train_compile.jit_and_compile
def compile_and_keep(*args, **kwargs):
    compiled = compile_step(*args, **kwargs)
    peak = compiled.memory_analysis().peak_memory_in_bytes
    pathlib.Path(sys.argv[1] + ".hlo").write_text(compiled.as_text())
    pathlib.Path(sys.argv[1] + ".json").write_text(json.dumps({"peak": peak}))
    return compiled
train_compile.jit_and_compile = compile_and_keep
config = pathlib.Path(train_compile.__file__).parents[2] / "configs" / "base.yml"
train_compile.main(["train_compile", str(config), *sys.argv[2:]])
"""


class Compiled(NamedTuple):
    """A compiled step: the module's text, and the peak of a chip's memory in bytes."""

    text: str
    peak: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environment", type=pathlib.Path, required=True)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--model", choices=MODELS, default="llama3_8b")
    parser.add_argument("--rows", type=int, default=2, help="of a chip")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_platforms", "cpu")
    config = presets.get_config(args.model, SLICE, args.rows, fsdp=(16, 64))
    config.data.batch_size = config.eval.batch_size = CHIPS * args.rows
    config.optimizer.accumulation_steps = 1
    config.objective.ntp_weight, config.objective.lssd_weight = 1.0, 0.0
    sides = {
        "mixcpt_jax": lambda path: ours(config),
        "MaxText": lambda path: maxtext(args, path),
    }
    rows = []
    for number, (name, compile_step) in enumerate(sides.items()):
        path = args.folder / f"{args.model}.{number}"
        rows.append([name, *measures(config, kept(path, compile_step))])
        print(metrics.table(COLUMNS, rows), flush=True)


def kept(path: pathlib.Path, compile_step) -> Compiled:
    """Reads a compiled step, or compiles it and keeps it."""
    text, facts = (path.parent / f"{path.name}.{end}" for end in ("hlo", "json"))
    if not text.exists():
        compiled = compile_step(path)
        text.write_text(compiled.text)
        facts.write_text(json.dumps({"peak": compiled.peak}))
    return Compiled(text.read_text(), json.loads(facts.read_text())["peak"])


def ours(config) -> Compiled:
    """Our step, as `plan` compiles it."""
    mesh = sharding.make_topology_mesh(config.mesh.topology, config.mesh)
    compiled = step_plan.compile_step(config, mesh).compiled
    return Compiled(compiled.as_text(), compiled.memory_analysis().peak_memory_in_bytes)


def maxtext(args: argparse.Namespace, path: pathlib.Path) -> Compiled:
    """MaxText's step, compiled in its environment, with its defaults except these flags."""
    flags = {
        "model_name": MODELS[args.model],
        "compile_topology": SLICE,
        "compile_topology_num_slices": 1,
        "per_device_batch_size": args.rows,
        "max_target_length": ROW_LENGTH,
        "remat_policy": "full",
        "enable_dropout": False,
        "run_name": "side_by_side",
        "base_output_directory": args.folder,
    }
    python = args.environment / "bin" / "python"
    command = [python, "-c", PROGRAM, path, *(f"{k}={v}" for k, v in flags.items())]
    # Variables of this process name its own libtpu.
    own = ("JAX_", "LIBTPU_", "PYTHON", "TPU_", "XLA_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    subprocess.run(command, check=True, env=env | {"JAX_PLATFORMS": "cpu"})
    return Compiled(
        pathlib.Path(f"{path}.hlo").read_text(),
        json.loads(pathlib.Path(f"{path}.json").read_text())["peak"],
    )


COLUMNS = [
    "step",
    "HBM GiB",
    "FLOPs, of the model's",
    "GiB into a chip",
    "s of work",
    "by the compiler's cycles",
    "s waited",
    "s of overlapped transfers",
    "tokens/s",
    "MFU bound",
]


def measures(config, compiled: Compiled) -> list[str]:
    """The other columns, by the cost model of `plan`."""
    topology = config.mesh.topology
    chip = chips.of_topology(topology)
    mesh = sharding.make_topology_mesh(topology, config.mesh)
    shape = pretrained.read_model_config(config.model.architecture)
    tokens = config.data.batch_size * ROW_LENGTH
    module = hlo.Module(compiled.text)
    kernels = step_plan.attention_flops(module, shape, ROW_LENGTH)
    kernels *= config.data.batch_size
    model = step_plan.count_flops(shape, ROW_LENGTH).model * tokens
    moved = step_plan.collectives_of(module, mesh, topology)
    seconds = step_plan.time_of(module, mesh, chip, moved, kernels, model, tokens)
    return [
        f"{compiled.peak / GIB:.2f}",
        f"{(module.flops * CHIPS + kernels) / model:.3f}",
        f"{sum(row['bytes'] for row in moved) / GIB:.1f}",
        f"{seconds['compute and memory']:.3f}",
        f"{module.cycles / chip.cycles:.3f}",
        f"{seconds['collectives, waited for']:.3f}",
        f"{seconds['collectives, overlapped']:.3f}",
        f"{seconds['tokens per second']:,.0f}",
        f"{seconds['mfu bound']:.3f}",
    ]


if __name__ == "__main__":
    main()
