"""Mix-CPT's first phase for Gemma 3 1B on a TPU slice.

    python -m mixcpt_jax plan --config=configs/gemma3_1b.py:v5e-16

`configs/presets.py` has the command that trains, and the slices.
"""

from configs import presets


def get_config(slice_name: str = ""):
    return presets.get_config("gemma3_1b", slice_name, 4, fsdp=(1, 16))
