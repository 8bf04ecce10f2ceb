"""The LSSD head: FLOPs, memory and time, compared with other forms.

    python -m benchmarks.lssd_head [--part chip|memory|tensor|step|cpu ...]

The TPU parts compile ahead of time for slices that do not exist (package `libtpu`) and read
the compiled modules with `mixcpt_jax.planning.hlo`:

- `chip`: one chip, 8,192 tokens of a Llama-3-8B head in bfloat16, value and both
  gradients; each form relative to the bare four products.
- `memory`: temporary memory of the streamed head against vocabulary and tokens.
- `tensor`: the traffic between four chips that share the vocabulary.
- `step`: the whole training step of Llama-3-8B on v5e:4x4. Minutes per row.

There are two models of time, both relative to the products at the chip's peak. `roofline`
runs every instruction at the chip's peak of FLOPs or bandwidth, whichever takes longer, one
after another. `schedule` adds up the compiler's cycle estimates, which assume about half of
the peak bandwidth. Both count loops in full.

`cpu` runs the forms on this machine (see `benchmarks.head_cpu`).
"""

import argparse
import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import head_cpu, head_forms
from mixcpt_jax import config as config_lib
from mixcpt_jax.core import chips
from mixcpt_jax.core.chips import GIB
from mixcpt_jax.models import lora as lora_lib
from mixcpt_jax.models import transformer
from mixcpt_jax.objectives import dense, over_tokens, streamed, teachers
from mixcpt_jax.planning import hlo, step_plan
from mixcpt_jax.runtime import sharding
from mixcpt_jax.training import optimizer, phase, steps

# A slice of one chip of each kind.
SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
ONE_CHIP = {"data": 1, "fsdp": 1, "tensor": 1}
TOKENS, HIDDEN, VOCABULARY = 8192, 4096, 128256

