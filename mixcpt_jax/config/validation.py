"""Checks a config before anything is loaded.

`validate` names the first key that is unknown, of the wrong type, out of bounds or in
conflict with others, and the remedy.
"""

import importlib.util
import os
import re
from collections.abc import Iterable

import ml_collections

from mixcpt_jax.config import settings
from mixcpt_jax.config.budgets import check_budgets
from mixcpt_jax.config.defaults import (
    BUDGET,
    SAMPLES,
    all_sources,
    bounded_config,
    bounded_exam,
    bounded_source,
    default,
    has_other_teacher,
    objective_weights,
    warmup_steps,
)
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.core.text import is_name

_CONFIG, _SOURCE, _EXAM = bounded_config(), bounded_source(), bounded_exam()
# Tokens of a batch over all devices, which each host holds in memory several times.
_MOST_TOKENS = 2**26


def validate(config: ml_collections.ConfigDict, num_devices: int | None = None) -> None:
    """Checks keys, types, values and combinations.

    Args:
      config: a whole config, with any phase's overrides already applied.
      num_devices: of all hosts; None: skips the checks that depend on it.

    Raises:
      InputError: names the key, what was found and the remedy.
    """
    check_values(config)
    if config.train.num_steps:
        check_schedule(config, config.train.num_steps)
    _check_paths(config)
    _check_head(config.head)
    optimizer = config.optimizer
    if optimizer.spike_factor and not config.train.max_skipped:
        raise InputError(
            f"optimizer.spike_factor={optimizer.spike_factor}: needs train.max_skipped, "
            "which is 0; set it to how many steps in a row may be skipped"
        )
    for key, package in (
        ("wandb_project", "wandb"),
        ("goodput_job", "ml-goodput-measurement"),
    ):
        value = config.metrics[key]
        if value and importlib.util.find_spec(package.replace("-", "_")) is None:
            raise InputError(
                f"metrics.{key}={value}: the package {package} is not installed; run "
                f"`pip install {package}`, or leave it empty"
            )
    preference, lora = config.preference, config.lora
    if preference.loss == "ipo" and preference.label_smoothing:
        raise InputError(
            f"preference.label_smoothing={preference.label_smoothing}: "
            "preference.loss=ipo has none; set it to 0"
        )
    unknown = set(map(str, lora.targets)) - set(default().lora.targets)
    if unknown or not lora.targets:
        raise InputError(
            f"lora.targets={','.join(map(str, lora.targets))}: must be some of "
            f"{', '.join(default().lora.targets)}"
        )
    _check(
        "://" not in config.data.prepared,
        config,
        "data.prepared",
        "a folder on a local disk",
    )
    _check_push(config)
    if config.clean.decontaminate and not config.eval.exams:
        raise InputError(
            f"clean.decontaminate={config.clean.decontaminate}: eval.exams has no exam; "
            "add one, or set it to 0"
        )
    _check_teacher(config)
    _check_sources(config)
    _check_formats(config)
    _check_selection(config)
    _check_generate(config)
    _check_merge(config)
    _check_keep_budget(config)
    if config.job != "export":
        _check_batch(config, num_devices)


def _check_push(config) -> None:
    """Checks that an export can be pushed, before hours of training."""
    name = config.export.hub_id
    if config.job != "export" or not name:
        return
    _check(
        re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) is not None,
        config,
        "export.hub_id",
        "ORG/NAME, of a model on the Hub",
    )
    from huggingface_hub import get_token  # takes a fifth of a second

    if not get_token():
        raise InputError(
            f"export.hub_id={name}: no token is set to push with; set HF_TOKEN to one that "
            "may write, or run `hf auth login`"
        )


def check_values(config: ml_collections.ConfigDict) -> None:
    """Checks every key by itself: its name, type and bounds.

    Args:
      config: a whole config, of a run or of a phase.

    Raises:
      InputError: names the key, what was found and what it must be.
    """
    settings.check(config, _CONFIG, "")
    settings.check_complete(config, _CONFIG, "")
    check_names("sources", config.sources)
    for kind in ("texts", "pairs", "exams"):
        check_names(f"eval.{kind}", config.eval[kind])
    exams = ((f"eval.exams.{name}", entry) for name, entry in config.eval.exams.items())
    for entries, reference in ((all_sources(config), _SOURCE), (exams, _EXAM)):
        for place, entry in entries:
            settings.check(entry, reference, place)
            settings.check_complete(entry, reference, place)
    for place, reference in (
        ("select.keep", SAMPLES),
        ("merge.keep", BUDGET),
        ("train.keep_budget", BUDGET),
    ):
        for name, value in config[place].items():
            settings.check(value, reference, f"{place}.{name}")


