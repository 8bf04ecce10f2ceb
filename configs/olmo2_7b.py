"""Mix-CPT's first phase for OLMo 2 7B on a TPU slice.

    python -m mixcpt_jax plan --config=configs/olmo2_7b.py:v5e-16

`configs/presets.py` has the command that trains, and the slices.
"""

from configs import presets


def get_config(slice_name: str = ""):
    return presets.get_config("olmo2_7b", slice_name, 1, fsdp=(16, 64))
