"""Chooses the sizes of a run from its corpus and its devices.

If `data.batch_size` is 0, this module sets it, `data.row_length`, the number of
microbatches and the evaluation batch size, for all phases of a run, before anything is
loaded:

- A phase without a number of steps (`train.num_steps=0`) reads N tokens in all, about 8
  sqrt(N) per step. So a corpus ten times as large takes three times as many steps, each
  three times as large: 40 steps of 2,048 tokens for 100 thousand tokens, 350 steps of
  32,768 for 10 million, and 2,000 steps of 262,144, the maximum, for 500 million.
- A row has a quarter of the tokens of a step, but at most the model's context and 4,096.
- A microbatch has as many rows as fit in the memory of a device by `step_plan.step_memory`.
  If one row does not fit, rows are halved until it does.
- A source holds out at most a tenth of its records.
"""

import itertools
from typing import Any, NamedTuple

import jax
import ml_collections

from mixcpt_jax import config as config_lib
from mixcpt_jax.core import mesh_shape, paths, small_files
from mixcpt_jax.core.chips import GIB
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import formats as format_lib
from mixcpt_jax.data import hub, sources
from mixcpt_jax.data.corpus import Corpus
from mixcpt_jax.models import pretrained, tokenizer, transformer
from mixcpt_jax.planning import step_plan, utilization
from mixcpt_jax.runtime import terminal

_STEP_TOKENS = (1024, 262_144)
_ROW_LENGTHS = (256, 4096)
_ROWS = 4
# For a phase with a number of steps, such as SFT.
_FIXED_STEP_TOKENS = 8192
# Texts that are tokenized to estimate characters per token.
_SAMPLE = 256
# The share of a device's memory to use; the rest is for what the formula ignores.
USABLE = 0.85
# A source holds out at most one in this many of its records.
RECORDS_PER_HELD_OUT = 10


class Sizes(NamedTuple):
    """The sizes of a phase.

    Attributes:
      row_length: tokens of a row.
      batch_size: rows of a step, over all devices.
      accumulation_steps: microbatches of a step.
      eval_batch_size: rows of an evaluation batch, over all devices.
      memory: bytes of a device that a step needs, by the formula.
    """

    row_length: int
    batch_size: int
    accumulation_steps: int
    eval_batch_size: int
    memory: float


