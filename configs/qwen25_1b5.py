"""Mix-CPT's first phase for Qwen2.5-1.5B on a TPU slice.

    python -m mixcpt_jax plan --config=configs/qwen25_1b5.py:v5e-16

`configs/presets.py` has the command that trains, and the slices.
"""

from configs import presets


def get_config(slice_name: str = ""):
    return presets.get_config("qwen25_1b5", slice_name, 4, fsdp=(1, 16))
