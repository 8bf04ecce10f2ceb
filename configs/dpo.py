"""Direct preference optimization alone, from any earlier phase or a pretrained model.

    python -m mixcpt_jax.main --config=configs/dpo.py --workdir=runs/dpo \\
        --config.model.path=/models/Llama-3.2-1B-Instruct \\
        --config.init_from=runs/sft \\
        --config.sources.dpo.path=/data/preferences.jsonl

The model that the phase starts from, `init_from` or else `model.path`, is also the
reference. Records are `{"prompt", "chosen", "rejected"}`, each a text or a list of
messages. `preference.*` sets the loss: beta, label smoothing, IPO, length normalization, an
SFT term, and whether the reference runs in every step or once before training. 32 pairs are
held out and measured.
"""

from mixcpt_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.sources.dpo = config_lib.source(format="chat_preference", holdout=32)
    config.objective.kind = "preference"
    config.data.overlong = "truncate"
    config.data.batch_size = 16
    config.eval.batch_size = 16
    config.eval.prompts = "package:mixcpt_jax/assets/prompts.jsonl"
    config.optimizer.learning_rate = 5e-7
    config.optimizer.warmup_share = 0.1
    config.optimizer.weight_decay = 0.0
    config.train.num_steps = 100
    return config
