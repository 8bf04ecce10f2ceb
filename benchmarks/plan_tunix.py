"""Compares our step with google-tunix's distillation step, compiled for a TPU slice.

    python -m benchmarks.plan_tunix [--topology v5e:4x4] [--rows 1] [--layers 32]

Llama-3-8B with a bfloat16 teacher of the same shape, float32 weights and Adam moments, FSDP
over all chips, each layer recomputed in the backward pass, sequences of 4,096 tokens.
Our step is that of `mixcpt_jax.cli.plan`. Tunix has two programs: the teacher's forward
pass, and `DistillationTrainer._train_step` with `LogitStrategy`, which takes the teacher's
logits as an argument. Its unembeddings and its attention are dense. Its model computes in
the dtype of its weights, so its step is compiled twice: in float32, and all in bfloat16,
moments included. Needs `google-tunix` (0.1.7; Python 3.12) and `libtpu`.
"""

import argparse
import dataclasses
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from configs import llama3_8b
from mixcpt_jax.core.chips import GIB
from mixcpt_jax.planning import hlo, step_plan
from mixcpt_jax.runtime import metrics, sharding

ROW_LENGTH = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--rows", type=int, default=1, help="sequences a chip")
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args()
    topology, num_layers = arguments.topology, arguments.layers
    config = llama3_8b.get_config()
    config.mesh.update({"data": 1, "fsdp": -1})
    mesh = sharding.make_topology_mesh(topology, config.mesh)
    rows = arguments.rows * mesh.size
    config.data.batch_size = config.eval.batch_size = rows
    config.optimizer.accumulation_steps = 1
    config.model.remat = "full"
    table = []

    def add(name, compile_program):
        try:
            compiled = compile_program()
        except step_plan.DoesNotFit as refusal:
            table.append([name, f"does not fit: {refusal}", "", ""])
        else:
            memory = compiled.memory_analysis()
            flops = hlo.Module(compiled.as_text()).flops * mesh.size
            table.append(
                [
                    name,
                    f"{memory.peak_memory_in_bytes / GIB:.2f}",
                    f"{memory.temp_size_in_bytes / GIB:.2f}",
                    f"{flops:.4g}",
                ]
            )
        print(table[-1], flush=True)

    if num_layers == 32:
        add("ours", lambda: step_plan.compile_step(config, mesh).compiled)
    theirs = Theirs(mesh, rows, num_layers)
    for dtype in ("bfloat16", "float32"):
        add(f"tunix, train step, {dtype}", lambda dtype=dtype: theirs.train_step(dtype))
    add("tunix, teacher", theirs.teacher)
    print(
        f"\n{num_layers} layers, {topology}, {arguments.rows} sequences of "
        f"{ROW_LENGTH:,} tokens a chip\n"
    )
    columns = ["program", "HBM GiB a chip", "temporary", "FLOPs of products"]
    print(metrics.table(columns, table))


class Theirs:
    """The two programs of a step of `DistillationTrainer`, from shapes alone."""

    def __init__(self, mesh: Mesh, rows: int, num_layers: int):
        from tunix.distillation import distillation_trainer, strategies
        from tunix.models.llama3 import model as llama3

        # Theirs are (fsdp, tp); and their constraints hold on TPUs alone, by the devices
        # of this process, which has none.
        self._mesh = Mesh(
            mesh.devices.reshape(-1, 1), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2
        )
        llama3.shard = lambda x, axes: jax.lax.with_sharding_constraint(
            x, NamedSharding(self._mesh, P(*axes))
        )
        config = dataclasses.replace(
            llama3.ModelConfig.llama3p1_8b(),
            num_layers=num_layers,
            remat_config=llama3.RematConfig.DECODER,
        )

        def forward(model, input_tokens, input_mask):
            length = input_tokens.shape[1]
            positions = jnp.broadcast_to(jnp.arange(length)[None], input_tokens.shape)
            causal = jnp.tril(jnp.ones((length, length), bool))[None]
            mask = causal & input_mask[:, None, :]
            return model(input_tokens, positions, None, mask)[0]

        def labels(input_tokens, input_mask):
            del input_mask
            return jax.nn.one_hot(input_tokens, config.vocab_size)

        self._strategy = strategies.LogitStrategy(forward, forward, labels)
        # The attributes that `_train_step` uses; a real trainer needs real arrays.
        trainer = object.__new__(distillation_trainer.DistillationTrainer)
        trainer.strategy = self._strategy
        trainer.loss_fn = trainer.get_train_loss
        trainer._has_aux, trainer._lora_enabled = True, False
        trainer.gen_model_input_fn = lambda x: {
            "inputs": {"input_tokens": x.input_tokens, "input_mask": x.input_mask},
            "teacher_output": x.teacher_output,
        }
        self._trainer, self._input = trainer, distillation_trainer.TrainingInput
        self._model = nnx.eval_shape(lambda: llama3.Llama3(config, rngs=nnx.Rngs(0)))
        by_rows = NamedSharding(self._mesh, P("fsdp"))
        shape = (rows, ROW_LENGTH)
        self._tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=by_rows)
        self._mask = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=by_rows)
        self._logits = jax.ShapeDtypeStruct(
            (*shape, config.vocab_size), jnp.bfloat16, sharding=by_rows
        )

    def _place(self, state, dtype=None):
        """Shapes of a state with the shardings that the model declares."""
        specs = nnx.get_partition_spec(state)

        def place(leaf, spec):
            is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
            where = NamedSharding(self._mesh, spec if spec is not None else P())
            kept = dtype if dtype and is_float else leaf.dtype
            return jax.ShapeDtypeStruct(leaf.shape, kept, sharding=where)

        return jax.tree.map(place, state, specs)

    def train_step(self, dtype: str) -> jax.stages.Compiled:
        # The same parts as ours, except the decay mask, which uses our names.
        transforms = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5))
        optimizer = nnx.eval_shape(
            lambda model: nnx.Optimizer(model, transforms, wrt=nnx.Param), self._model
        )
        model_graph, model_state = nnx.split(self._model)
        optimizer_graph, optimizer_state = nnx.split(optimizer)

        def step(model_state, optimizer_state, tokens, mask, logits):
            model = nnx.merge(model_graph, model_state)
            optimizer = nnx.merge(optimizer_graph, optimizer_state)
            inputs = self._input(
                input_tokens=tokens, input_mask=mask, teacher_output=logits
            )
            result = self._trainer._train_step(model, optimizer, inputs)
            return nnx.state(model), nnx.state(optimizer), result

        states = self._place(model_state, dtype), self._place(optimizer_state, dtype)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, states)
        with jax.set_mesh(self._mesh):
            jitted = jax.jit(
                step, donate_argnums=(0, 1), out_shardings=(*shardings, None)
            )
            lowered = jitted.lower(*states, self._tokens, self._mask, self._logits)
            return step_plan.compile_lowered(lowered, self._mesh)

    def teacher(self) -> jax.stages.Compiled:
        graph, state = nnx.split(self._model)

        def forward(state, tokens, mask):
            model = nnx.merge(graph, state)
            inputs = {"input_tokens": tokens, "input_mask": mask}
            logits = self._strategy.get_teacher_outputs(model, inputs)
            return logits.astype(jnp.bfloat16)

        with jax.set_mesh(self._mesh):
            jitted = jax.jit(forward, out_shardings=self._logits.sharding)
            arguments = self._place(state, jnp.bfloat16), self._tokens, self._mask
            return step_plan.compile_lowered(jitted.lower(*arguments), self._mesh)


if __name__ == "__main__":
    main()
