"""Mix-CPT's first phase for SmolLM2-1.7B on a TPU slice.

    python -m mixcpt_jax plan --config=configs/smollm2_1b7.py:v5e-16

`configs/presets.py` has the command that trains, and the slices.
"""

from configs import presets


def get_config(slice_name: str = ""):
    return presets.get_config("smollm2_1b7", slice_name, 4, fsdp=(1, 16))