def check_names(place: str, names: Iterable[str]) -> None:
    """Checks that files and folders can have these names.

    Raises:
      InputError: the first name that is a path or cannot be printed.
    """
    for name in names:
        if not is_name(name):
            raise InputError(
                f"{place}: {name!a:.80} must be a name: printable text without slashes"
            )


def _check_head(head: ml_collections.ConfigDict) -> None:
    size, block = head.chunk_size, head.block_size
    if block and (not size or block % size):
        raise InputError(
            f"head.block_size={block}: must be a multiple of head.chunk_size, which is "
            f"{size}; set head.chunk_size to a divisor of it, or head.block_size to 0"
        )


def frozen_dtype(model: ml_collections.ConfigDict) -> str:
    """The dtype of a phase's frozen model, from `config.model`."""
    return model.teacher_dtype or _coarser(model.param_dtype, model.compute_dtype)


def _coarser(*dtypes: str) -> str:
    return "bfloat16" if "bfloat16" in dtypes else "float32"


def _check_teacher(config) -> None:
    """Raises InputError if the teacher's dtype or source conflicts with other settings."""
    model = config.model
    student = _coarser(model.param_dtype, model.compute_dtype)
    frozen = _coarser(frozen_dtype(model), model.compute_dtype)
    # Adapters are trained on top of the frozen model itself, and another teacher differs
    # from the start.
    is_start = not (config.lora.rank or has_other_teacher(config))
    if config.job == "train" and is_start and frozen != student:
        raise InputError(
            f"model.teacher_dtype={model.teacher_dtype}: has another precision than "
            f"model.param_dtype={model.param_dtype} and "
            f"model.compute_dtype={model.compute_dtype}, so margins and KL would not begin "
            "at 0; leave it empty"
        )
    objective = config.objective
    if objective.teacher == "step":
        if objective.teacher_top_k:
            raise InputError(
                f"objective.teacher_top_k={objective.teacher_top_k}: needs "
                "objective.teacher='prepared'"
            )
    elif config.job == "train" and not config.data.prepared:
        raise InputError(
            "objective.teacher=prepared: set data.prepared to the folder that holds it"
        )
    teacher = config.teacher
    if teacher.tokenizer and not (teacher.path or teacher.init_from):
        raise InputError(
            f"teacher.tokenizer={teacher.tokenizer}: teacher.path and teacher.init_from "
            "are empty, so there is no other teacher; set one of them"
        )


def check_schedule(config: ml_collections.ConfigDict, num_steps: int) -> None:
    """Checks the learning rate's schedule against the length of the phase.

    Raises:
      InputError: its parts do not fit into `num_steps`.
    """
    optimizer = config.optimizer
    steps = f"train.num_steps={num_steps}"
    if not config.train.num_steps:
        steps = f"the {num_steps} steps to the limits of the sources"
    _check(
        optimizer.warmup_steps < num_steps,
        config,
        "optimizer.warmup_steps",
        f"less than {steps}",
    )
    warmup = warmup_steps(optimizer, num_steps)
    if optimizer.schedule == "wsd":
        decay_steps = round(optimizer.decay_fraction * num_steps)
        _check(
            0 < decay_steps <= num_steps - warmup,
            config,
            "optimizer.decay_fraction",
            f"a share of the steps that leaves {warmup} of them to warm-up",
        )


def _check_paths(config) -> None:
    """Checks paths, which have no default; one error names all missing ones."""
    entries = [("model", config.model), *all_sources(config)]
    missing = [f"{place}.path" for place, entry in entries if not entry.path]
    if missing:
        flags = " ".join(f"--config.{key}=..." for key in missing)
        raise InputError(f"{', '.join(missing)}: no path is given; add {flags}")


