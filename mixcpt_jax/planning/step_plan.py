"""Memory, FLOPs and time of a training step on a TPU slice, from shapes alone.

The step of a phase is compiled for the slice. FLOPs, traffic and modeled time are read from
the compiled program, see `hlo`. The modeled time is a roofline: each instruction runs at
the chip's peak of FLOPs or of memory bandwidth, whichever takes longer, one instruction
after another; collectives run at the bandwidth of the links that their group spans, and
those between slices at the chip's share of the data center network (`chips.dcn_bandwidth`),
while the chips wait; transfers to the host's memory at `chips.HOST_BANDWIDTH`, beside other
work.
"""

import dataclasses
import itertools
import math
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from mixcpt_jax import config as config_lib
from mixcpt_jax.core import chips, mesh_shape, paths
from mixcpt_jax.core.chips import GIB
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import pipeline
from mixcpt_jax.models import attention, experts, pretrained, transformer
from mixcpt_jax.planning import hlo
from mixcpt_jax.runtime import metrics, sharding, terminal
from mixcpt_jax.training import phase, teacher_outputs
from mixcpt_jax.training import program as program_lib

# For `step_memory`: the number of keys whose attention scores, and of tokens whose logits,
# are live at a time.
_LIVE_KEYS = 512
_LIVE_LOGITS = 1024

# Modes of `model.remat` that compute each layer again from its input.
_FROM_INPUTS = ("full", "offload")

# A transfer between slices of at most this many numbers is of scalars, such as the losses
# of the sources.
_SCALARS = 1024

# The matrix products in splash attention's kernels over the blocks that they visit.
# Forward: the scores and the outputs. Backward for queries: the scores, their gradient and
# that of the queries. Backward for keys: the scores, their gradient, and those of values
# and keys.
_KERNELS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one token, forward and backward; two per multiply-add.

    Attributes:
      student: products with the weights of the layers.
      teacher: the same for the frozen model.
      head: products with both unembeddings.
      attention: scores and outputs; a token attends to half of its row on average.
      rematerialization: products that are computed a second time, without attention.
    """

    student: float
    teacher: float
    head: float
    attention: float
    rematerialization: float

    @property
    def model(self) -> float:
        """All FLOPs except rematerialization."""
        return self.student + self.teacher + self.head + self.attention

    @property
    def products(self) -> float:
        """All matrix products except those of attention."""
        return self.student + self.teacher + self.head + self.rematerialization


def count_flops(
    model_config: transformer.ModelConfig,
    row_length: int,
    remat: str = "none",
    frozen: str = "none",
    has_adapters: bool = False,
    is_preference: bool = False,
    teacher_config: transformer.ModelConfig | None = None,
) -> Flops:
    """FLOPs by formula: `2 N P` per pass, for N layers of P weights each.

    In a mixture of experts, only the experts that process a token count.

    The student has one forward pass and two backward, for the gradients of activations and
    of weights. With adapters there is one backward pass, and the adapters' own products
    are ignored. Attention takes `2 N H K (L + 1)` in the forward pass, less with a window,
    and twice that in the backward pass.

    Args:
      model_config: the architecture.
      row_length: tokens of a row, L.
      remat: of `config.model.remat`. "full" and "offload" repeat the forward pass of each
        layer, except its last product if no norm follows it; "dots" and "none" repeat no
        product.
      frozen: the part of teacher or reference that runs: "whole", "unembedding" or "none".
      has_adapters: whether only adapters are trained.
      is_preference: whether the head sweeps the vocabulary twice, see
        `streamed.log_probabilities`.
      teacher_config: of another teacher; None: as the student.
    """
    c = model_config
    layers, attend, head = _forward_flops(c, row_length)
    of_teacher = _forward_flops(teacher_config or c, row_length)
    back = 1 if has_adapters else 2
    runs = frozen == "whole"
    # The gradient of a norm after the last product needs that product.
    last = 2 * c.num_layers * c.hidden_size * c.active_mlp_size
    last = 0 if c.post_norms else last
    again = layers - last if remat in _FROM_INPUTS else 0.0
    return Flops(
        student=layers * (1 + back),
        teacher=of_teacher[0] * runs,
        head=head * (1 + back) + of_teacher[2] * (frozen != "none"),
        attention=attend * 3 + of_teacher[1] * runs,
        rematerialization=again + head * is_preference,
    )


def flops_of(trained: phase.Phase, data: pipeline.Data) -> Flops:
    """`count_flops` of a training phase."""
    config = trained.config
    return count_flops(
        trained.model_config,
        config.data.row_length,
        config.model.remat,
        program_lib.frozen_passes(config, data),
        trained.lora is not None,
        config.objective.kind == "preference",
        trained.teacher_config,
    )


def _forward_flops(c: transformer.ModelConfig, row_length: int) -> tuple[float, ...]:
    """FLOPs of a token's forward pass: of the layers, of attention and of the head."""
    heads = (c.num_heads + c.num_kv_heads) * c.head_size
    mlp = 3 * c.active_mlp_size + c.num_experts
    layers = 2 * c.num_layers * c.hidden_size * (2 * heads + mlp)
    windows = [min(window or row_length, row_length) for window in c.windows]
    # Sum over the layers, because each may have its own window.
    seen = sum(w - w * (w - 1) / (2 * row_length) for w in windows)
    attend = 4 * c.num_heads * c.head_size * seen
    return layers, attend, 2 * c.hidden_size * c.vocab_size


