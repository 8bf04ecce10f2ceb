"""The run of all six phases that several tests read, disturb and compare with."""

import pathlib

import ml_collections

from configs import mixcpt
from mixcpt_jax import config as config_lib

PHASES = ("cpt", "select", "sft", "dpo", "evaluate", "export")
TRAINED = ("cpt", "sft", "dpo")
NUM_STEPS = 6
# Steps large enough that every phase shows in the weights, and checkpoints on every
# other one, so that a kill loses work.
_SETTINGS = (
    f"--config.train.num_steps={NUM_STEPS}",
    "--config.train.save_every=2",
    "--config.optimizer.learning_rate=3e-3",
    # A method that runs the model, so that a kill loses scores.
    "--config.select.method=format_alignment",
    *(
        f"--config.overrides.{name}.{setting}"
        for name in ("sft", "dpo")
        for setting in (
            f"train.num_steps={NUM_STEPS}",
            "train.eval_before=True",
            "optimizer.learning_rate=3e-3",
        )
    ),
)


def flags(project: pathlib.Path, model: str, workdir: pathlib.Path) -> list[str]:
    """The command line of the run, without its program."""
    return [
        f"--config={project}/configs/mixcpt.py:tiny",
        f"--workdir={workdir}",
        f"--config.model.path={model}",
        *_SETTINGS,
    ]


def keeping(model: str, teacher: str) -> ml_collections.ConfigDict:
    """A run that generates, distils from another teacher, merges and aligns.

    The samples to replay are the teacher's own, and next-token prediction is weighted by
    its probabilities.
    """
    config = mixcpt.get_config("tiny")
    config.phases = ("generate", "cpt", "merge", *PHASES[1:4])
    for name in ("evaluate", "export"):
        del config.overrides[name]
    config.model.path, config.teacher.path = model, teacher
    config.sources.replay = config_lib.source(
        path="phase:generate/generated",
        weight=0.5,
        ntp_weight=0.0,
        lssd_weight=0.0,
        kd_weight=1.0,
    )
    config.objective.token_weighting = "teacher_probability"
    config.generate.num_tokens, config.generate.max_new_tokens = 1200, 12
    nothing = {"sources": {"replay": {"weight": 0.0}}}
    config.overrides.generate = {"job": "generate", "model": {"path": teacher}}
    config.overrides.merge = {"job": "merge", "init_from": "phase:cpt"} | nothing
    config.merge.shares = (0.5, 1.0)
    config.merge.keep = {"general/loss": 10.0}
    for name in ("select", "sft", "dpo"):
        phase = config.overrides[name]
        phase.init_from = "phase:sft" if name == "dpo" else "phase:merge"
        phase.update(ml_collections.ConfigDict(nothing))
    settings = (config, config.overrides.sft, config.overrides.dpo)
    for phase in settings:
        phase.train.update(num_steps=3, eval_before=False)
        phase.optimizer.learning_rate = 3e-3
    config.train.save_every = 1
    config.eval.prompts, config.eval.max_tokens = "", 256
    config.metrics.tensorboard = False
    return config
