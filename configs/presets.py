"""Continual pre-training on TPU slices: what the configs of single models share.

A preset is the first phase of Mix-CPT, `configs/cpt.py`, with the mesh and the batch
for a model on a slice of `SLICES`, v5e-16 if none is named; `python -m mixcpt_jax plan`
computes its memory and time. Set everything else as in `configs/cpt.py`: `model.path`, the
paths of the sources, the steps. On every host of the slice:

    python -m mixcpt_jax.main --config=configs/llama3_8b.py:v5e-16 --distributed \\
        --workdir=gs://BUCKET/runs/mine --config.model.path=/models/Meta-Llama-3-8B \\
        --config.sources.domain.path='/data/domain/*.jsonl' \\
        --config.sources.instructions.path=/data/instructions.jsonl \\
        --config.sources.preferences.path=/data/preferences.jsonl
"""

from typing import NamedTuple

import ml_collections

from configs import cpt
from mixcpt_jax import config as config_lib
from mixcpt_jax.core import chips


class Slice(NamedTuple):
    """A TPU slice, and over how many of its chips the weights are sharded.

    The other chips hold copies. With more shards, chips wait longer for each other;
    with fewer, reductions over the copies are larger. See `docs/speed.md`.
    """

    topology: str
    fsdp: int


SLICES = {
    "v5e-16": Slice("v5e:4x4", 8),
    "v5e-64": Slice("v5e:8x8", 16),
    "v5e-256": Slice("v5e:16x16", 64),
    "v5p-8": Slice("v5p:2x2x1", 4),
    "v5p-64": Slice("v5p:2x4x4", 16),
    "v6e-16": Slice("v6e:4x4", 8),
    "v6e-256": Slice("v6e:16x16", 64),
    "v4-32": Slice("v4:2x2x4", 8),
    "tpu7x-8": Slice("tpu7x:2x2x1", 8),
}


# Chip -> its memory relative to a v5e's; of a TPU7x, that of one of its two devices.
MEMORY = {"v5e": 1, "v4": 2, "v6e": 2, "v5p": 4, "tpu7x": 4}


def get_config(
    architecture: str,
    slice_name: str,
    rows_per_chip: int,
    fsdp: tuple[int, int],
) -> ml_collections.ConfigDict:
    """The preset of a model on a slice.

    Args:
      architecture: a file of `mixcpt_jax/assets/architectures`.
      slice_name: of `SLICES`; empty: the first. "v5e-256*4": four of them.
      rows_per_chip: rows of 4,096 tokens per v5e chip and microbatch; other chips take
        rows in proportion to their memory.
      fsdp: the smallest number of v5e chips that can hold the weights together (other
        chips in proportion to their memory), and the largest number over which to shard
        them.
    """
    slice_name, times, number = slice_name.partition("*")
    config_lib.check_variant(slice_name, tuple(SLICES))
    one, shared_by = SLICES[slice_name or next(iter(SLICES))]
    name = one + times + number
    topology = chips.Topology.parse(name)
    memory, num_chips = MEMORY[topology.chip.name], topology.num_devices
    config = cpt.get_config()
    folder = "package:mixcpt_jax/assets/architectures"
    config.model.architecture = f"{folder}/{architecture}.json"
    fewest, most = fsdp
    config.mesh.topology = name
    config.mesh.fsdp = max(min(shared_by, most), fewest // memory)
    config.mesh.data = topology.num_slices * num_chips // config.mesh.fsdp
    rows = max(64, num_chips)
    config.data.batch_size = config.eval.batch_size = topology.num_slices * rows
    parts = rows // (num_chips * rows_per_chip * memory)
    config.optimizer.accumulation_steps = max(1, parts)
    return config
