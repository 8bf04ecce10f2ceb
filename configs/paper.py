"""The experiment of the Mix-CPT paper, ready to run: a model, a domain, an arm, a slice.

    python -m mixcpt_jax.main --config=configs/paper.py:llama3_8b,wikipedia,mixcpt \\
        --distributed --workdir=gs://BUCKET/paper/llama3_8b-wikipedia-mixcpt

`docs/reproduce.md` has all commands, the hours and what is the paper's and what is ours.
The names after the colon, in any order; the first of each list if none is named:

- model: llama3_8b, llama3_8b_instruct, qwen2_7b, qwen2_7b_instruct;
- domain: wikipedia, automathtext, starcoder;
- arm: mixcpt (the mixture, NTP + LSSD), mixture (the mixture, NTP alone), traditional
  (the domain alone, NTP);
- slice: of `configs/presets.py`, v5e-64 if none is named; or "rehearsal", for a toy model
  on any device: set `model.path` and the paths of the sources.

Every arm has the phases of `configs/mixcpt.py` and reads the same domain tokens. The
paper names models and domains; all shares, rates, lengths and data sets here are ours.
"""

import ml_collections

from configs import llama3_8b, mixcpt, presets, qwen2_7b
from mixcpt_jax import config as config_lib

MODELS = {
    "llama3_8b": (llama3_8b, "meta-llama/Meta-Llama-3-8B"),
    "llama3_8b_instruct": (llama3_8b, "meta-llama/Meta-Llama-3-8B-Instruct"),
    "qwen2_7b": (qwen2_7b, "Qwen/Qwen2-7B"),
    "qwen2_7b_instruct": (qwen2_7b, "Qwen/Qwen2-7B-Instruct"),
}
DOMAINS = {
    "wikipedia": {"path": "hf://datasets/wikimedia/wikipedia/20231101.en"},
    "automathtext": {"path": "hf://datasets/math-ai/AutoMathText/data/web"},
    "starcoder": {
        "path": "hf://datasets/bigcode/starcoderdata/python",
        "fields": {"text": "content"},
    },
}
GENERAL = {
    "instructions": "hf://datasets/allenai/tulu-v2-sft-mixture",
    "preferences": "hf://datasets/HuggingFaceH4/ultrafeedback_binarized",
}
ARMS = ("mixcpt", "mixture", "traditional")
SLICES = ("v5e-64", *presets.SLICES, "rehearsal")
# Tokens of the domain that every arm reads.
DOMAIN_TOKENS = 500_000_000


def get_config(names: str = "") -> ml_collections.ConfigDict:
    model, domain, arm, size = _choose(names)
    config = mixcpt.get_config("tiny" if size == "rehearsal" else "")
    domain_tokens = DOMAIN_TOKENS
    if size == "rehearsal":
        domain_tokens = 4 * config.data.batch_size * config.data.row_length
        for name in ("domain", *GENERAL):
            config.sources[name].max_records = 100
    else:
        preset, path = MODELS[model]
        sized = preset.get_config(size)
        config.mesh, config.model.architecture = sized.mesh, sized.model.architecture
        config.data.batch_size = sized.data.batch_size
        config.eval.batch_size = sized.eval.batch_size
        config.optimizer.accumulation_steps = sized.optimizer.accumulation_steps
        config.model.remat = sized.model.remat
        config.model.path = path
        config.sources.domain.update(DOMAINS[domain])
        for name, data in GENERAL.items():
            config.sources[name].path = data
        config.sources.preferences.split = "train_prefs"
    share = 1.0
    if arm == "traditional":
        # The later phases select from the general sources as in the other arms.
        config.overrides.cpt = {
            "sources": {name: {"weight": 0.0} for name in GENERAL},
        }
    else:
        weights = {name: config.sources[name].weight for name in ("domain", *GENERAL)}
        share = weights["domain"] / sum(weights.values())
    if arm != "mixcpt":
        config.objective.ntp_weight, config.objective.lssd_weight = 1.0, 0.0
    step = config.data.batch_size * config.data.row_length
    config.train.num_steps = max(round(domain_tokens / share / step), 1)
    config.train.save_every = max(config.train.num_steps // 20, 1)
    return config


def _choose(names: str) -> list[str]:
    """The model, the domain, the arm and the slice of a variant."""
    given = [name for name in names.split(",") if name]
    kinds = (tuple(MODELS), tuple(DOMAINS), ARMS, SLICES)
    for name in given:
        config_lib.check_variant(name, sum(kinds, ()))
    chosen = []
    for kind in kinds:
        named = [name for name in given if name in kind]
        if len(named) > 1:
            config_lib.check_variant(",".join(named), kind)
        chosen.append(named[0] if named else kind[0])
    return chosen