def _check_sources(config) -> None:
    is_training = config.job == "train"
    if is_training and not any(entry.weight > 0 for entry in config.sources.values()):
        raise InputError(
            "sources: none has a weight above 0; set a weight, as in sources.NAME.weight=1"
        )
    for place, entry in all_sources(config):
        is_on_hub = entry.path.startswith("hf://datasets/") and "," not in entry.path
        for key in ("subset", "data_files"):
            if entry[key] and not is_on_hub:
                raise InputError(
                    f"{place}.{key}={entry[key]!r}: needs one data set of the Hub as path, "
                    f"hf://datasets/ORG/NAME, not {entry.path!r}; leave it empty"
                )
        if entry.final_weight is not None and not entry.weight:
            raise InputError(
                f"{place}.final_weight={entry.final_weight}: {place}.weight is 0; set it "
                "to a number above 0, such as 1e-6"
            )
    if (
        is_training
        and not config.train.num_steps
        and not any(
            entry.weight and (entry.epochs or entry.max_tokens)
            for entry in config.sources.values()
        )
    ):
        raise InputError(
            "train.num_steps=0: trains to the limits of the sources, and none has one; set "
            "epochs or max_tokens of a source, or train.num_steps"
        )
    for name, entry in config.sources.items():
        is_pair = entry.format == "chat_preference"
        measured = config.eval.pairs if is_pair else config.eval.texts
        if name == "eval" or (entry.holdout and name in measured):
            raise InputError(
                f"sources.{name}: eval already uses this name; choose another"
            )
        weights = objective_weights(config, name)
        if config.objective.kind != "tokens":
            continue
        if entry.weight and not any(weights.values()):
            raise InputError(
                f"sources.{name}: objective weights {weights}: one must be above 0; set "
                f"objective.*_weight or sources.{name}.*_weight"
            )
    for name, entry in config.eval.exams.items():
        if not entry.path:
            raise InputError(
                f"eval.exams.{name}: has no path; name a file of questions"
            )


def _check_formats(config) -> None:
    """Checks that preference objectives get pairs and that no other objective does."""
    kind = config.objective.kind
    for name, entry in config.sources.items():
        is_pair = entry.format == "chat_preference"
        if config.job == "train" and entry.weight and is_pair != (kind == "preference"):
            raise InputError(
                f"sources.{name}.format={entry.format!r} does not go with "
                f"objective.kind={kind!r}: format 'chat_preference' needs kind "
                "'preference', all other formats need kind 'tokens'"
            )
    for section, is_pair in (("texts", False), ("pairs", True)):
        for name, entry in config.eval[section].items():
            for trained, source_entry in config.sources.items():
                if config.job == "train" and _is_all_measured(source_entry, entry):
                    raise InputError(
                        f"eval.{section}.{name}: measures all records of the files that "
                        f"sources.{trained} trains on, so none is left to train on; set "
                        f"eval.{section}.{name}.holdout to a number above 0, or name "
                        "other files"
                    )
            _check(
                (entry.format == "chat_preference") == is_pair,
                config,
                f"eval.{section}.{name}.format",
                "chat_preference" if is_pair else "no chat_preference",
            )
    if kind == "preference" and config.data.overlong == "split":
        raise InputError(
            "data.overlong='split': a pair cannot be split; use truncate, drop or refuse"
        )


def _is_all_measured(trained, measured) -> bool:
    """Whether every record that a source would train on is measured, by the settings."""
    is_read_whole = not measured.max_records or (
        0 < trained.max_records <= measured.max_records
    )
    return (
        trained.weight > 0
        and not measured.holdout
        and is_read_whole
        and all(
            trained[key] == measured[key] for key in ("split", "subset", "data_files")
        )
        and (
            trained.reader == measured.reader or "" in (trained.reader, measured.reader)
        )
        and _real_path(trained.path) == _real_path(measured.path)
    )


def _real_path(path: str) -> str:
    """A local path without links and dots; any other path unchanged."""
    if "://" in path or path.startswith(("package:", "phase:")):
        return path
    return os.path.realpath(os.path.expanduser(path))