class DoesNotFit(Exception):
    """A step needs more memory than a chip has; `needed` and `available` are in bytes."""

    def __init__(self, needed: int, available: int):
        super().__init__(f"needs {needed / GIB:.2f} GiB of {available / GIB:.2f}")
        self.needed, self.available = needed, available


class Step(NamedTuple):
    """A compiled training step; `program` and `batch` hold only shapes."""

    phase: phase.Phase
    data: pipeline.Data
    program: program_lib.Program
    batch: dict[str, Any]
    compiled: jax.stages.Compiled


def compile_step(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, quick: bool = False
) -> Step:
    """Compiles the training step that `train` would run, from shapes alone.

    Args:
      config: of a training phase; its start is ignored.
      mesh: of devices that need not exist.
      quick: see `compile_lowered`.

    Raises:
      DoesNotFit: the step needs more memory than a chip has.
      InputError: the config does not fit the model or the mesh.
    """
    config = ml_collections.ConfigDict(config.to_dict())
    model_config = _model_config(config)
    # The weights and the text need not exist.
    config.init_from = ""
    config.model.path = config.model.path or config.model.architecture
    if config.teacher.init_from:
        config.teacher.path = config.teacher.path or config.model.path
        config.teacher.init_from = ""
    for source in config.sources.values():
        source.path = source.path or "planned"
    config_lib.validate(config, mesh.size)
    phase.check_model(config, model_config, mesh.size)
    planned = phase.Phase(
        name="plan",
        folder=paths.absolute("."),
        given=config,
        config=config,
        model_config=model_config,
        tokenizer=None,
        mesh=mesh,
        started=time.monotonic(),
        other_teacher=phase.other_teacher(config, model_config, None, mesh.size),
    )
    reads = config.objective.teacher == "prepared"
    data = pipeline.synthetic(
        config, teacher_outputs.form_of(planned) if reads else None
    )
    # Run this outside the mesh: optax creates zeros here, and the mesh's devices do not
    # exist.
    program = program_lib.make_program(planned, data)
    rows = sharding.batch_sharding(mesh)
    batch = {
        key: jax.ShapeDtypeStruct(
            (config.data.batch_size, *value.shape), value.dtype, sharding=rows
        )
        for key, value in data.packed[0].empty_row().items()
    }
    with jax.set_mesh(mesh):
        lowered = program.train_step.lower(
            program.state, program.frozen, batch, program.teacher
        )
        compiled = compile_lowered(lowered, mesh, quick)
    return Step(planned, data, program, batch, compiled)


def _with(
    config: ml_collections.ConfigDict,
    mesh: dict[str, int] | None = None,
    **changes: Any,
) -> ml_collections.ConfigDict:
    """A copy with another mesh and other settings, given by dotted key."""
    changed = ml_collections.ConfigDict(config.to_dict())
    changed.mesh.update(mesh or {})
    changed.update_from_flattened_dict(changes)
    return changed


def _model_config(config: ml_collections.ConfigDict) -> transformer.ModelConfig:
    return pretrained.read_model_config(config.model.architecture or config.model.path)


