"""Mix-CPT's first phase for Qwen3-8B on a TPU slice.

    python -m mixcpt_jax plan --config=configs/qwen3_8b.py:v5e-16

`configs/presets.py` has the command that trains, and the slices.
"""

from configs import presets


def get_config(slice_name: str = ""):
    return presets.get_config("qwen3_8b", slice_name, 2, fsdp=(16, 64))
