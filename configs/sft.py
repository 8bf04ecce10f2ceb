"""Supervised fine-tuning alone, from any earlier phase or from a pretrained model.

    python -m mixcpt_jax.main --config=configs/sft.py --workdir=runs/sft \\
        --config.model.path=/models/Llama-3.2-1B-Instruct \\
        --config.init_from=runs/mine/cpt \\
        --config.sources.sft.path=/data/conversations.jsonl

`init_from` is the folder of a phase; without it, training starts from `model.path`.
Records are `{"messages": [{"role", "content"}, ...]}`, `{"instruction", "input",
"output"}` or `{"prompt", "response"}`. The tokenizer's chat template renders them, or
`model.chat_template` if it is set, or ChatML if there is neither. Loss tokens are the
assistant's turns with the token that ends them. `configs/mixcpt.py` runs all phases of
Mix-CPT.
"""

from mixcpt_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.sources.sft = config_lib.source(format="chat", holdout=16)
    config.objective.ntp_weight = 1.0
    config.objective.lssd_weight = 0.0
    config.objective.kd_weight = 0.0
    config.data.overlong = "truncate"
    config.data.batch_size = 16
    config.eval.batch_size = 16
    config.eval.prompts = "package:mixcpt_jax/assets/prompts.jsonl"
    config.optimizer.warmup_share = 0.1
    config.optimizer.weight_decay = 0.0
    config.train.num_steps = 100
    return config