def compile_lowered(
    lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh, quick: bool = False
) -> jax.stages.Compiled:
    """Compiles a program for a slice.

    Args:
      lowered: the program.
      mesh: of the slice; its devices need not exist.
      quick: compiles in a third of the time. The program has the same products and
        collectives, but nothing overlaps; its memory is about the same (14.4 instead of
        14.8 GiB for Llama-3-8B on v5e:4x4).

    Raises:
      DoesNotFit: the program needs more memory than a chip has.
    """
    options = {"exec_time_optimization_effort": -1.0} if quick else None
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if found := re.search(r"Used ([\d.]+)G of ([\d.]+)G hbm", text):
            sizes = (int(float(number) * GIB) for number in found.groups())
            raise DoesNotFit(*sizes) from error
        if found := re.search(r"\(([\d.]+)([GT])\) exceeds available HBM", text):
            chip = chips.of_device_kind(mesh.devices.flat[0].device_kind)
            unit = {"G": GIB, "T": 1024 * GIB}[found[2]]
            raise DoesNotFit(int(float(found[1]) * unit), chip.hbm_bytes) from error
        raise


def make(
    config: ml_collections.ConfigDict, topology: str, quick: bool = False
) -> dict[str, Any]:
    """Plans the step of a phase on a slice.

    Args:
      config: of a training phase.
      topology: of the slice, such as "v5e:4x4", or of several, such as "v5e:16x16*4".
      quick: see `compile_lowered`; the modeled time is then without overlap.

    Returns:
      A tree for JSON: bytes, FLOPs and seconds. If `fits` is false, it holds only the
      memory that the step would need.

    Raises:
      InputError: the config does not fit the model or the slice.
    """
    chip = chips.of_topology(topology)
    mesh = sharding.make_topology_mesh(topology, config.mesh)
    started = time.monotonic()
    result: dict[str, Any] = {
        "topology": topology,
        "devices": mesh.size,
        "device": chip.device,
        "mesh": sharding.sizes_of(mesh),
        "batch_size": config.data.batch_size,
        "row_length": config.data.row_length,
        "accumulation_steps": config.optimizer.accumulation_steps,
        "remat": config.model.remat,
    }
    try:
        step = compile_step(config, mesh, quick)
        memory = _memory(step, chip)
        if memory["peak"] > memory["available"]:
            raise DoesNotFit(memory["peak"], memory["available"])
    except DoesNotFit as refusal:
        memory = {"needed": refusal.needed, "available": refusal.available}
        return result | {"fits": False, "memory": memory}
    taken = _taken(step.phase.model_config, config.mesh.expert)
    module = hlo.Module(step.compiled.as_text(), branch_shares=(1 - taken, taken))
    flops = _flops(step, module)
    collectives = collectives_of(module, mesh, topology)
    crossing = _between_slices(step, module, chip)
    host = _host(module, chip)
    return result | {
        "fits": True,
        "compile_seconds": time.monotonic() - started,
        "memory": memory,
        "flops": flops,
        "collectives": collectives,
        "between_slices": crossing,
        "host": host,
        "time": time_of(
            module,
            mesh,
            chip,
            collectives,
            kernel_flops=flops["attention kernels"] + flops["expert kernels"],
            model_flops=flops["model"],
            num_tokens=config.data.batch_size * config.data.row_length,
            crossing=crossing,
            host=host,
        ),
    }


def _taken(c: transformer.ModelConfig, expert: int) -> float:
    """The share of conditionals whose condition is true.

    Conditionals choose between layers with and without a window, or skip the parts of a
    mixture of experts that have no rows (see `experts.mix`). With a balanced load, these
    are all but the first two.
    """
    if c.num_experts:
        return min(1.0, 2 / expert)
    return sum(window is not None for window in c.windows) / len(c.windows)


def _memory(step: Step, chip: chips.Chip) -> dict[str, int]:
    """Bytes of a chip; the compiler's peak counts donated buffers once."""

    def size(tree) -> int:
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )

    analysis = step.compiled.memory_analysis()
    state, program = step.program.state, step.program
    # The start of `kl_from_start` is in memory beside the step's arguments, which share
    # their part of it.
    apart = size(program.start) - size(program.frozen) if program.start else 0
    # Gradients are summed over microbatches in float32.
    gradients = sum(
        4 * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(state.params)
    )
    host = analysis.host_temp_size_in_bytes
    return {
        "parameters": size(state.params),
        "optimizer": size(state.opt_state),
        "frozen model": size((program.frozen, program.teacher)) + apart,
        "batch": size(step.batch),
        "temporary": analysis.temp_size_in_bytes,
        "of it gradients": gradients,
        "of it activations kept, by formula": _kept_activations(step),
        "peak": analysis.peak_memory_in_bytes + apart,
        "available": chip.hbm_bytes,
        **({"in the host's memory": host} if host else {}),
    }


