"""A run sized by its corpus and its devices.

Where `data.batch_size` is 0, it, `data.row_length`, the microbatches and the batches that
are measured are chosen here, once for all phases of a run and before anything is loaded:

- A phase to the end of the data (`train.num_steps=0`) reads N tokens, and a step reads
  about 8 sqrt(N) of them, so that a corpus of ten times the size takes three times as many
  steps, three times as long: 40 steps of 2,048 tokens for 100 thousand, 350 of 32,768 for
  10 million, 2,000 of 262,144 for 500 million, the most.
- Rows are as long as leaves four of them to a step, within the model's context and 4,096.
- As many of a device's rows are taken at a time as fit its memory by
  `step_plan.step_memory`; rows are made shorter where one alone does not fit.
"""

import json
import os
from typing import NamedTuple

import jax
import ml_collections

from mixcpt_jax import config as config_lib
from mixcpt_jax.core import mesh_shape, paths
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import formats as format_lib
from mixcpt_jax.data.corpus import Corpus
from mixcpt_jax.models import pretrained, tokenizer, transformer
from mixcpt_jax.planning import step_plan
from mixcpt_jax.runtime import chips, terminal
from mixcpt_jax.runtime.chips import GIB

_STEP_TOKENS = (1024, 262_144)
_ROW_LENGTHS = (256, 4096)
_ROWS = 4
# Of a phase whose steps are given, such as SFT.
_FIXED_STEP_TOKENS = 8192
# Texts that are tokenised to tell tokens from characters.
_SAMPLE = 256
# Of a device's memory; the rest is for what the formula does not know of.
USABLE = 0.85


class Sizes(NamedTuple):
    """What is chosen.

    Attributes:
      row_length: tokens of a row.
      batch_size: rows of a step, over all devices.
      accumulation_steps: microbatches of a step.
      eval_batch_size: rows that are measured at a time.
      memory: bytes of a device that a step takes, by the formula.
    """

    row_length: int
    batch_size: int
    accumulation_steps: int
    eval_batch_size: int
    memory: float


def resolve(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Sets the sizes of a config and of its phases, where they are left to this module.

    A phase that has begun in the workdir keeps its sizes.

    Raises:
      InputError: the model or the text is wrong, or nothing fits.
    """
    phases = {name: config_lib.for_phase(config, name) for name in config.phases}
    with config.unlocked():
        for name, phase in (phases or {"": config}).items():
            if phase.job != "train" or phase.data.batch_size:
                continue
            own = config.overrides.get(name, {})
            # What a phase does not set itself is that of all.
            is_own = "batch_size" in own.get("data", {})
            sizes = _begun(f"{workdir}/{name}") or _sizes(phase, name)
            target = own if is_own else config
            target.data.row_length = sizes.row_length
            target.data.batch_size = sizes.batch_size
            target.optimizer.accumulation_steps = sizes.accumulation_steps
            if not config.eval.batch_size:
                config.eval.batch_size = sizes.eval_batch_size


def _sizes(config: ml_collections.ConfigDict, name: str) -> Sizes:
    model_config = pretrained.read_model_config(config.model.path)
    mesh, available = _devices(config)
    num_tokens = 0.0 if config.train.num_steps else _num_tokens(config)
    sizes = choose(config, model_config, num_tokens, mesh, available)
    found = f"of about {num_tokens:,.0f} tokens, " if num_tokens else ""
    terminal.say(
        f"{f'{name}: ' if name else ''}{sizes.batch_size} rows of {sizes.row_length:,} "
        f"tokens a step, {found}in {sizes.accumulation_steps} microbatches; by formula "
        f"{sizes.memory / GIB:.1f} of {available / GIB:.1f} GiB of a device"
    )
    return sizes


def choose(
    config: ml_collections.ConfigDict,
    model_config: transformer.ModelConfig,
    num_tokens: float,
    mesh: tuple[int, int, int],
    available: float,
) -> Sizes:
    """The sizes for a number of tokens and a memory.

    Args:
      config: of the phase that trains on the corpus.
      model_config: the architecture.
      num_tokens: that the phase reads in all; 0: its steps are given.
      mesh: sizes of the axes data, fsdp and tensor.
      available: bytes of a device.

    Raises:
      InputError: one row of 256 tokens a device does not fit.
    """
    least, most = _STEP_TOKENS
    wanted = 8 * num_tokens**0.5 if num_tokens else _FIXED_STEP_TOKENS
    step_tokens = _power_of_two(min(max(wanted, least), most))
    longest = min(_ROW_LENGTHS[1], model_config.max_positions)
    row_length = max(step_tokens // _ROWS, _ROW_LENGTHS[0])
    row_length = _power_of_two(min(row_length, longest))
    if config.data.row_length:
        row_length = config.data.row_length
    sharers = mesh[0] * mesh[1]

    def memory(rows: int) -> float:
        return step_plan.step_memory(config, model_config, mesh, rows, row_length)

    while memory(1) > USABLE * available:
        if config.data.row_length or row_length <= _ROW_LENGTHS[0]:
            raise InputError(
                f"model.path={config.model.path}: a step of one row of {row_length} "
                f"tokens takes {memory(1) / GIB:.1f} GiB of a device, of which "
                f"{USABLE * available / GIB:.1f} are for it; set lora.rank=16 or "
                "model.param_dtype=bfloat16, take a smaller model or more devices"
            )
        row_length //= 2
    rows = _power_of_two(max(step_tokens / row_length / sharers, 1))
    at_once = rows
    while at_once > 1 and memory(at_once) > USABLE * available:
        at_once //= 2
    return Sizes(
        row_length, rows * sharers, rows // at_once, at_once * sharers, memory(at_once)
    )


def _power_of_two(number: float) -> int:
    """The greatest that is not above a number >= 1."""
    return 1 << (int(number).bit_length() - 1)


def _begun(folder: str) -> Sizes | None:
    """The sizes of a phase that has begun in a folder."""
    path = paths.absolute(folder) / "config.json"
    if not path.exists():
        return None
    stored = json.loads(path.read_text())
    return Sizes(
        stored["data"]["row_length"],
        stored["data"]["batch_size"],
        stored["optimizer"]["accumulation_steps"],
        stored["eval"]["batch_size"],
        0.0,
    )


def _devices(config: ml_collections.ConfigDict) -> tuple[tuple[int, int, int], float]:
    """The mesh's axes, and the bytes of memory of one of its devices."""
    devices = jax.devices()
    mesh = mesh_shape.mesh_shape(config.mesh, len(devices))
    device = devices[0]
    if chip := chips.of_device_kind(device.device_kind):
        return mesh, chip.hbm_bytes
    if device.platform != "cpu" and (stats := device.memory_stats()):
        return mesh, stats["bytes_limit"]
    # Devices that are made up of one host share its memory.
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return mesh, pages / jax.local_device_count()


def _num_tokens(config: ml_collections.ConfigDict) -> float:
    """About how many tokens a phase to the end of its data reads.

    That is until every source with a limit has given it, and the others their shares.
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
    """About how many tokens a source has: characters, by those of its first texts."""
    settings = entry.format, entry.fields.to_dict(), entry.preference_side
    characters, sample = 0, []
    for record in Corpus(config, entry).train_split():
        text = format_lib.plain_text(record, *settings)
        characters += len(text)
        if len(sample) < _SAMPLE:
            sample.append(text[:10_000])
    tokens = sum(map(len, vocabulary.encode_batch(sample)))
    return characters * tokens / max(sum(map(len, sample)), 1)
