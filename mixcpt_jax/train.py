"""The loop of every phase: restore or start -> step -> log -> evaluate -> save.

A phase starts from the first of these that exists: its own newest checkpoint, the
hand-over checkpoint `init_from`, the pretrained weights `model.path`. The frozen
teacher is always what the phase started from.
"""

import functools
import json
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from mixcpt_jax import (
    checkpoint,
    evaluate,
    fused,
    metrics,
    model,
    optim,
    paths,
    sharding,
    steps,
    tokenizer,
    weights,
)
from mixcpt_jax import config as config_lib
from mixcpt_jax.data import pipeline
from mixcpt_jax.errors import InputError

CONFIG_FILE = "config.json"
RESULTS_FILE = "results.json"


def run(config: ml_collections.ConfigDict, workdir: str, name: str) -> dict[str, Any]:
    """Runs one phase to its end, or goes on where an earlier run of it stopped.

    Args:
      config: a validated config without phases.
      workdir: the phase's folder.
      name: of the phase, for the terminal.

    Returns:
      What `results.json` holds: `before` and `after` (evaluation by measure),
      `mixture` (the sources as delivered) and the speed; nothing on other hosts than
      the first.

    Raises:
      InputError: config, data, weights or workdir are wrong.
      FloatingPointError: the loss is no longer finite.
    """
    folder = paths.absolute(workdir)
    check_workdir(folder, config)
    model_config = weights.read_model_config(config.model.path)
    check_model(config, model_config)
    vocabulary = tokenizer.load(config.model.tokenizer or config.model.path)
    tokenizer.check_vocabulary(
        vocabulary, model_config.vocab_size, config.model.tokenizer or config.model.path
    )
    data = pipeline.load(config, vocabulary)
    # Only now: a mistake in a path, once mended, must not find the workdir taken.
    if jax.process_index() == 0 and not (folder / CONFIG_FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        metrics.replace(folder / CONFIG_FILE, config.to_json(indent=2))
    mesh = sharding.make_mesh(config.mesh)
    with (
        jax.set_mesh(mesh),
        checkpoint.Checkpoints(
            folder, config.train.keep_last, config.train.keep_best
        ) as checkpoints,
    ):
        return _run(config, folder, name, mesh, model_config, data, checkpoints)


def check_workdir(workdir: epath.Path, config: ml_collections.ConfigDict) -> None:
    """A workdir that is in use must hold the same config.

    Raises:
      InputError: names the first setting that differs, or the damaged file.
    """
    path = workdir / CONFIG_FILE
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"{workdir}: is a file; give another --workdir")
    if not path.exists():
        return
    try:
        stored = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(
            f"{path}: damaged ({error}); delete it if the run in {workdir} had this config"
        ) from error
    difference = config_lib.first_difference(config, stored)
    if difference is not None:
        key, then, now = difference
        raise InputError(
            f"{workdir}: belongs to a run with {key}={then!r}, this one has {now!r}; "
            "give another --workdir (and --config.init_from to start from this run's "
            "end), or the same config to go on"
        )


def check_model(
    config: ml_collections.ConfigDict, model_config: model.ModelConfig
) -> None:
    """Settings that must suit the model, checked before its weights are read.

    Raises:
      InputError: names the setting and the remedy.
    """
    if config.data.row_length > model_config.max_positions:
        raise InputError(
            f"data.row_length={config.data.row_length}: longer than the model's context "
            f"of {model_config.max_positions}; use at most that"
        )
    data, fsdp, tensor = sharding.mesh_shape(config.mesh, jax.device_count())
    if data * fsdp % jax.process_count():
        raise InputError(
            f"mesh: data x fsdp = {data} x {fsdp} cannot be shared by "
            f"{jax.process_count()} hosts; make mesh.tensor smaller"
        )
    for axis, size, dimension, value in (
        ("tensor", tensor, "attention heads", model_config.num_heads),
        ("tensor", tensor, "key-value heads", model_config.num_kv_heads),
        ("tensor", tensor, "MLP columns", model_config.mlp_size),
        ("tensor", tensor, "vocabulary entries", model_config.vocab_size),
        ("fsdp", fsdp, "hidden size", model_config.hidden_size),
    ):
        if value % size:
            raise InputError(
                f"mesh.{axis}={size} does not divide the model's {value} {dimension}; "
                f"choose a divisor and give the rest of the devices to mesh.data"
            )


