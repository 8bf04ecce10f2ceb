"""Mix-CPT's first phase for SmolLM3 3B on a TPU slice.

    python -m mixcpt_jax plan --config=configs/smollm3_3b.py:v5e-16

`configs/presets.py` has the command that trains, and the slices.
"""

from configs import presets


def get_config(slice_name: str = ""):
    return presets.get_config("smollm3_3b", slice_name, 2, fsdp=(1, 16))
