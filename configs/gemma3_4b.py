"""Mix-CPT's first phase for Gemma 3 4B (its text model) on a TPU slice.

    python -m mixcpt_jax plan --config=configs/gemma3_4b.py:v5e-16
    python -m mixcpt_jax.main --config=configs/gemma3_4b.py:v5e-16 --distributed \\
        --workdir=gs://BUCKET/runs/mine --config.model.path=/models/gemma-3-4b-pt \\
        --config.sources.domain.path='/data/domain/*.jsonl' \\
        --config.sources.instructions.path=/data/instructions.jsonl \\
        --config.sources.preferences.path=/data/preferences.jsonl

The slices are those of `configs/presets.py`; v5e-16 if none is named. Everything else is
as in `configs/cpt.py`.
"""

from configs import presets


def get_config(slice_name: str = ""):
    return presets.get_config("gemma3_4b", slice_name, 2, fsdp=(8, 16))
