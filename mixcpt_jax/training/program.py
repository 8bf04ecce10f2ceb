"""The step of a training phase and the shapes of its arguments, built from the config."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from mixcpt_jax import config as config_lib
from mixcpt_jax.data import pipeline
from mixcpt_jax.models import lora as lora_lib
from mixcpt_jax.models import transformer
from mixcpt_jax.objectives import (
    dense,
    interface,
    over_pairs,
    over_tokens,
    streamed,
    teachers,
)
from mixcpt_jax.runtime import sharding
from mixcpt_jax.training import optimizer, steps, teacher_outputs
from mixcpt_jax.training import phase as phase_lib


class Program(NamedTuple):
    """What a phase runs on its devices; nothing is loaded or compiled when it is built.

    Attributes:
      train_step: the jitted `(state, frozen, batch) -> (state, metrics)`.
      transforms: the optimizer.
      state, frozen, teacher: shapes, dtypes and shardings of the step's arguments.
        `frozen` is of the model that the phase starts from, `teacher` of another teacher;
        each is None if the step does not need it, and may be only a part of the model.
      start: those of the whole model that the phase starts from, if evaluations need it
        and `frozen` is not it.
    """

    train_step: Any
    transforms: optax.GradientTransformation
    state: steps.TrainState
    frozen: transformer.Params | None
    teacher: transformer.Params | None = None
    start: transformer.Params | None = None


def make_program(phase: phase_lib.Phase, data: pipeline.Data) -> Program:
    """Builds the training step of a phase."""
    config = phase.config
    transforms, schedule = optimizer.make_optimizer(
        config.optimizer, data.num_steps, config.model.param_dtype
    )
    if config.train.max_skipped:
        transforms = optimizer.skip_bad_steps(transforms, config.optimizer.spike_factor)
    state = _abstract_state(phase, transforms)
    train_step = jax.jit(
        steps.make_train_step(
            _objective(phase, data),
            transforms,
            schedule,
            config.optimizer.accumulation_steps,
            has_adapters=phase.lora is not None,
            param_specs=jax.tree.map(lambda leaf: leaf.sharding.spec, state.params),
        ),
        donate_argnums=0,
        out_shardings=(
            jax.tree.map(lambda leaf: leaf.sharding, state),
            sharding.replicated(phase.mesh),
        ),
        compiler_options=phase.compiler_options,
    )
    whole = phase_lib.abstract_params(
        phase.model_config, phase.mesh, phase.frozen_dtype
    )
    frozen = frozen_part(phase, data)(whole)
    teacher = None
    if phase.other_teacher is not None:
        teacher = teacher_part(phase, data)(
            phase_lib.abstract_params(
                phase.teacher_config, phase.mesh, phase.teacher_dtype
            )
        )
    is_apart = config_lib.measures_kl(config) and not config_lib.holds_start(config)
    start = whole if is_apart else None
    return Program(train_step, transforms, state, frozen, teacher, start)


def _objective(phase: phase_lib.Phase, data: pipeline.Data) -> interface.Objective:
    """The objective that the config describes."""
    config = phase.config
    student = phase.forward(config.model.remat, phase.lora)
    names = tuple(rows.source.name for rows in data.packed)
    if config.objective.kind == "tokens":
        return over_tokens.token_objective(
            student,
            _teacher(phase, data),
            names,
            functools.partial(
                streamed.head_loss,
                token_weighting=config.objective.token_weighting,
                vocab_size=phase.num_tokens,
                **phase.head_options,
            ),
            _without_teacher(config, data),
            config.objective.load_balance,
        )
    preference = config.preference
    return over_pairs.preference_objective(
        student,
        phase.forward() if preference.reference == "step" else None,
        names,
        data.packed[0].num_segments,
        functools.partial(
            dense.preference_loss,
            beta=preference.beta,
            kind=preference.loss,
            label_smoothing=preference.label_smoothing,
            sft_weight=preference.sft_weight,
        ),
        preference.length_normalised or preference.loss == "ipo",
        functools.partial(streamed.log_probabilities, **phase.head_options),
    )


def _needs_teacher(config, data: pipeline.Data) -> bool:
    return config.objective.kind == "tokens" and any(
        teacher_outputs.needs_teacher(config, rows) for rows in data.packed
    )


def reads_teacher(config, data: pipeline.Data) -> bool:
    return config.objective.teacher == "prepared" and _needs_teacher(config, data)


def with_teacher(phase: phase_lib.Phase, data: pipeline.Data) -> pipeline.Data:
    if reads_teacher(phase.config, data):
        return pipeline.with_teacher(data, teacher_outputs.open_rows(phase, data))
    return data


def _teacher(phase: phase_lib.Phase, data: pipeline.Data) -> teachers.Teacher | None:
    config = phase.config
    if not _needs_teacher(config, data):
        return None
    if not reads_teacher(config, data):
        forward = phase.teacher_forward()
        if phase.other_teacher is not None:
            # Its experts are not those of the start.
            forward = dataclasses.replace(forward, with_routing=None)
        return teachers.running_teacher(forward)
    if config.objective.teacher_top_k:
        return teachers.compact_teacher()
    return teachers.prepared_teacher(config.model.compute_dtype)


def _without_teacher(config, data: pipeline.Data) -> list[str]:
    """The sources in the stream for which a prepared teacher has no outputs."""
    if not reads_teacher(config, data):
        return []
    used = (rows for rows in data.packed if rows.source.share > 0)
    return [
        rows.source.name
        for rows in used
        if not teacher_outputs.needs_teacher(config, rows)
    ]


def frozen_passes(config: ml_collections.ConfigDict, data: pipeline.Data) -> str:
    """The part of teacher or reference that runs in a step: whole, unembedding or none."""
    if config.objective.kind == "preference":
        return "whole" if config.preference.reference == "step" else "none"
    if not _needs_teacher(config, data):
        return "none"
    if not reads_teacher(config, data):
        return "whole"
    return "none" if config.objective.teacher_top_k else "unembedding"


def frozen_part(
    phase: phase_lib.Phase, data: pipeline.Data
) -> Callable[[transformer.Params], transformer.Params | None]:
    """Selects the parameters of the phase's start that the step needs."""
    if phase.lora:
        return _PARTS["whole"]
    if phase.other_teacher is not None:
        return _PARTS["none"]
    return teacher_part(phase, data)