def _kept_activations(step: Step) -> int:
    """Bytes of a chip's HBM, see `activations_kept`."""
    config, mesh = step.phase.config, sharding.sizes_of(step.phase.mesh)
    if config.model.remat == "offload":
        return 0
    rows = config.data.batch_size // config.optimizer.accumulation_steps
    tokens = rows * config.data.row_length // mesh["data"] // mesh["fsdp"]
    return activations_kept(config, step.phase.model_config, tokens)


def activations_kept(
    config: ml_collections.ConfigDict,
    model_config: transformer.ModelConfig,
    tokens: int,
) -> int:
    """Bytes of activations that are kept for the backward pass for `tokens` tokens.

    These are the input of each layer and, with remat "dots", the output of each projection;
    see `transformer.REMAT_POLICIES`. With "none" the compiler keeps more. On a TPU,
    "offload" keeps them in the host's memory.
    """
    c = model_config
    heads = (c.num_heads + 2 * c.num_kv_heads) * c.head_size
    width = c.hidden_size
    if config.model.remat not in _FROM_INPUTS:
        width += heads + 2 * c.hidden_size + 2 * c.active_mlp_size
    return (
        tokens * c.num_layers * width * jnp.dtype(config.model.compute_dtype).itemsize
    )


def _flops(step: Step, module: hlo.Module) -> dict[str, float]:
    """FLOPs of a step on all chips; kernels by formula, other products as compiled."""
    config, model_config = step.phase.config, step.phase.model_config
    mesh = step.phase.mesh
    row_length = config.data.row_length
    frozen = program_lib.frozen_passes(config, step.data)
    counted = flops_of(step.phase, step.data)
    tokens = config.data.batch_size * row_length
    parts = {k: v * tokens for k, v in dataclasses.asdict(counted).items()}
    rows_at_once = config.data.batch_size // config.optimizer.accumulation_steps
    kernels = attention_flops(module, model_config, row_length)
    teacher = step.phase.other_teacher
    if kernels and teacher is not None and frozen == "whole":
        c, parts_of_batch = (
            teacher.model_config,
            config.optimizer.accumulation_steps,
        )
        excess = _kernel_flops(c, row_length) - _kernel_flops(model_config, row_length)
        kernels += parts_of_batch * c.num_layers * _KERNELS["splash_mha_fwd"] * excess
    return parts | {
        "model": counted.model * tokens,
        "products, by formula": counted.products * tokens,
        "products, compiled": module.flops * mesh.size,
        "attention kernels": rows_at_once * kernels,
        "expert kernels": _expert_flops(step) if module.executions("gmm") else 0.0,
    }


def _expert_flops(step: Step) -> float:
    """FLOPs of the grouped products of a mixture of experts on all chips, by formula.

    A tile of rows that two experts share is computed twice.
    """
    config = step.phase.config
    passes = 3 * (3 if step.phase.lora is None else 2)
    passes += 2 if config.model.remat in _FROM_INPUTS else 0
    passes += 3 if program_lib.frozen_passes(config, step.data) == "whole" else 0
    c, sizes = step.phase.model_config, sharding.sizes_of(step.phase.mesh)
    tokens = config.data.batch_size * config.data.row_length
    rows_of_chip = tokens * c.experts_per_token / sizes["data"] / sizes["fsdp"]
    rows_of_chip /= config.optimizer.accumulation_steps
    shared = c.num_experts / config.mesh.expert * experts.TILE / rows_of_chip
    product = 2 * c.num_layers * c.hidden_size * c.active_mlp_size
    return passes * product * tokens * (1 + shared)


def attention_flops(
    module: hlo.Module, c: transformer.ModelConfig, row_length: int
) -> float:
    """FLOPs of attention's kernels in a compiled step, for each row that runs at once."""
    products = sum(module.executions(name) * n for name, n in _KERNELS.items())
    return products * _kernel_flops(c, row_length)


