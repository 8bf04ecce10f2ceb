"""Exports the model of a phase as a Hugging Face folder, `hf` in the workdir.

    python -m mixcpt_jax.main --config=configs/export.py --workdir=runs/mine_hf \\
        --config.model.path=/models/Llama-3.2-1B-Instruct --config.init_from=runs/mine/dpo

`model.path` is the model that the phase started from; its config and tokenizer go into
the folder. Adapters are merged into the weights. `export.dtype` is bfloat16, float16 or
float32. `--config.export.hub_id=ORG/NAME` pushes the folder to the Hub with a model card.
"""

from mixcpt_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.job = "export"
    return config
