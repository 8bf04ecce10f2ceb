"""Mix-CPT's first phase on one GPU of 24, 48 or 80 GB.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 \\
    python -m mixcpt_jax.main --config=configs/one_gpu.py:24 --workdir=runs/mine \\
        --config.model.path=meta-llama/Llama-3.2-1B \\
        --config.sources.domain.path='/data/domain/*.jsonl' \\
        --config.sources.instructions.path=/data/instructions.jsonl \\
        --config.sources.preferences.path=/data/preferences.jsonl

Variants: the memory, and what is trained. Each has a large model of this package's presets
that fits by the formula of `docs/gpu.md`, with LSSD's teacher in the step:

- `:24`: all weights of Llama-3.2-1B, rows of 1,024 tokens, Adam's moments in bfloat16;
- `:24-lora`: adapters of rank 16 on Llama-3.2-3B;
- `:48`: all weights of SmolLM2-1.7B; `:48-lora`: adapters on Llama-3-8B;
- `:80`: all weights of Llama-3.2-3B; `:80-lora`: adapters on Llama-3-8B, more rows at once.

A smaller model fits as well. Without the environment variable, jax takes only 75 % of the
memory. Everything else is as in `configs/cpt.py`.
"""

from typing import Any, NamedTuple

from configs import cpt
from mixcpt_jax import config as config_lib


class Fit(NamedTuple):
    """What fits on a GPU.

    Attributes:
      architecture: a file of `mixcpt_jax/assets/architectures`.
      row_length: tokens of a row.
      rows: rows of a microbatch; a step has 131,072 tokens.
      changes: of other settings, by dotted key.
    """

    architecture: str
    row_length: int
    rows: int
    changes: dict[str, Any]


# Adapters take a higher rate than all weights: ten times is common, and four times is what
# `experiments/controlled` ran.
LORA = {"lora.rank": 16, "optimizer.learning_rate": 1e-4}
FITS = {
    "24": Fit("llama32_1b", 1024, 1, {"optimizer.moments_dtype": "bfloat16"}),
    "24-lora": Fit("llama32_3b", 4096, 2, LORA),
    "48": Fit("smollm2_1b7", 4096, 4, {}),
    "48-lora": Fit("llama3_8b", 4096, 4, LORA),
    "80": Fit("llama32_3b", 4096, 4, {}),
    "80-lora": Fit("llama3_8b", 4096, 8, LORA),
}
_STEP_TOKENS = 131_072


def get_config(variant: str = ""):
    config_lib.check_variant(variant, tuple(FITS))
    fit = FITS[variant or "24"]
    config = cpt.get_config()
    folder = "package:mixcpt_jax/assets/architectures"
    config.model.architecture = f"{folder}/{fit.architecture}.json"
    config.mesh.fsdp = 1
    config.data.row_length = fit.row_length
    config.data.batch_size = _STEP_TOKENS // fit.row_length
    config.optimizer.accumulation_steps = config.data.batch_size // fit.rows
    config.eval.batch_size = fit.rows
    config.update_from_flattened_dict(fit.changes)
    return config