def _kernel_flops(c: transformer.ModelConfig, row_length: int) -> float:
    """FLOPs of one product in attention's kernels for a row, mean over the layers."""
    pairs = [attention.splash_pairs(row_length, window) for window in c.windows]
    return 2 * c.num_heads * c.head_size * sum(pairs) / len(pairs)


def collectives_of(
    module: hlo.Module, mesh: jax.sharding.Mesh, topology: str
) -> list[dict[str, Any]]:
    """By kind: number, bytes into a chip, and seconds at the bandwidth of the links."""
    rows: dict[tuple[str, bool], dict[str, Any]] = {}
    for collective in module.collectives:
        key = collective.kind, collective.is_async
        row = rows.setdefault(
            key,
            {
                "kind": collective.kind,
                "overlapped": collective.is_async,
                "times": 0,
                "bytes": 0.0,
                "seconds": 0.0,
            },
        )
        received = collective.received(mesh.size // sharding.num_slices(mesh))
        row["times"] += collective.times
        row["bytes"] += received
        row["seconds"] += received / _bandwidth(collective.group, mesh, topology)
    return sorted(rows.values(), key=lambda row: -row["seconds"])


def _bandwidth(group: tuple[int, ...], mesh: jax.sharding.Mesh, topology: str) -> float:
    """Bytes per second into a chip over the axes of the torus that a group spans.

    On an axis that is a ring, a chip has two neighbors; at the ends of a line, one.
    """
    chip, sides, _ = chips.Topology.parse(topology)
    # Groups are of chips of one slice, and all slices are alike.
    devices = mesh.devices.flat
    members = [devices[i].coords for i in group] or [d.coords for d in devices]
    links = 0
    for side, places in zip(sides, zip(*members, strict=True), strict=False):
        if len(set(places)) > 1:
            links += 2 if side >= chip.wraps_from else 1
    return max(links, 1) * chip.link_bandwidth


def _between_slices(step: Step, module: hlo.Module, chip: chips.Chip) -> dict[str, Any]:
    """What a chip exchanges with other slices in a step; empty on one slice.

    Returns:
      "rows": number, bytes into the chip and seconds of the sums of gradients, of scalars
      and of everything else. "gradients, by formula": bytes into the chip if each chip of a
      slice exchanges an equal share of all gradients.
    """
    num_slices = sharding.num_slices(step.phase.mesh)
    if num_slices == 1:
        return {}
    rows = {
        what: {"times": 0, "bytes": 0.0, "seconds": 0.0}
        for what in ("gradients", "scalars", "other")
    }
    for collective in module.between_slices:
        (array,) = collective.arrays
        what = "other"
        if array.num_elements <= _SCALARS:
            what = "scalars"
        elif (collective.kind, array.dtype) == ("all-reduce", "f32"):
            what = "gradients"
        received = collective.received(num_slices)
        rows[what]["times"] += collective.times
        rows[what]["bytes"] += received
        rows[what]["seconds"] += received / chip.dcn_bandwidth
    mesh, params = step.phase.mesh, jax.tree.leaves(step.program.state.params)
    size = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in params)
    least = hlo.Collective("all-reduce", (hlo.Array("f32", (size,)),), 1)
    copies = mesh.shape[sharding.DATA]
    return {
        "rows": rows,
        "gradients, by formula": least.received(num_slices) / copies,
        "bandwidth": chip.dcn_bandwidth,
    }


def _host(module: hlo.Module, chip: chips.Chip) -> dict[str, float]:
    """What a chip exchanges with its host's memory in a step; empty if nothing.

    Returns:
      Bytes in both directions, seconds at `chips.HOST_BANDWIDTH`, and those of them that no
      work hides, see `hlo.Module.host_seconds`.
    """
    if not module.host_bytes:
        return {}
    peaks = chip.flops, chip.hbm_bandwidth, chips.HOST_BANDWIDTH
    return {
        "bytes": module.host_bytes,
        "seconds": module.host_bytes / chips.HOST_BANDWIDTH,
        "waited for": module.host_seconds(*peaks),
    }