def _run(
    config: ml_collections.ConfigDict,
    folder: epath.Path,
    name: str,
    mesh: jax.sharding.Mesh,
    model_config: model.ModelConfig,
    data: pipeline.Data,
    checkpoints: checkpoint.Checkpoints,
) -> dict[str, Any]:
    num_steps = config.train.num_steps
    needs_teacher = any(
        objective["lssd"] or objective["kd"]
        for name, objective in data.objectives.items()
        if config.sources[name].weight
    )
    head_loss = functools.partial(
        fused.head_loss,
        chunk_size=config.head.chunk_size or None,
        block_size=config.head.block_size or None,
        vocab_tile=config.head.vocab_tile or None,
        vocab_parallel=config.head.vocab_parallel,
    )
    compute_dtype = config.model.compute_dtype
    forward = model.make_forward(model_config, compute_dtype, config.model.remat)
    transforms, schedule = optim.make_optimizer(config.optimizer, num_steps)
    abstract_state = _abstract_state(config, model_config, mesh, transforms)
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    replicated = sharding.replicated(mesh)
    compiler_options = steps.COMPILER_OPTIONS.get(mesh.devices.flat[0].platform)
    train_step = jax.jit(
        steps.make_train_step(
            forward,
            model.make_forward(model_config, compute_dtype) if needs_teacher else None,
            transforms,
            schedule,
            tuple(data.objectives),
            config.optimizer.accumulation_steps,
            head_loss,
        ),
        donate_argnums=0,
        out_shardings=(
            state_shardings,
            replicated,
        ),
        compiler_options=compiler_options,
    )
    eval_step = jax.jit(
        steps.make_eval_step(forward, head_loss),
        out_shardings=replicated,
        compiler_options=compiler_options,
    )

    def measure(params: model.Params) -> dict[str, float]:
        return evaluate.evaluate(
            lambda batch: jax.device_get(eval_step(params, _put_whole(batch, mesh))),
            data.texts,
            data.exams,
            config.eval.batch_size,
        )

    fingerprint = pipeline.fingerprint(data)
    resumed = checkpoints.latest_step()
    if resumed is None:
        params = _starting_params(config, model_config, mesh, config.model.param_dtype)
        state = jax.jit(
            lambda params: steps.TrainState(
                jnp.zeros((), jnp.int32), params, transforms.init(params)
            ),
            donate_argnums=0,
            out_shardings=state_shardings,
        )(params)
    else:
        state = checkpoints.restore(abstract_state, fingerprint)
    teacher = None
    if needs_teacher and (resumed or 0) < num_steps:
        teacher = _starting_params(
            config, model_config, mesh, config.model.teacher_dtype
        )

    first_step = resumed or 0
    batches = iter(
        pipeline.batches(
            config, data, first_step, jax.process_count(), jax.process_index()
        )
    )
    is_first_host = jax.process_index() == 0
    with (
        metrics.Writer(
            folder,
            config.metrics,
            -1 if resumed is None else resumed,
            config.to_dict(),
            is_first_host,
        ) as writer,
        metrics.Progress(
            name, first_step, num_steps, config.metrics.progress and is_first_host
        ) as progress,
    ):
        progress.say(_first_line(name, mesh, model_config, config, resumed))
        if first_step == 0 and config.train.eval_before:
            progress.say(f"{name}: measuring the start")
            writer.write(0, _prefixed(measure(state.params)))

        pending = None  # (step, metrics on the device) not read yet
        clock = _Clock()

        def read_pending() -> None:
            nonlocal pending
            if pending is None:
                return
            step, device_metrics = pending
            pending = None
            scalars = metrics.means(jax.device_get(device_metrics))
            _check_finite(step, scalars, folder, checkpoints.latest_step())
            rate = clock.rate(step, scalars["tokens"])
            writer.write(step, scalars | {"tokens_per_second": rate})
            progress.update(step, scalars["loss"], rate)

        for step in range(first_step + 1, num_steps + 1):
            batch = _put_rows(next(batches), config, mesh)
            state, step_metrics = train_step(state, teacher, batch)
            # The device is busy with this step while the host reads the one before.
            read_pending()
            is_last = step == num_steps
            is_saved = is_last or _is_due(step, config.train.save_every)
            # What is saved is read first, so that no checkpoint holds a NaN.
            if is_saved or _is_due(step, config.train.log_every):
                pending = step, step_metrics
            loss = None
            if is_last or _is_due(step, config.train.eval_every):
                read_pending()
                progress.say(f"{name}: measuring step {step}")
                results = measure(state.params)
                writer.write(step, _prefixed(results))
                text_losses = [v for k, v in results.items() if k.endswith("/loss")]
                loss = float(np.mean(text_losses)) if text_losses else None
                clock = _Clock()
            if is_saved:
                read_pending()
                checkpoints.save(state, step, config.to_dict(), fingerprint, loss)
                clock = _Clock()

    return _write_results(folder, data) if is_first_host else {}