def resolve(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Sets the sizes of the phases whose `data.batch_size` is 0.

    A phase that has begun in the workdir keeps its sizes.

    Raises:
      InputError: the model or the text is wrong, or no size fits.
    """
    names = config.phases or ("",)
    stored = {name: _stored(f"{workdir}/{name}") for name in names}
    with config.unlocked():
        _limit_holdouts(config, next(filter(None, stored.values()), None))
        phases = {name: config_lib.for_phase(config, name) for name in config.phases}
        for name, phase in (phases or {"": config}).items():
            if phase.job != "train" or phase.data.batch_size:
                continue
            own = config.overrides.get(name, {})
            # A phase without its own batch size shares that of the config.
            is_own = "batch_size" in own.get("data", {})
            begun = stored[name]
            sizes = _stored_sizes(begun) if begun else _sizes(phase, name)
            target = own if is_own else config
            target.data.row_length = sizes.row_length
            target.data.batch_size = sizes.batch_size
            target.optimizer.accumulation_steps = sizes.accumulation_steps
            if not config.eval.batch_size:
                config.eval.batch_size = sizes.eval_batch_size


def _sizes(config: ml_collections.ConfigDict, name: str) -> Sizes:
    config = hub.pin_now(config)
    model_config = pretrained.read_model_config(config.model.path)
    mesh, available = _devices(config)
    num_tokens = 0.0 if config.train.num_steps else _num_tokens(config)
    sizes = choose(config, model_config, num_tokens, mesh, available)
    corpus = f", about {num_tokens:,.0f} tokens in all" if num_tokens else ""
    terminal.say(
        f"{f'{name}: ' if name else ''}{sizes.batch_size} rows of {sizes.row_length:,} "
        f"tokens per step in {sizes.accumulation_steps} microbatches{corpus}; estimated "
        f"memory {sizes.memory / GIB:.1f} of {available / GIB:.1f} GiB per device"
    )
    return sizes


def choose(
    config: ml_collections.ConfigDict,
    model_config: transformer.ModelConfig,
    num_tokens: float,
    mesh: tuple[int, int, int],
    available: float,
) -> Sizes:
    """Chooses the sizes for a number of tokens and a memory.

    Args:
      config: of a training phase.
      model_config: the architecture.
      num_tokens: tokens that the phase reads in all; 0: its number of steps is set.
      mesh: sizes of the axes data, fsdp and tensor.
      available: bytes of a device.

    Raises:
      InputError: one row of 256 tokens does not fit on a device.
    """
    least, most = _STEP_TOKENS
    step_tokens = 8 * num_tokens**0.5 if num_tokens else _FIXED_STEP_TOKENS
    step_tokens = _power_of_two(min(max(step_tokens, least), most))
    longest = min(_ROW_LENGTHS[1], model_config.max_positions)
    row_length = max(step_tokens // _ROWS, _ROW_LENGTHS[0])
    row_length = _power_of_two(min(row_length, longest))
    if config.data.row_length:
        row_length = config.data.row_length
    num_groups = mesh[0] * mesh[1]

    def memory(rows: int) -> float:
        return step_plan.step_memory(config, model_config, mesh, rows, row_length)

    while memory(1) > USABLE * available:
        if config.data.row_length or row_length <= _ROW_LENGTHS[0]:
            raise InputError(
                f"model.path={config.model.path}: a step of one row of {row_length} tokens "
                f"needs {memory(1) / GIB:.1f} GiB per device; must be <= "
                f"{USABLE * available / GIB:.1f}; set lora.rank=16 or "
                "model.param_dtype=bfloat16, or use a smaller model or more devices"
            )
        row_length //= 2
    rows = _power_of_two(max(step_tokens / row_length / num_groups, 1))
    at_once = rows
    while at_once > 1 and memory(at_once) > USABLE * available:
        at_once //= 2
    return Sizes(
        row_length,
        rows * num_groups,
        rows // at_once,
        at_once * num_groups,
        memory(at_once),
    )


def _power_of_two(number: float) -> int:
    """The largest power of two <= a number >= 1."""
    return 1 << (int(number).bit_length() - 1)


def _stored(folder: str) -> dict[str, Any] | None:
    """The config of a phase that has begun in a folder, or None."""
    path = paths.absolute(folder) / "config.json"
    shape = {
        "data": {"row_length": int, "batch_size": int},
        "optimizer": {"accumulation_steps": int},
        "eval": {"batch_size": int},
        "sources": {str: {"holdout": int}},
    }
    return small_files.read_json(path, shape) if path.exists() else None


def _stored_sizes(stored: dict[str, Any]) -> Sizes:
    """The sizes of a phase that has begun."""
    return Sizes(
        stored["data"]["row_length"],
        stored["data"]["batch_size"],
        stored["optimizer"]["accumulation_steps"],
        stored["eval"]["batch_size"],
        0.0,
    )


def _limit_holdouts(
    config: ml_collections.ConfigDict, stored: dict[str, Any] | None
) -> None:
    """Limits the holdout of each source to a tenth of its records, at least one.

    Args:
      config: of all phases.
      stored: the config of a phase that has begun; its holdouts are kept.
    """
    read = config if stored else hub.pin_now(config)
    for name, entry in config.sources.items():
        if not (entry.weight and entry.holdout):
            continue
        if stored:
            if name in stored["sources"]:
                found = stored["sources"][name]["holdout"]
                entry.holdout = min(entry.holdout, found)
            continue
        enough = RECORDS_PER_HELD_OUT * entry.holdout
        # Bad records are reported later, when the whole source is read.
        records = sources.read(
            read.sources[name].path,
            entry.reader,
            read.sources[name].split,
            lambda error: None,
            entry.max_expansion,
        )
        most = min(enough, entry.max_records or enough)
        num_records = sum(1 for _ in itertools.islice(records, most))
        limit = max(num_records // RECORDS_PER_HELD_OUT, 1)
        if limit < entry.holdout:
            terminal.say(
                f"{name}: holds out {limit} of {num_records} records instead of "
                f"sources.{name}.holdout={entry.holdout}, at most a tenth"
            )
            entry.holdout = limit


def _devices(config: ml_collections.ConfigDict) -> tuple[tuple[int, int, int], float]:
    """The sizes of the mesh's axes, and the bytes of memory of a device."""
    devices = jax.devices()
    mesh = mesh_shape.mesh_shape(config.mesh, len(devices))
    return mesh, utilization.memory_of(devices[0])


def _num_tokens(config: ml_collections.ConfigDict) -> float:
    """About how many tokens a phase without a number of steps reads in all.

    The phase ends when every source with a limit has reached it.
    """
    vocabulary = tokenizer.load(
        config.model.tokenizer or config.model.path, config.model.chat_template
    )
    total = sum(entry.weight for entry in config.sources.values())
    most = 0.0
    for entry in config.sources.values():
        if not (entry.weight and (entry.epochs or entry.max_tokens)):
            continue
        limits = [float(entry.max_tokens)] if entry.max_tokens else []
        if entry.epochs:
            limits.append(entry.epochs * _size(config, entry, vocabulary))
        most = max(most, min(limits) * total / entry.weight)
    return most


def _size(config, entry, vocabulary) -> float:
    """About how many tokens a source has, from the characters per token of a sample."""
    settings = entry.format, entry.fields.to_dict(), entry.preference_side
    characters, sample = 0, []
    for record in Corpus(config, entry).train_split():
        text = format_lib.plain_text(record, *settings)
        characters += len(text)
        if len(sample) < _SAMPLE:
            sample.append(text[:10_000])
    tokens = sum(map(len, vocabulary.encode_batch(sample)))
    return characters * tokens / max(sum(map(len, sample)), 1)