def time_of(
    module: hlo.Module,
    mesh: jax.sharding.Mesh,
    chip: chips.Chip,
    collectives: list[dict[str, Any]],
    kernel_flops: float,
    model_flops: float,
    num_tokens: int,
    crossing: dict[str, Any] | None = None,
    host: dict[str, float] | None = None,
) -> dict[str, float]:
    """Seconds of a compiled step, tokens per second and the bound of MFU.

    Args:
      module: the step.
      mesh: for which it is compiled.
      chip: of the mesh.
      collectives: see `collectives_of`.
      kernel_flops: of kernels, which the module does not show, on all chips.
      model_flops: that MFU counts, on all chips.
      num_tokens: of the step.
      crossing: what a chip exchanges with other slices, if there are several.
      host: what a chip exchanges with its host's memory, if anything.
    """
    compute = module.roofline_seconds(chip.flops, chip.hbm_bandwidth)
    compute += kernel_flops / mesh.size / chip.flops
    waited = sum(row["seconds"] for row in collectives if not row["overlapped"])
    overlapped = sum(row["seconds"] for row in collectives if row["overlapped"])
    total = max(compute, overlapped) + waited
    between = {}
    if crossing:
        seconds = sum(row["seconds"] for row in crossing["rows"].values())
        between = {"between slices, waited for": seconds}
        total += seconds
    if host:
        between["host's memory, waited for"] = host["waited for"]
        total += host["waited for"]
    return {
        "compute and memory": compute,
        "collectives, waited for": waited,
        "collectives, overlapped": overlapped,
        **between,
        "step": total,
        "tokens per second": num_tokens / total,
        "mfu bound": model_flops / mesh.size / chip.flops / total,
    }


def describe(plan: dict[str, Any]) -> str:
    """A plan as a page of Markdown."""
    shape, device = sharding.describe(plan["mesh"]), plan["device"]
    lines = [
        f"{plan['topology']}, {plan['devices']} {device}s ({shape}); "
        f"{plan['batch_size']} rows of {plan['row_length']:,} tokens a step in "
        f"{plan['accumulation_steps']} microbatches; remat {plan['remat']}"
    ]
    memory = plan["memory"]
    if not plan["fits"]:
        needed, available = memory["needed"] / GIB, memory["available"] / GIB
        over = needed - available
        return (
            f"{lines[0]}\ndoes not fit: it needs {needed:.2f} GiB, {over:.2f} more than "
            f"the {available:.2f} of a {device}"
        )
    rows = [[key, f"{value / GIB:.2f}"] for key, value in memory.items()]
    lines.append(metrics.table([f"HBM of a {device}", "GiB"], rows))
    flops, total = plan["flops"], plan["flops"]["model"]
    rows = [[key, f"{v:.3g}", f"{v / total:.3f}"] for key, v in flops.items()]
    kernels = flops["attention kernels"] + flops["expert kernels"]
    everything = flops["products, compiled"] + kernels
    rows.append(["total", f"{everything:.3g}", f"{everything / total:.3f}"])
    lines.append(metrics.table(["FLOPs of a step", f"all {device}s", "of model"], rows))
    rows = [
        [
            f"{row['kind']}, {'overlapped' if row['overlapped'] else 'waited for'}",
            str(row["times"]),
            f"{row['bytes'] / GIB:.2f}",
            f"{row['seconds']:.3f}",
        ]
        for row in plan["collectives"]
    ]
    lines.append(metrics.table([f"into a {device}", "times", "GiB", "seconds"], rows))
    if crossing := plan["between_slices"]:
        rows = [
            [
                what,
                f"{row['times']:g}",
                f"{row['bytes'] / GIB:.3f}",
                f"{row['seconds']:.3f}",
            ]
            for what, row in crossing["rows"].items()
        ]
        least = crossing["gradients, by formula"] / GIB
        rows.append(["gradients, by formula", "", f"{least:.3f}", ""])
        speed = f"at {crossing['bandwidth'] / 1e9:g} GB/s"
        what = f"from other slices into a {device}"
        title = [what, "times", "GiB", f"seconds {speed}"]
        lines.append(metrics.table(title, rows))
    if host := plan["host"]:
        speed = f"seconds at {chips.HOST_BANDWIDTH / 1e9:g} GB/s (assumed)"
        title = [f"between a {device} and the host's memory", "GiB", speed]
        rows = [
            ["all", f"{host['bytes'] / GIB:.2f}", f"{host['seconds']:.3f}"],
            ["waited for", "", f"{host['waited for']:.3f}"],
        ]
        lines.append(metrics.table(title, rows))
    times = plan["time"]
    rows = [
        [key, f"{value:,.0f}" if value > 100 else f"{value:.3f}"]
        for key, value in times.items()
    ]
    lines.append(metrics.table(["modeled time", ""], rows))
    return "\n\n".join(lines)


