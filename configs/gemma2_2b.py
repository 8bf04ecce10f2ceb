"""Mix-CPT's first phase for Gemma 2 2B on a TPU slice.

    python -m mixcpt_jax plan --config=configs/gemma2_2b.py:v5e-16

`configs/presets.py` has the command that trains, and the slices.
"""

from configs import presets


def get_config(slice_name: str = ""):
    return presets.get_config("gemma2_2b", slice_name, 2, fsdp=(1, 16))
