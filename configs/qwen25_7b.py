"""Mix-CPT's first phase for Qwen2.5-7B on a TPU slice.

    python -m mixcpt_jax plan --config=configs/qwen25_7b.py:v5e-16

`configs/presets.py` has the command that trains, and the slices.
"""

from configs import presets


# The shapes are those of Qwen2-7B.
def get_config(slice_name: str = ""):
    return presets.get_config("qwen2_7b", slice_name, 2, fsdp=(16, 64))
