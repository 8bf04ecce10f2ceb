"""One cell of the controlled study: a base, or an arm at one learning rate on a base.

    python -m mixcpt_jax.main --workdir=runs/cell \\
        --config=experiments/controlled/config.py:world=FOLDER,base=chat,arm=base
    python -m mixcpt_jax.main --workdir=runs/cell-2 \\
        --config=experiments/controlled/config.py:world=FOLDER,start=runs/cell,arm=mixture_lssd,rate=1e-3

`run.py` runs all of them; FOLDER is made by `world.write`.
"""

import dataclasses

import ml_collections

from experiments import arms, cells
from mixcpt_jax import config as config_lib

ROW_LENGTH, BATCH_SIZE = 128, 16
GENERAL = ("instructions", "preferences")
# General text of an arm -> what the phase "generate" writes. The samples are about as many
# tokens as the questions of the mixture.
GENERATE = {
    "samples": {"kind": "replay", "num_tokens": 40_000, "max_new_tokens": ROW_LENGTH},
    "comprehension": {
        "kind": "comprehension", "source": "domain", "num_tokens": 10**6,
    },
}  # fmt: skip
MERGED_SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
# What a budget limits, on documents that no arm reads.
BUDGET_MEASURE = "untold_documents/kl_from_start"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
      world: folder of the world.
      arm: of `arms.ARMS`, or "base" for the training of a base.
      base: the kind of base: "documents", trained on documents alone; "chat", which also
        answers questions; or "narrow", a chat base trained without strangers.
      start: workdir of the base's run, for an arm.
      rate: peak learning rate of continual pre-training.
      share: of the domain in the mixture's tokens; 0: the arm's own.
      seed: of the order of the data and of a base's weights.
      align: the phases after it: "" for none, "sft", or "dpo" for both.
      rule, samples: the method and the number of the samples for SFT and DPO; "first"
        takes the first samples of the files.
      domain_steps: number of steps of `BATCH_SIZE` rows, if they read the domain alone.
      base_steps: number of steps of a base.
    """

    world: str
    arm: str = "base"
    base: str = "chat"
    start: str = ""
    rate: float = 1e-3
    share: float = 0.0
    seed: int = 0
    align: str = ""
    rule: str = "first"
    samples: int = 50
    domain_steps: int = 56
    base_steps: int = 800


def get_config(settings: str) -> ml_collections.ConfigDict:
    """The config of a cell given as `world=FOLDER,arm=NAME,...`, see `Cell`."""
    return make(cells.parse(Cell, settings))


def make(cell: Cell) -> ml_collections.ConfigDict:
    """The config of a cell."""
    config = _shared(cell)
    if cell.arm == "base":
        return _base(config, cell)
    return _arm(config, cell, arms.ARMS[cell.arm])


def _shared(cell: Cell) -> ml_collections.ConfigDict:
    config = config_lib.default()
    config.seed = cell.seed
    config.model.path = cell.world
    config.model.compute_dtype = "float32"
    config.model.teacher_dtype = "float32"
    config.model.remat = "none"
    config.mesh.fsdp = 1
    config.data.row_length = ROW_LENGTH
    config.data.batch_size = BATCH_SIZE
    config.data.packing = "split"  # the default when the study began
    config.data.warn_epochs = config.data.max_epochs = (
        0.0  # a small world, read many times
    )
    config.eval.batch_size = BATCH_SIZE
    config.eval.max_tokens = 0  # all
    config.eval.max_new_tokens = 16
    config.optimizer.warmup_steps = 5
    config.optimizer.weight_decay = 0.01
    config.train.eval_before = False
    config.train.log_every = 4
    config.train.save_every = 0
    config.metrics.tensorboard = False
    config.metrics.progress = False
    # Not read: sources set their own weights, and `_align` the method. The records have
    # these values.
    config.objective.ntp_weight, config.objective.lssd_weight = 0.0, 1.0
    config.select.method = "format_alignment"
    texts = config.eval.texts
    for group in ("domain", "untold", "rehearsed"):
        for measure in ("use", "memory"):
            texts[f"{group}_{measure}"] = config_lib.source(
                path=f"{cell.world}/{group}_{measure}.jsonl", format="cloze"
            )
    texts.untold_documents = config_lib.source(
        path=f"{cell.world}/untold_documents.jsonl"
    )
    return config


def _base(config, cell: Cell) -> ml_collections.ConfigDict:
    """Training of a base, from random weights, on all texts about general people."""
    config.model.weights = "random"
    config.sources.update(_general_texts(cell))
    config.objective.ntp_weight, config.objective.lssd_weight = 1.0, 0.0
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = min(50, cell.base_steps - 1)
    config.train.num_steps = cell.base_steps
    return config


def _general_texts(cell: Cell) -> dict[str, ml_collections.ConfigDict]:
    """The sources of a base."""
    weights = {"general_documents": 0.45, "strangers": 0.25}
    if cell.base == "narrow":
        weights = {"general_documents": 0.7}
    texts = {
        name: config_lib.source(path=f"{cell.world}/{name}.jsonl", weight=weight)
        for name, weight in weights.items()
    }
    if cell.base != "documents":
        texts["questions"] = config_lib.source(
            path=f"{cell.world}/general_questions.jsonl",
            format="instruction",
            weight=0.3,
        )
    return texts


def _train_teacher(config, cell: Cell) -> None:
    """A phase before `cpt` that trains the base longer; its end is the teacher of `cpt`."""
    texts = _general_texts(cell)
    weights = {name: {"weight": 0.0} for name in config.sources}
    weights |= {name: {"weight": text.weight} for name, text in texts.items()}
    for name, text in texts.items():
        text.weight = 0.0
        config.sources[name] = text
    config.phases = ("teacher", *config.phases)
    config.overrides.teacher = {
        "sources": weights,
        "objective": {"ntp_weight": 1.0, "lssd_weight": 0.0},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"num_steps": cell.base_steps // 2},
    }
    config.overrides.cpt = {"teacher": {"init_from": "phase:teacher"}}


def _arm(config, cell: Cell, arm: arms.Arm) -> ml_collections.ConfigDict:
    sources = config.sources
    config.init_from = cell.start
    has_mixture = arm.general is not None
    share = (cell.share or arm.share) if has_mixture else 1.0
    sources.domain = config_lib.source(
        path=f"{cell.world}/domain_documents.jsonl",
        weight=share,
        **arms.source_weights(arm.domain),
    )
    for name, file, format, part in arms.SOURCES[arm.text]:
        sources[name] = config_lib.source(
            path=file if file == arms.GENERATED else f"{cell.world}/{file}",
            format=format,
            weight=(1 - share) * part if has_mixture else 0.0,
            **arms.source_weights(arm.general or arms.NTP),
        )
    config.objective.token_weighting = arm.token_weighting
    config.optimizer.learning_rate = cell.rate * arm.rate_scale
    # Every arm reads the same tokens of the domain.
    config.train.num_steps = round(cell.domain_steps / share)
    config.lora.rank = arm.lora_rank
    arms.set_phases(config, arm, GENERATE, BUDGET_MEASURE, MERGED_SHARES)
    if arm.has_longer_teacher:
        _train_teacher(config, cell)
    if cell.align:
        _align(config, cell)
    return config


def _align(config, cell: Cell) -> None:
    """SFT and DPO on a few general samples, in the chat format."""
    path = cell.world
    for group in ("domain", "untold", "rehearsed"):
        config.eval.texts[f"{group}_chat"] = config_lib.source(
            path=f"{path}/{group}_chat.jsonl", format="chat"
        )
    config.eval.pairs.untold = config_lib.source(
        path=f"{path}/untold_pairs.jsonl", format="chat_preference"
    )
    config.eval.prompts = f"{path}/prompts.jsonl"
    # The files are in random order, so their first samples are random samples.
    folder = path if cell.rule == "first" else "phase:select"
    # Few steps, for any number of samples.
    shared = {
        "data": {"packing": "best_fit", "overlong": "truncate", "batch_size": 4},
        "optimizer": {"warmup_steps": 2, "weight_decay": 0.0},
        "train": {"num_steps": 40},
        "lora": {"rank": 0},
    }
    config.overrides.cpt = {"eval": {"prompts": ""}}
    if cell.rule != "first":
        config.phases = (*config.phases, "select")
        config.select.method = cell.rule
        config.select.max_tokens = ROW_LENGTH
        config.select.min_response_tokens = 1
        config.select.near_duplicates = 0.0
        for name in GENERAL:
            config.select.keep[name] = cell.samples
        config.overrides.select = {"job": "select", "init_from": "phase:cpt"}
    arms.add_alignment(config, folder, cell.samples, "phase:cpt", (6e-4, 1e-5), shared)
    if cell.align == "sft":
        config.phases = config.phases[:-1]
        del config.overrides.dpo
