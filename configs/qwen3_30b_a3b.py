"""Mix-CPT's first phase for Qwen3-30B-A3B, a mixture of experts, on a TPU slice.

    python -m mixcpt_jax plan --config=configs/qwen3_30b_a3b.py:v5e-64

`configs/presets.py` has the command that trains. For adapters, add
`"--config.lora.targets=('query','key','value','output')"`.
"""

from configs import presets
from mixcpt_jax import config as config_lib

# Those that hold the model, its teacher and the moments.
SLICES = ("v5e-64", "v5e-256", "v5p-64", "v6e-256")


def get_config(slice_name: str = ""):
    config_lib.check_variant(slice_name, SLICES)
    slice_name = slice_name or SLICES[0]
    config = presets.get_config("qwen3_30b_a3b", slice_name, 1, fsdp=(64, 64))
    # As many as a token has experts; with more, gathering tokens moves more bytes than an
    # all-to-all of choices would.
    config.mesh.expert = 8
    return config