def search(
    config: ml_collections.ConfigDict,
    topology: str,
    remats: tuple[str, ...] = config_lib.REMAT,
    finalists: int = 6,
) -> list[dict[str, Any]]:
    """Searches meshes, rematerialization and microbatches; returns plans, fastest first.

    Compiles every candidate quickly, and the `finalists` fastest as they would run. For
    each mesh and rematerialization, the candidates are the two smallest numbers of
    microbatches that fit. More microbatches gather and reduce the weights more often, but
    fewer may be slower: where memory is short, the compiler recomputes products.
    """
    fitting = []
    for mesh in _meshes(config, topology):
        for remat in remats:
            fitting += itertools.islice(_that_fit(config, topology, mesh, remat), 2)
    fitting.sort(key=lambda candidate: candidate[1]["time"]["step"])
    terminal.show("\nThe fastest candidates, compiled as they would run:")
    plans = []
    for candidate, _ in fitting[:finalists]:
        plans.append(make(candidate, topology))
        terminal.show(_one_line(plans[-1]))
    fit = [plan for plan in plans if plan["fits"]]
    return sorted(fit, key=lambda plan: plan["time"]["step"])


def _that_fit(
    config: ml_collections.ConfigDict, topology: str, mesh: dict[str, int], remat: str
) -> Iterator[tuple[ml_collections.ConfigDict, dict[str, Any]]]:
    """Yields the configs that fit and their quick plans, by number of microbatches."""
    for parts in _microbatches(config, mesh):
        settings = {"model.remat": remat, "optimizer.accumulation_steps": parts}
        candidate = _with(config, mesh=mesh, **settings)
        plan = make(candidate, topology, quick=True)
        terminal.show(_one_line(plan))
        if plan["fits"]:
            yield candidate, plan