def _abstract_state(config, model_config, mesh, transforms) -> steps.TrainState:
    """Shapes, dtypes and shardings of the state, before any array exists."""
    replicated = sharding.replicated(mesh)
    params = _abstract_params(model_config, mesh, config.model.param_dtype)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    moments = _placed(
        jax.eval_shape(transforms.init, params),
        optim.state_shardings(transforms, params, shardings, replicated),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    return steps.TrainState(step, params, moments)


def _abstract_params(model_config, mesh, dtype) -> model.Params:
    return _placed(
        model.abstract_params(model_config, jnp.dtype(dtype)),
        sharding.shardings(mesh, model.param_axes(model_config)),
    )


def _placed(abstract, shardings):
    """Gives every `jax.ShapeDtypeStruct` of a tree its sharding."""
    return jax.tree.map(
        lambda leaf, where: leaf.update(sharding=where), abstract, shardings
    )


def _starting_params(config, model_config, mesh, dtype) -> model.Params:
    """What this phase starts from, in the wanted dtype."""
    abstract = _abstract_params(model_config, mesh, dtype)
    if config.init_from:
        return checkpoint.load_params(config.init_from, abstract)
    return weights.load_params(config.model.path, abstract)


def _put_rows(batch: dict[str, np.ndarray], config, mesh) -> steps.Batch:
    """This host's rows of a global batch, to its devices."""
    where = sharding.batch_sharding(mesh)
    shape = config.data.batch_size, config.data.row_length
    return {
        key: jax.make_array_from_process_local_data(where, value, shape)
        for key, value in batch.items()
    }


def _put_whole(batch: dict[str, np.ndarray], mesh) -> steps.Batch:
    """A batch that every host holds whole, to all devices."""
    where = sharding.batch_sharding(mesh)
    return {
        key: jax.make_array_from_callback(value.shape, where, value.__getitem__)
        for key, value in batch.items()
    }


class _Clock:
    """Tokens per second between two reads; the first interval holds the compilation."""

    def __init__(self):
        self._last = None

    def rate(self, step: int, tokens_per_step: float) -> float:
        now = time.monotonic()
        last, self._last = self._last, (step, now)
        if last is None:
            return math.nan
        return (step - last[0]) * tokens_per_step / (now - last[1])


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _prefixed(results: dict[str, float]) -> dict[str, float]:
    return {f"eval/{key}": value for key, value in results.items()}


def _check_finite(step, scalars, folder, saved_step) -> None:
    if math.isfinite(scalars["loss"]) and math.isfinite(scalars["grad_norm"]):
        return
    saved = (
        "there is no checkpoint yet"
        if saved_step is None
        else (f"the last checkpoint is step {saved_step}")
    )
    raise FloatingPointError(
        f"step {step}: loss {scalars['loss']}, gradient norm {scalars['grad_norm']}; "
        f"{saved} in {folder}. Lower optimizer.learning_rate, lengthen "
        "optimizer.warmup_steps or look at the batch of that step"
    )


def _first_line(name, mesh, model_config, config, resumed) -> str:
    devices = mesh.devices.flat
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    size = sum(
        leaf.size for leaf in jax.tree.leaves(model.abstract_params(model_config))
    )
    if resumed is not None:
        start = f"going on after step {resumed}"
    else:
        start = f"starting from {config.init_from or config.model.path}"
    return (
        f"{name}: {devices[0].device_kind} x {mesh.size} ({shape}); "
        f"{size / 1e6:.1f} M parameters; "
        f"{config.data.batch_size * config.data.row_length:,} tokens a step; {start}"
    )


def _write_results(folder: epath.Path, data: pipeline.Data) -> dict[str, Any]:
    """Collects the run's record, which also holds what an interrupted run wrote."""
    rows = metrics.read(folder)
    evaluations = [
        {"step": row["step"]}
        | {k.removeprefix("eval/"): v for k, v in row.items() if k.startswith("eval/")}
        for row in rows
        if any(key.startswith("eval/") for key in row)
    ]
    rates = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    results = {
        "before": next((e for e in evaluations if e["step"] == 0), None),
        "after": evaluations[-1] if evaluations else {},
        "tokens_per_second": float(np.median(rates)) if rates else None,
        "mixture": data.report,
    }
    metrics.replace(folder / RESULTS_FILE, json.dumps(results, indent=2))
    return results
