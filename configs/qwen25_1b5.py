"""Mix-CPT's first phase for Qwen2.5-1.5B on a TPU slice.

    python -m mixcpt_jax plan --config=configs/qwen25_1b5.py:v5e-16
    python -m mixcpt_jax.main --config=configs/qwen25_1b5.py:v5e-16 --distributed \\
        --workdir=gs://BUCKET/runs/mine --config.model.path=/models/Qwen2.5-1.5B \\
        --config.sources.domain.path='/data/domain/*.jsonl' \\
        --config.sources.instructions.path=/data/instructions.jsonl \\
        --config.sources.preferences.path=/data/preferences.jsonl

The slices are those of `configs/presets.py`; v5e-16 if none is named. Everything else is
as in `configs/cpt.py`.
"""

from configs import presets


def get_config(slice_name: str = ""):
    return presets.get_config("qwen25_1b5", slice_name, 4, fsdp=(1, 16))