def _meshes(
    config: ml_collections.ConfigDict, topology: str
) -> Iterator[dict[str, int]]:
    """Meshes that divide the model and whose weights and moments fit in memory."""
    model_config = _model_config(config)
    size = sharding.make_topology_mesh(topology, config_lib.default().mesh).size
    for tensor in (1, 2, 4, 8):
        for data in (1, 2, 4, 8, 16):
            if size % (tensor * data):
                continue
            mesh = {"data": data, "fsdp": size // (tensor * data), "tensor": tensor}
            changed = _with(config, mesh=mesh)
            try:
                phase.check_model(changed, model_config, size)
            except InputError:
                continue
            available = chips.of_topology(topology).hbm_bytes
            if least_memory(changed, model_config) <= available:
                yield mesh


def least_memory(
    config: ml_collections.ConfigDict, model_config: transformer.ModelConfig
) -> float:
    """Bytes of a chip for weights and moments, on the config's mesh."""
    size = {"float32": 4, "bfloat16": 2}
    settings, teacher = config.model, phase.other_teacher_config(config)
    frozen, trained = size[config_lib.frozen_dtype(settings)], 0
    if not config.lora.rank:
        trained = size[settings.param_dtype] + 2 * size[config.optimizer.moments_dtype]
    number = phase.num_parameters(model_config)
    total = number * trained
    if teacher is not None:
        total += phase.num_parameters(teacher) * frozen
    if teacher is None or config.lora.rank:
        total += number * frozen
    return total / (config.mesh.fsdp * config.mesh.tensor)


def step_memory(
    config: ml_collections.ConfigDict,
    model_config: transformer.ModelConfig,
    mesh: tuple[int, int, int],
    rows: int,
    row_length: int,
) -> float:
    """An upper estimate, by formula, of the bytes of a device that a training step needs.

    The sum of: weights, moments, the frozen models and gradients; the activations that all
    layers keep; four times the activations of one layer; with fsdp, four times the weights
    of a layer; the head's logits and two float32 copies of the device's unembedding. For a
    layer and the unembedding, the larger of model and teacher counts.

    Args:
      config, model_config: of the phase.
      mesh: sizes of the axes data, fsdp and tensor.
      rows: number of rows of a device per microbatch.
      row_length: tokens of a row.
    """
    c, settings = model_config, config.model
    _, fsdp, tensor = mesh
    sized = _with(config, mesh={"fsdp": fsdp, "tensor": tensor})
    number = phase.num_parameters(c)
    gradients = 0 if config.lora.rank else 4 * number / (fsdp * tensor)
    tokens, itemsize = rows * row_length, jnp.dtype(settings.compute_dtype).itemsize
    teacher = phase.other_teacher_config(config) or c
    layer = tokens * max(map(_layer_width, (c, teacher))) / tensor
    num_heads = max(c.num_heads, teacher.num_heads)
    scores = rows * num_heads * row_length * min(row_length, _LIVE_KEYS) / tensor
    columns = c.vocab_size / tensor
    if config.head.vocab_parallel:
        columns /= fsdp
    largest = max(phase.num_parameters(m) / m.num_layers for m in (c, teacher))
    gathered = 4 * largest / tensor if fsdp > 1 else 0
    logits = 3 * _LIVE_LOGITS * columns
    unembedding = 2 * columns * max(c.hidden_size, teacher.hidden_size)
    kept = activations_kept(config, c, tokens)
    working = itemsize * (4 * layer + gathered)
    working += 4 * (scores + logits + unembedding)
    return least_memory(sized, c) + gradients + kept + working


def _layer_width(c: transformer.ModelConfig) -> int:
    """Activations of a token in a layer."""
    heads = (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_size
    return heads + 4 * c.hidden_size + 3 * c.mlp_size


def _microbatches(config, mesh: dict[str, int]) -> Iterator[int]:
    """Numbers of microbatches, up to one row per microbatch and group of chips."""
    rows = config.data.batch_size // (mesh["data"] * mesh["fsdp"])
    yield from (parts for parts in range(1, rows + 1) if rows % parts == 0)


def _one_line(plan: dict[str, Any]) -> str:
    settings = (
        f"{sharding.describe(plan['mesh'])}, remat {plan['remat']}, "
        f"{plan['accumulation_steps']} microbatches"
    )
    memory = plan["memory"]
    if not plan["fits"]:
        return f"{settings}: does not fit, needs {memory['needed'] / GIB:.2f} GiB"
    return (
        f"{settings}: {memory['peak'] / GIB:.2f} GiB, {plan['time']['step']:.3f} s, "
        f"{plan['time']['tokens per second']:,.0f} tokens/s"
    )


def search_table(plans: list[dict[str, Any]]) -> str:
    """A table of the plans of `search`."""
    columns = [
        " x ".join(plans[0]["mesh"]) if plans else "",
        "remat",
        "microbatches",
        "GiB",
        "s",
        "tokens/s",
        "MFU",
    ]
    rows = [
        [
            " x ".join(map(str, plan["mesh"].values())),
            plan["remat"],
            str(plan["accumulation_steps"]),
            f"{plan['memory']['peak'] / GIB:.2f}",
            f"{plan['time']['step']:.3f}",
            f"{plan['time']['tokens per second']:,.0f}",
            f"{plan['time']['mfu bound']:.2f}",
        ]
        for plan in plans
    ]
    return "\n" + (metrics.table(columns, rows) if plans else "nothing fits")


def advise(config: ml_collections.ConfigDict, topology: str) -> str:
    """The first change of settings that makes the step fit, cheapest first."""
    mesh = mesh_shape.mesh_shape(
        config.mesh, sharding.make_topology_mesh(topology, config.mesh).size
    )
    sizes = dict(zip(mesh_shape.MESH_AXES, mesh, strict=True))
    changes: list[dict[str, Any]] = [{"model.remat": "full"}]
    for parts in _microbatches(config, sizes):
        if parts >= 2 * changes[-1].get("optimizer.accumulation_steps", 1):
            changes.append(
                {"model.remat": "full", "optimizer.accumulation_steps": parts}
            )
    if not _model_config(config).num_experts:
        changes.append(changes[-1] | {"lora.rank": 16})
    for change in changes:
        changed = _with(config, **change)
        plan = make(changed, topology, quick=True)
        if plan["fits"]:
            plan = make(changed, topology)
        words = " ".join(f"--config.{key}={value}" for key, value in change.items())
        if plan["fits"]:
            peak = plan["memory"]["peak"] / GIB
            return f"The step fits, with {peak:.2f} GiB, with {words}"
        terminal.show(f"needs {plan['memory']['needed'] / GIB:.2f} GiB with {words}")
    return "None of these changes makes the step fit; use a larger slice"
