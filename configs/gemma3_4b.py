"""Mix-CPT's first phase for Gemma 3 4B (its text model) on a TPU slice.

    python -m mixcpt_jax plan --config=configs/gemma3_4b.py:v5e-16

`configs/presets.py` has the command that trains, and the slices.
"""

from configs import presets


def get_config(slice_name: str = ""):
    return presets.get_config("gemma3_4b", slice_name, 2, fsdp=(8, 16))
