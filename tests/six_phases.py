"""The run of all six phases that several tests read, disturb and compare with."""

import pathlib

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
