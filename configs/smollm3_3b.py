"""Mix-CPT's first phase for SmolLM3 3B on a TPU slice.

    python -m mixcpt_jax plan --config=configs/smollm3_3b.py:v5e-16
    python -m mixcpt_jax.main --config=configs/smollm3_3b.py:v5e-16 --distributed \\
        --workdir=gs://BUCKET/runs/mine --config.model.path=/models/SmolLM3-3B-Base \\
        --config.sources.domain.path='/data/domain/*.jsonl' \\
        --config.sources.instructions.path=/data/instructions.jsonl \\
        --config.sources.preferences.path=/data/preferences.jsonl

The slices are those of `configs/presets.py`; v5e-16 if none is named. Everything else is
as in `configs/cpt.py`.
"""

from configs import presets


def get_config(slice_name: str = ""):
    return presets.get_config("smollm3_3b", slice_name, 2, fsdp=(1, 16))
