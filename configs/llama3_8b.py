"""Mix-CPT's first phase for Llama-3-8B on a TPU slice.

    python -m mixcpt_jax plan --config=configs/llama3_8b.py:v5e-16

`configs/presets.py` has the command that trains, and the slices.
"""

from configs import presets


def get_config(slice_name: str = ""):
    config = presets.get_config("llama3_8b", slice_name, 2, fsdp=(16, 64))
    if config.mesh.topology == "v5e:4x4":
        # With the inputs of the layers in the host's memory, all rows fit at once, and the
        # weights are gathered once a step.
        config.model.remat = "offload"
        config.optimizer.accumulation_steps = 1
    return config
