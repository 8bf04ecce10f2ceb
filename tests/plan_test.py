"""Plans agree with the compiler and the formula, and advise if a step does not fit."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from configs import cpt, presets
from mixcpt_jax import config as config_lib
from mixcpt_jax.core import chips
from mixcpt_jax.core.chips import GIB
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.models import pretrained, transformer
from mixcpt_jax.planning import hlo, step_plan
from mixcpt_jax.runtime import sharding
from mixcpt_jax.training import phase

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
pytestmark = pytest.mark.usefixtures("compiled_anew")
PRESETS = sorted(
    file.stem
    for file in pathlib.Path(presets.__file__).parent.glob("*.py")
    if "presets.get_config" in file.read_text()
)


def slices(name):
    """Those that a preset is for; large models need large ones."""
    module = importlib.import_module(f"configs.{name}")
    return getattr(module, "SLICES", tuple(presets.SLICES))


# Compiled as they would run, and quickly; with `PLAN_PRESETS=all` every preset is, which
# takes an hour.
WHOLE = [("llama3_8b", "v5e-16")]
QUICK = [("gemma2_2b", "v6e-16")]
if os.environ.get("PLAN_PRESETS") == "all":
    least = {"v5e-16", "v5p-8", "v6e-16"}
    WHOLE = [(name, part) for name in PRESETS for part in slices(name)]
    QUICK = [(name, part) for name, part in WHOLE if part in least]

SMALL = {
    "model_type": "llama",
    "vocab_size": 32064,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_theta": 5e5,
    "head_dim": 128,
}


def small(folder, **settings):
    (folder / "small.json").write_text(json.dumps(SMALL | settings))
    config = cpt.get_config()
    config.model.architecture = str(folder / "small.json")
    config.data.row_length, config.data.batch_size = 2048, 4
    config.eval.batch_size = 4
    return config


@pytest.fixture
def config(tmp_path):
    return small(tmp_path)


def preset(name, part):
    module = importlib.import_module(f"configs.{name}")
    return module.get_config(part)


@pytest.mark.slow
def test_the_formula_counts_the_products_that_are_compiled(config):
    """On one CPU device, where attention is products as well."""
    config.model.compute_dtype = config.model.teacher_dtype = "float32"
    config.data.row_length, config.data.batch_size = 256, 2
    config.eval.batch_size = 2
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    for remat in config_lib.REMAT:
        config.model.remat = remat
        step = step_plan.compile_step(config, mesh)
        counted = step_plan.count_flops(step.phase.model_config, 256, remat, "whole")
        compiled = hlo.Module(step.compiled.as_text()).flops / 512
        # Blocks of 128 queries see 3/4 of the pairs where causality leaves half, and
        # some of attention is done again.
        more = compiled - counted.products
        assert counted.attention <= more <= 2 * counted.attention + 0.01 * compiled


def test_the_formula_counts_the_frozen_model():
    shape = pretrained.read_model_config(
        "package:mixcpt_jax/assets/architectures/llama3_8b.json"
    )
    alone = step_plan.count_flops(shape, 4096)
    with_teacher = step_plan.count_flops(shape, 4096, frozen="whole")
    read = step_plan.count_flops(shape, 4096, frozen="unembedding")
    weights_of_layers = 32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336)
    assert alone.student == 6 * weights_of_layers
    assert with_teacher.teacher == 2 * weights_of_layers
    assert read.teacher == 0
    assert read.head - alone.head == 2 * 4096 * 128256
    assert with_teacher.attention / alone.attention == pytest.approx(4 / 3)
    adapted = step_plan.count_flops(shape, 4096, has_adapters=True)
    assert adapted.student == 4 * weights_of_layers
    # A token sees (L + 1) / 2 of its row on average; less with a window.
    assert alone.attention == 3 * 2 * 32 * 4096 * 4097
    windowed = dataclasses.replace(shape, sliding_window=1)
    assert step_plan.count_flops(windowed, 4096).attention == 3 * 4 * 32 * 4096
    # If a norm follows it, the last product of a layer is repeated too.
    again = [
        step_plan.count_flops(s, 4096, "full").rematerialization
        for s in (shape, dataclasses.replace(shape, post_norms=True))
    ]
    assert again[1] - again[0] == 2 * 32 * 4096 * 14336
    mixed = dataclasses.replace(windowed, global_layers=(1, 3))
    one = alone.attention / 32, 3 * 4 * 4096
    expected = 2 * one[0] + 30 * one[1]
    assert step_plan.count_flops(mixed, 4096).attention == expected


@pytest.mark.slow
@needs_libtpu
@pytest.mark.usefixtures("compiled_quickly")
def test_a_plan_of_a_small_step(config):
    made = step_plan.make(config, "v5e:2x2")
    assert made["fits"]
    memory, flops, times = made["memory"], made["flops"], made["time"]
    weights_of = transformer.abstract_params(
        pretrained.read_model_config(config.model.architecture)
    )
    number = sum(leaf.size for leaf in jax.tree.leaves(weights_of))
    # A quarter of each matrix, and all of the norms.
    assert number <= memory["parameters"] <= 1.01 * number
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=1e-3)
    # Half of the parameters, but for the scales of norms, which stay float32.
    assert 0.5 < memory["frozen model"] / memory["parameters"] < 0.5005
    assert memory["peak"] <= memory["available"] == int(15.75 * GIB)
    ratio = flops["products, compiled"] / flops["products, by formula"]
    assert 1 <= ratio <= 1.05
    assert flops["attention kernels"] > flops["attention"]
    assert times["step"] >= times["compute and memory"]
    kinds = {row["kind"] for row in made["collectives"]}
    assert "all-gather" in kinds
    assert "mfu bound" in step_plan.describe(made)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.usefixtures("compiled_quickly")
def test_a_plan_of_offloaded_activations(config):
    config.model.remat = "offload"
    made = step_plan.make(config, "v5e:2x2")
    # One row of a chip, in bfloat16, for two layers, to the host and back.
    size = 2 * 2 * config.data.row_length * SMALL["hidden_size"]
    assert made["memory"]["in the host's memory"] == size
    assert made["memory"]["of it activations kept, by formula"] == 0
    host, times = made["host"], made["time"]
    assert host["bytes"] == 2 * size
    assert host["seconds"] == 2 * size / chips.HOST_BANDWIDTH
    assert 0 <= host["waited for"] <= host["seconds"]
    assert times["host's memory, waited for"] == host["waited for"]
    assert times["step"] >= times["compute and memory"] + host["waited for"]
    assert "between a chip and the host's memory" in step_plan.describe(made)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.usefixtures("compiled_quickly")
def test_a_plan_that_does_not_fit_gives_the_excess_and_advice(config):
    config.data.row_length = 256
    config.data.batch_size = config.eval.batch_size = 4096
    config.model.remat = "none"
    made = step_plan.make(config, "v5e:2x2")
    assert not made["fits"]
    over = made["memory"]["needed"] - made["memory"]["available"]
    assert over > 0
    assert f"{over / GIB:.2f} more than" in step_plan.describe(made)
    advice = step_plan.advise(config, "v5e:2x2")
    assert "The step fits, with" in advice


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "devices", "device"),
    [("v5e:2x2", "4 chips", "chip"), ("tpu7x:2x2x1", "8 cores", "core")],
)
def test_a_plan_names_the_devices_of_its_slice(
    config, monkeypatch, topology, devices, device
):
    def refuse(*_):
        raise step_plan.DoesNotFit(96 * GIB, 95 * GIB)

    monkeypatch.setattr(step_plan, "compile_step", refuse)
    text = step_plan.describe(step_plan.make(config, topology))
    assert text.startswith(f"{topology}, {devices} (")
    assert text.endswith(f"1.00 more than the 95.00 of a {device}")


@pytest.mark.slow
@needs_libtpu
@pytest.mark.usefixtures("compiled_quickly")
def test_the_search_prints_the_fastest_that_fit(tmp_path, capsys):
    # One head for keys cannot be split, so few meshes remain.
    config = small(tmp_path, num_key_value_heads=1)
    config.data.row_length = 256
    config.data.batch_size = config.eval.batch_size = 8
    plans = step_plan.search(config, "v5e:2x2", remats=("full",), finalists=2)
    tried, compiled = capsys.readouterr().out.split("as they would run:")
    # Three meshes, each with the two fewest microbatches; of the first there are two.
    assert tried.count(" GiB, ") == 6
    assert compiled.count(" GiB, ") == len(plans) == 2
    steps = [made["time"]["step"] for made in plans]
    assert steps == sorted(steps)


@pytest.mark.slow
@needs_libtpu
def test_a_quick_compilation_has_the_same_products(config):
    quick, whole = (step_plan.make(config, "v5e:2x2", quick) for quick in (True, False))
    done = "products, compiled"
    assert quick["flops"][done] == pytest.approx(whole["flops"][done], rel=1e-3)
    assert received(quick) == pytest.approx(received(whole), rel=0.1)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.usefixtures("compiled_quickly")
def test_between_slices_go_each_gradient_once_a_step_and_scalars(config):
    config.data.row_length, config.optimizer.accumulation_steps = 256, 2
    config.data.batch_size = config.eval.batch_size = 16
    config.mesh.update({"data": 4, "fsdp": 2})
    made = step_plan.make(config, "v5e:2x2*2")
    assert made["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1, "slices": 2}
    crossing = made["between_slices"]
    rows = crossing["rows"]
    # Tiles are padded.
    ratio = rows["gradients"]["bytes"] / crossing["gradients, by formula"]
    assert 0.99 <= ratio <= 1.1
    weights = transformer.abstract_params(
        pretrained.read_model_config(config.model.architecture)
    )
    assert rows["gradients"]["times"] <= len(jax.tree.leaves(weights))
    assert rows["scalars"]["bytes"] < 2**16
    assert rows["other"]["times"] == 0
    seconds = sum(row["seconds"] for row in rows.values())
    assert made["time"]["between slices, waited for"] == seconds > 0
    assert "from other slices into a chip" in step_plan.describe(made)


def test_several_slices_of_a_preset_take_as_many_rows_each():
    one, four = preset("llama3_8b", "v5e-256"), preset("llama3_8b", "v5e-256*4")
    assert four.mesh.topology == "v5e:16x16*4"
    for now, before in (
        (four.mesh.data, one.mesh.data),
        (four.data.batch_size, one.data.batch_size),
    ):
        assert now == 4 * before
    assert four.mesh.fsdp == one.mesh.fsdp
    assert four.optimizer.accumulation_steps == one.optimizer.accumulation_steps
    with pytest.raises(InputError, match="v5e:16x16.two: no slice has this shape"):
        preset("llama3_8b", "v5e-256*two")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_divide_over_their_slices(name):
    for part in slices(name):
        config = preset(name, part)
        config.model.path = "weights"
        for source in config.sources.values():
            source.path = "text"
        size = config.mesh.data * config.mesh.fsdp
        config_lib.validate(config, size)
        shape = pretrained.read_model_config(config.model.architecture)
        phase.check_model(config, shape, size)
        least = step_plan.least_memory(config, shape)
        assert least <= chips.of_topology(config.mesh.topology).hbm_bytes


def received(made, kind="", **facts):
    """Bytes into a chip."""
    return sum(
        row["bytes"]
        for row in made["collectives"]
        if row["kind"].startswith(kind) and facts.items() <= row.items()
    )


def check_that_it_fits(name, part, quick):
    config = preset(name, part)
    made = step_plan.make(config, config.mesh.topology, quick)
    assert made["fits"], step_plan.describe(made)
    flops = made["flops"]
    assert flops["products, compiled"] <= 1.02 * flops["products, by formula"]
    return made


@pytest.mark.long
@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(("name", "part"), QUICK)
def test_presets_fit_small_slices(name, part):
    made = check_that_it_fits(name, part, quick=True)
    if made["mesh"]["fsdp"] > 1:
        # An all-reduce moves each byte of a gradient twice.
        assert 2 * received(made, "reduce-scatter") > received(made, "all-reduce")


@pytest.mark.long
@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(("name", "part"), WHOLE)
def test_presets_fit(name, part):
    made = check_that_it_fits(name, part, quick=False)
    flops = made["flops"]
    if (name, part) == ("llama3_8b", "v5e-16"):
        assert made["time"]["mfu bound"] >= 0.72
        # The inputs of 32 layers of 4,096 bfloat16 numbers for a chip's four rows.
        assert made["memory"]["in the host's memory"] == 4 * 2**30
    if name == "llama3_8b":
        # All FLOPs, rematerialization and attention kernels included.
        done = flops["products, compiled"] + flops["attention kernels"]
        assert done <= 1.35 * flops["model"]
    if name == "llama32_1b" and part == "v5p-8":
        # Without options the compiler overlaps no gather on that chip.
        overlapped, waited_for = (
            received(made, "all-gather", overlapped=is_so) for is_so in (True, False)
        )
        assert overlapped > 2 * waited_for


def test_an_unknown_slice_is_named(config):
    with pytest.raises(InputError, match="v9x:2x2: no such TPU slice"):
        step_plan.make(config, "v9x:2x2")


def test_a_missing_compiler_is_named(config, monkeypatch):
    def describe(**_):
        raise RuntimeError("JAX TPU support not installed; cannot generate topology")

    monkeypatch.setattr(sharding.topologies, "get_topology_desc", describe)
    with pytest.raises(InputError, match="run `pip install 'jax\\[tpu\\]'`"):
        step_plan.make(config, "v5e:2x2")


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:3x5x7", "v5e:4x4*0", "v5e:4x4x*2", "v5e:"])
def test_an_impossible_shape_is_named(config, topology):
    problem = re.escape(topology) + ": no slice has this shape"
    with pytest.raises(InputError, match=problem):
        step_plan.make(config, topology)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.usefixtures("compiled_quickly")
def test_the_command(config, tmp_path):
    """From the command line, with an output file."""
    settings = [
        f"--config.model.architecture={config.model.architecture}",
        "--config.data.row_length=1024",
        "--config.data.batch_size=4",
        "--config.eval.batch_size=4",
        f"--output={tmp_path / 'plan.json'}",
    ]
    command = [sys.executable, "-m", "mixcpt_jax", "plan", "--config=configs/cpt.py"]
    done = subprocess.run(
        [*command, "--topology=v5e:2x2", *settings],
        capture_output=True,
        text=True,
        check=True,
        timeout=1200,
    )
    assert "HBM of a chip" in done.stdout
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["fits"]
    assert written["devices"] == 4
