"""Mix-CPT's first phase for SmolLM2-135M on a TPU slice.

    python -m mixcpt_jax plan --config=configs/smollm2_135m.py:v5e-16

`configs/presets.py` has the command that trains, and the slices.
"""

from configs import presets


def get_config(slice_name: str = ""):
    return presets.get_config("smollm2_135m", slice_name, 4, fsdp=(1, 1))