def teacher_part(
    phase: phase_lib.Phase, data: pipeline.Data
) -> Callable[[transformer.Params], transformer.Params | None]:
    """Selects the parameters of the teacher, or reference, that the step needs."""
    return _PARTS[frozen_passes(phase.config, data)]


_PARTS = {
    "whole": lambda params: params,
    "unembedding": transformer.unembedding_alone,
    "none": lambda params: None,
}


def _abstract_state(phase: phase_lib.Phase, transforms) -> steps.TrainState:
    """Shapes, dtypes and shardings of the state, before any array exists."""
    replicated = sharding.replicated(phase.mesh)
    shape_of = (phase.model_config, phase.mesh, phase.config.model.param_dtype)
    if phase.lora:
        model_config, mesh, dtype = shape_of
        params = phase_lib.abstract_adapters(model_config, phase.lora, mesh, dtype)
    else:
        params = phase_lib.abstract_params(*shape_of)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    moments = sharding.place(
        jax.eval_shape(transforms.init, params),
        optimizer.state_shardings(transforms, params, shardings, replicated),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    return steps.TrainState(step, params, moments)


def starting_state(phase: phase_lib.Phase, program: Program) -> steps.TrainState:
    dtype = phase.config.model.param_dtype
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state)

    def init(params):
        return steps.TrainState(
            jnp.zeros((), jnp.int32), params, program.transforms.init(params)
        )

    if phase.lora:
        key = jax.random.key(phase.config.seed)
        make = jax.jit(
            lambda key: init(
                lora_lib.init_adapters(phase.model_config, phase.lora, key, dtype)
            ),
            out_shardings=state_shardings,
        )
        return make(key)
    return jax.jit(init, donate_argnums=0, out_shardings=state_shardings)(
        phase.starting_params(dtype)
    )