def _check_selection(config) -> None:
    for name, count in config.select.keep.items():
        place = f"select.keep.{name}"
        if name not in config.sources:
            raise InputError(
                f"{place}: no such source; known: {', '.join(config.sources)}"
            )
        _check(
            config.sources[name].format in ("instruction", "preference", "chat"),
            config,
            f"sources.{name}.format",
            "instruction, preference or chat (for select.keep)",
        )
        most = config.select.max_candidates
        if config.job == "select" and count > most:
            raise InputError(
                f"{place}={count}: more than select.max_candidates={most}; raise "
                "select.max_candidates"
            )
    if config.job == "select" and not config.select.keep:
        raise InputError(
            "select.keep: names no source; set select.keep.NAME to a number of samples"
        )


def _check_generate(config) -> None:
    if config.job != "generate":
        return
    settings = config.generate
    if settings.prompts and (settings.source or settings.kind != "replay"):
        raise InputError(
            f"generate.prompts={settings.prompts}: needs generate.kind=replay and an empty "
            "generate.source"
        )
    if settings.kind != "replay" or settings.source:
        if settings.source not in config.sources:
            raise InputError(
                f"generate.source={settings.source!r}: must be one of "
                f"{', '.join(config.sources) or 'sources, of which there is none'}"
            )
        formats = ("document",)
        if settings.kind == "replay":
            formats = ("instruction", "preference", "chat")
        format = config.sources[settings.source].format
        if format not in formats:
            raise InputError(
                f"sources.{settings.source}.format={format!r}: must be one of "
                f"{', '.join(formats)} for generate.kind={settings.kind}"
            )


def _check_merge(config) -> None:
    shares = config.merge.shares
    is_sound = shares and all(
        settings.same_type(share, 0.0) and 0 <= share <= 1 for share in shares
    )
    if not is_sound or len({*shares}) < len(shares):
        raise InputError(
            f"merge.shares={tuple(shares)}: must be different numbers from 0 to 1"
        )
    if config.job == "merge":
        if not config.init_from:
            raise InputError(
                "init_from: is empty; merge needs the phase whose end it merges with its "
                "start, such as phase:cpt"
            )
        check_budgets("merge.keep", config.merge.keep, config)


def _check_keep_budget(config) -> None:
    budgets = config.train.keep_budget
    if config.job != "train" or not budgets:
        return
    check_budgets("train.keep_budget", budgets, config)
    if not config.train.eval_every:
        raise InputError(
            "train.keep_budget: needs train.eval_every, which is 0; set it to the number "
            "of steps between two evaluations"
        )


def _check_batch(config, num_devices: int | None) -> None:
    batch, parts = config.data.batch_size, config.optimizer.accumulation_steps
    for key in ("data.batch_size", "data.row_length", "eval.batch_size"):
        if not config[key]:
            raise InputError(
                f"{key}=0: must be > 0; only phases that train choose it, with "
                "data.batch_size=0"
            )
    for section in ("data", "eval"):
        rows = config[section].batch_size
        length = config[section].row_length or config.data.row_length
        if rows * length > _MOST_TOKENS:
            raise InputError(
                f"{section}.batch_size={rows}: with rows of {length:,} tokens a batch has "
                f"{rows * length:,} tokens; must be <= {_MOST_TOKENS:,}: lower "
                f"{section}.batch_size or {section}.row_length"
            )
    if batch % parts:
        raise InputError(
            f"optimizer.accumulation_steps={parts} does not divide "
            f"data.batch_size={batch}; make the batch a multiple"
        )
    if num_devices is None:
        return
    # Imported here: reading a config must not load jax.
    from mixcpt_jax.core import mesh_shape

    data, fsdp, _ = mesh_shape.mesh_shape(config.mesh, num_devices)
    for key, rows in (
        ("data.batch_size / optimizer.accumulation_steps", batch // parts),
        ("eval.batch_size", config.eval.batch_size),
    ):
        if rows % (data * fsdp):
            raise InputError(
                f"{key} = {rows} rows do not divide over the mesh's "
                f"data x fsdp = {data} x {fsdp}; use a multiple of {data * fsdp}"
            )


def _check(holds: bool, config, key: str, allowed: str) -> None:
    if not holds:
        raise InputError(f"{key}={config[key]!r}: must be {allowed}")