LLAMA_3_8B = transformer.ModelConfig(
    family="llama",
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    mlp_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_size=128,
    max_positions=8192,
    rope_theta=5e5,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = {
        "chip": print_chips,
        "memory": print_memory,
        "tensor": print_collectives,
        "step": print_steps,
        "cpu": head_cpu.print_table,
    }
    parser.add_argument("--part", nargs="+", choices=parts, default=list(parts))
    for part in parser.parse_args().part:
        if part != "cpu" and importlib.util.find_spec("libtpu") is None:
            print(f"\n{part}: not measured: libtpu is not installed")
        else:
            parts[part]()


def print_chips() -> None:
    forms = {
        "bare products": head_forms.bare_products,
        "dense, literal swap": head_forms.dense_swap,
        "dense, identity": head_forms.dense_identity,
        "chunks of 1024, remat": head_forms.chunks_with_remat,
        "streamed": head_forms.streamed,
        "streamed, 512 of 1024": functools.partial(
            head_forms.streamed, chunk_size=512, block_size=1024
        ),
    }
    for name, topology in SLICES.items():
        chip = chips.of_topology(topology)
        mesh = sharding.make_topology_mesh(topology, ONE_CHIP)
        print(
            f"\nOne {name} chip, T={TOKENS:,} H={HIDDEN:,} V={VOCABULARY:,}, bfloat16, "
            "value and both gradients\n"
        )
        print("| form | FLOPs / 8THV | temporary GiB | roofline | schedule |")
        print("| --- | ---: | ---: | ---: | ---: |")
        floor = 8 * TOKENS * HIDDEN * VOCABULARY
        for form_name, form in forms.items():
            try:
                compiled = compile_head(form, mesh, TOKENS, VOCABULARY)
            except step_plan.DoesNotFit as refusal:
                needed = f"temporary {refusal.needed / GIB:.2f} GiB"
                print(f"| {form_name} | does not fit: {needed} |||")
                continue
            module = hlo.Module(compiled.as_text())
            seconds = module.roofline_seconds(chip.flops, chip.hbm_bandwidth)
            print(
                f"| {form_name} | {module.flops / floor:.3f} "
                f"| {temporary(compiled) / GIB:.2f} "
                f"| {seconds * chip.flops / floor:.2f} "
                f"| {module.cycles / chip.cycles * chip.flops / floor:.2f} |",
                flush=True,
            )
    print(
        "\nTemporary memory includes the float32 gradient of the unembedding where the "
        f"form accumulates one, {HIDDEN * VOCABULARY * 4 / GIB:.2f} GiB."
    )


def print_memory() -> None:
    mesh = sharding.make_topology_mesh(SLICES["v5e"], ONE_CHIP)
    print(f"\nStreamed head on v5e, H={HIDDEN:,}: temporary GiB beyond the gradient\n")
    print("| tokens | vocabulary | chunk, block | GiB |")
    print("| ---: | ---: | ---: | ---: |")
    sizes = [(TOKENS, v) for v in (32000, 64000, 128256, 262144)]
    sizes += [(t, VOCABULARY) for t in (2048, 16384, 32768, 65536)]
    for num_tokens, vocab_size in sizes:
        compiled = compile_head(head_forms.streamed, mesh, num_tokens, vocab_size)
        with jax.set_mesh(mesh):
            chunk, block = streamed.default_sizes(vocab_size)
        rest = temporary(compiled) - HIDDEN * vocab_size * 4
        print(
            f"| {num_tokens:,} | {vocab_size:,} | {chunk}, {block} "
            f"| {rest / GIB:.2f} |",
            flush=True,
        )


def print_collectives() -> None:
    print(
        "\nFour v5e chips share the vocabulary (mesh.tensor=4), one step of the head\n"
    )
    print("| collective | arrays on a chip | times | MiB a step |")
    print("| --- | --- | ---: | ---: |")
    mesh = sharding.make_topology_mesh("v5e:2x2", {"data": 1, "fsdp": 1, "tensor": 4})
    compiled = compile_head(head_forms.streamed, mesh, TOKENS, VOCABULARY)
    for collective in hlo.Module(compiled.as_text()).collectives:
        arrays = ", ".join(
            f"{array.dtype}{list(array.dimensions)}" for array in collective.arrays
        )
        print(
            f"| {collective.kind} | {arrays} | {collective.times} "
            f"| {collective.num_bytes / 2**20:.2f} |"
        )


def print_steps() -> None:
    chip = chips.of_topology(SLICES["v5e"])
    gathered = functools.partial(streamed.head_loss, vocab_parallel=False)
    lora = lora_lib.Lora(16, 16.0, lora_lib.LORA_TARGETS)
    rows = [
        ("plain CE, dense head", dense_head, False, 1, None),
        ("LSSD, dense head", dense_head, True, 1, None),
        ("LSSD, unembedding gathered", gathered, True, 1, None),
        ("LSSD, vocabulary-parallel", streamed.head_loss, True, 1, None),
        ("LSSD, vocabulary-parallel", streamed.head_loss, True, 2, None),
        ("plain CE, adapters of rank 16", streamed.head_loss, False, 2, lora),
        ("LSSD, adapters of rank 16", streamed.head_loss, True, 2, lora),
    ]
    print(
        "\nWhole step, Llama-3-8B on v5e:4x4, FSDP over 16 chips, 4,096 tokens a "
        "sequence, float32 master weights and moments, bfloat16 teacher, full remat\n"
    )
    print(
        "| objective and head | sequences a chip | HBM GiB a chip | FLOPs / needed "
        "| roofline s | schedule s | GiB sent a chip |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, head_loss, has_teacher, sequences, lora in rows:
        row = f"| {name} | {sequences} "
        try:
            compiled = compile_step(
                LLAMA_3_8B, "v5e:4x4", head_loss, has_teacher, sequences, 4096, lora
            )
        except step_plan.DoesNotFit as refusal:
            needed = f"temporary {refusal.needed / GIB:.2f} GiB"
            print(row + f"| does not fit: {needed} |||||", flush=True)
            continue
        module = hlo.Module(compiled.as_text())
        needed = needed_flops(LLAMA_3_8B, has_teacher, lora) * sequences * 4096
        sent = sum(collective.num_bytes for collective in module.collectives)
        print(
            row + f"| {compiled.memory_analysis().peak_memory_in_bytes / GIB:.2f} "
            f"| {module.flops / needed:.3f} "
            f"| {module.roofline_seconds(chip.flops, chip.hbm_bandwidth):.2f} "
            f"| {module.cycles / chip.cycles:.2f} "
            f"| {sent / GIB:.0f} |",
            flush=True,
        )
    print(
        "\nHBM is the compiler's peak, arguments included, of 15.75 GiB. FLOPs are "
        "those of matrix products outside of the attention kernel; needed are teacher "
        "forward, student forward and backward, and the forward pass a second time but "
        "for each layer's last product."
    )


def compile_head(form, mesh, num_tokens: int, vocab_size: int) -> jax.stages.Compiled:
    """A form of `head_forms` for shapes of Llama-3-8B, in bfloat16.

    Tokens lie over `data` and `fsdp`, the vocabulary over `tensor`.
    """
    rows, columns = P(sharding.batch_axes(mesh)), P(None, sharding.TENSOR)

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    hidden = array((num_tokens, HIDDEN), jnp.bfloat16, rows)
    kernel = array((HIDDEN, vocab_size), jnp.bfloat16, columns)
    targets = array((num_tokens,), jnp.int32, rows)
    weights = array((num_tokens,), jnp.float32, rows)
    with jax.set_mesh(mesh):
        operands = (hidden, kernel, hidden, kernel, targets, weights)
        return step_plan.compile_lowered(jax.jit(form).lower(*operands), mesh)


def compile_step(
    config: transformer.ModelConfig,
    topology: str,
    head_loss,
    has_teacher: bool,
    sequences_per_chip: int,
    length: int,
    lora: lora_lib.Lora | None = None,
) -> jax.stages.Compiled:
    """Compiles the training step of `steps`, sharded over `fsdp`, from shapes alone."""
    mesh = sharding.make_topology_mesh(topology, {"data": 1, "fsdp": -1, "tensor": 1})
    replicated = sharding.replicated(mesh)
    params = phase.abstract_params(config, mesh, "float32")
    if lora:
        params = phase.abstract_adapters(config, lora, mesh, "float32")
    frozen = None
    if has_teacher or lora:
        frozen = phase.abstract_params(config, mesh, "bfloat16")
    param_shardings = jax.tree.map(lambda x: x.sharding, params)
    transforms, schedule = optimizer.make_optimizer(
        config_lib.default().optimizer, 1000
    )
    opt_state = sharding.place(
        jax.eval_shape(transforms.init, params),
        optimizer.state_shardings(transforms, params, param_shardings, replicated),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    state = steps.TrainState(step, params, opt_state)
    shape = (sequences_per_chip * mesh.size, length)
    dtypes: dict[str, Any] = dict.fromkeys(
        ("tokens", "targets", "positions", "segment_ids", "source_ids"), jnp.int32
    )
    weights = (f"{objective}_weights" for objective in config_lib.OBJECTIVES)
    dtypes |= dict.fromkeys(("loss_mask", *weights), jnp.float32)
    rows = sharding.batch_sharding(mesh)
    batch = {
        key: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
        for key, dtype in dtypes.items()
    }
    objective = over_tokens.token_objective(
        transformer.make_forward(config, jnp.bfloat16, "full", lora),
        teachers.running_teacher(transformer.make_forward(config, jnp.bfloat16))
        if has_teacher
        else None,
        ("all",),
        head_loss,
    )
    train_step = steps.make_train_step(
        objective, transforms, schedule, has_adapters=lora is not None
    )
    state_shardings = jax.tree.map(lambda x: x.sharding, state)
    with jax.set_mesh(mesh):
        jitted = jax.jit(
            train_step,
            donate_argnums=0,
            out_shardings=(state_shardings, replicated),
            compiler_options=steps.COMPILER_OPTIONS["tpu"],
        )
        return step_plan.compile_lowered(jitted.lower(state, frozen, batch), mesh)


def dense_head(
    hidden,
    kernel,
    *,
    targets_T,
    weights,
    vocab_first,
    teacher_hidden_TxE,
    teacher_unembedding_ExV,
):
    """`streamed.head_loss` on all logits at once; the same statistics."""
    equation = "td,vd->tv" if vocab_first else "td,dv->tv"

    def logits(hidden, kernel):
        kernel = kernel.astype(hidden.dtype)
        product = jnp.einsum(
            equation, hidden, kernel, preferred_element_type=jnp.float32
        )
        return sharding.constrain(product, "batch", "vocab")

    student = logits(hidden, kernel)
    top = student.argmax(-1)
    correct = (top == targets_T) * 1.0
    ntp = dense.cross_entropy(student, targets_T)
    zero = jnp.zeros_like(ntp)
    if teacher_hidden_TxE is None:
        statistics = streamed.TokenStatistics(ntp, zero, zero, correct, zero, zero)
        return jnp.sum(weights.ntp * ntp), statistics
    teacher = logits(teacher_hidden_TxE, teacher_unembedding_ExV)
    lssd = dense.lssd_by_identity(student, teacher, targets_T)
    kd = dense.distillation(student, teacher)
    agree = top == teacher.argmax(-1)
    swapped = teacher.argmax(-1) != targets_T
    statistics = jax.tree.map(
        jax.lax.stop_gradient,
        streamed.TokenStatistics(ntp, lssd, kd, correct, agree * 1.0, swapped * 1.0),
    )
    return jnp.sum(weights.ntp * ntp + weights.lssd * lssd), statistics


def needed_flops(
    config: transformer.ModelConfig,
    has_teacher: bool,
    lora: lora_lib.Lora | None = None,
) -> float:
    """FLOPs per token of matrix products, with full rematerialization."""
    frozen = "whole" if has_teacher else "none"
    return step_plan.count_flops(config, 1, "full", frozen, lora is not None).products


def temporary(compiled: jax.stages.Compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    main()
