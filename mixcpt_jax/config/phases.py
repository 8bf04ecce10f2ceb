"""One config for several phases: overrides, paths between phases, and what may change."""

import functools
import re
from collections.abc import Iterator
from typing import Any

import ml_collections

from mixcpt_jax.config.defaults import (
    bounded_config,
    default,
    exam,
    source,
    uses_teacher,
)
from mixcpt_jax.config.settings import check, leaves
from mixcpt_jax.config.validation import check_names
from mixcpt_jax.core.errors import InputError

# In a path: the folder of an earlier phase of the same run.
_PHASE = re.compile(r"(?:^|(?<=,)|(?<=, ))phase:")

# Keys that may change between runs in one workdir, because results do not depend on them.
FREE_ON_RESUME = (
    "mesh",
    "metrics",
    "runtime",
    # The weights may move; their identity is in the provenance.
    "model.path",
    "teacher.path",
    "model.remat",
    "model.architecture",
    "head",
    "data.num_workers",
    "data.prepared",
    "train.log_every",
    "train.save_every",
    "train.eval_every",
    "train.keep_last",
    "train.timeout",
    "train.profile",
    "train.profiler_port",
    "train.keep_best",  # in the configs of earlier versions
)

# Settings of earlier versions, with the value at which they had no effect.
_REMOVED = {
    "objective.anneal": "none",
    "objective.teacher_temperature": 1.0,
    "select.min_tokens": 1,
    "source": "",  # of an exam
}

# Job -> sections that it does not read. They may change too, so a mistake in a later phase
# can be fixed without running the earlier phases again.
_OF_TRAINING = ("optimizer", "train", "objective", "preference", "lora", "teacher")
_UNREAD = {
    "train": ("generate", "merge", "select", "export"),
    "generate": ("merge", "select", "export", *_OF_TRAINING),
    "merge": ("generate", "select", "export", *_OF_TRAINING),
    "select": ("generate", "merge", "export", *_OF_TRAINING),
    "evaluate": ("generate", "merge", "select", "export", *_OF_TRAINING),
    "export": (
        "generate", "merge", "select", *_OF_TRAINING, "data", "sources", "eval",
    ),
}  # fmt: skip


def for_phase(
    config: ml_collections.ConfigDict, phase: str
) -> ml_collections.ConfigDict:
    """The config of one phase: the shared one with the phase's overrides.

    Raises:
      InputError: the overrides name a key that does not exist or change its type.
    """
    check_names("phases", config.phases)
    merged = ml_collections.ConfigDict(config.to_dict())
    merged.phases = ()
    merged.overrides = ml_collections.ConfigDict()
    for name in config.overrides:
        if name not in config.phases:
            raise InputError(
                f"overrides.{name}: no such phase; config.phases has "
                f"{', '.join(config.phases)}"
            )
    overrides = config.overrides.get(phase, ml_collections.ConfigDict())
    check(overrides, merged, f"overrides.{phase}")
    merged.update(overrides)
    earlier = tuple(config.phases)[: list(config.phases).index(phase)]
    for key, value in leaves(merged.to_dict()):
        for part in _PHASE.split(value)[1:] if isinstance(value, str) else ():
            name = re.split("[/,]", part)[0]
            # A phase may name a source that only a later phase reads.
            is_start = key in ("init_from", "teacher.init_from")
            known = earlier if is_start else tuple(config.phases)
            if name not in known:
                raise InputError(
                    f"{key}={value!r} (phase {phase}): there is no phase {name!r}"
                    f"{' before it' if is_start else ''}; known: "
                    f"{', '.join(known) or 'none'}"
                )
    return merged


def resolve_phases(
    config: ml_collections.ConfigDict, run_folder: str
) -> ml_collections.ConfigDict:
    """Replaces every path "phase:NAME/..." in a config by one in the run's folder."""

    def resolve(value):
        if isinstance(value, dict):
            return {key: resolve(entry) for key, entry in value.items()}
        if isinstance(value, str):
            return _PHASE.sub(lambda _: f"{run_folder}/", value)
        return value

    return ml_collections.ConfigDict(resolve(config.to_dict()))


def changed(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config that differ from their defaults, by dotted key.

    Keys that an old stored config lacks count as defaults, so two configs are equal if
    their changed settings are.
    """
    return {key: value for key, value in leaves(config) if _default_of(key) != value}


def _default_of(key: str) -> Any:
    """The default of a dotted key, or None."""
    for pattern, defaults in _defaults():
        if found := pattern.fullmatch(key):
            return defaults.get(found[1])
    return None


@functools.cache
def _defaults() -> list[tuple[re.Pattern, dict[str, Any]]]:
    sections = [
        (r"(?:sources|eval\.texts|eval\.pairs)\.[^.]+\.(.+)", source()),
        (r"eval\.exams\.[^.]+\.(.+)", exam()),
        ("(.+)", default()),
    ]
    return [
        (re.compile(pattern), dict(leaves(part.to_dict())) | _REMOVED)
        for pattern, part in sections
    ]


def first_difference(
    config: ml_collections.ConfigDict,
    stored: dict[str, Any],
    is_finished: bool = False,
) -> tuple[str, Any, Any] | None:
    """The first setting that makes a stored config compute something else, or None.

    Args:
      config: the config now.
      stored: the config with which the folder's phase started.
      is_finished: whether that phase is finished. If not, the batch size may change,
        provided that the order of rows does not depend on it.

    Returns:
      (key, stored value, value now).
    """
    now, then = (changed(c) for c in (config.to_dict(), stored))
    free = (*FREE_ON_RESUME, *_unread(config))
    if config.train.keep_budget:
        # Where the phase ends depends on it.
        free = tuple(key for key in free if key != "train.eval_every")
    moves = any(entry.final_weight is not None for entry in config.sources.values())
    if config.train.num_steps and not moves and not is_finished:
        free = (*free, "data.batch_size")
    for key in sorted(now.keys() | then.keys()):
        if any(key == name or key.startswith(f"{name}.") for name in free):
            continue
        if now.get(key) != then.get(key):
            default = _default_of(key)
            return key, then.get(key, default), now.get(key, default)
    return None


def check_stored(stored: dict[str, Any]) -> None:
    """Checks the keys of a stored config that other phases read: model, adapters and start.

    Keys that it lacks or that no longer exist are from another version.

    Raises:
      InputError: names the first key whose value is not allowed.
    """
    check(stored.get("init_from", ""), "", "init_from")
    for section in ("model", "lora"):
        values = stored.get(section, {})
        if not isinstance(values, dict):
            raise InputError(f"{section}: must be a section of keys")
        reference = bounded_config()[section]
        for key in values.keys() & reference.keys():
            check(values[key], reference[key], f"{section}.{key}")
    targets = stored.get("lora", {}).get("targets", ())
    if not all(target in default().lora.targets for target in targets):
        raise InputError(f"lora.targets={targets!r}: names an unknown projection")


def _unread(config) -> Iterator[str]:
    """Keys and sections that the config's job does not read."""
    yield from _UNREAD.get(config.job, ())
    if config.job != "train":
        return
    if config.objective.kind != "preference":
        yield "preference"
    if not uses_teacher(config):
        yield "teacher"
    for name, entry in config.sources.items():
        if not (entry.weight or entry.holdout):
            yield f"sources.{name}"
