"""The commands, one file each: they define flags; other modules do the work."""

# Command -> its module, whose `start` runs it, and a summary.
COMMANDS = {
    "train": ("mixcpt_jax.main", "runs the phases of a config"),
    "chat": (
        "mixcpt_jax.cli.chat",
        "talks to the model of a run, a folder or a GGUF file",
    ),
    "evaluate": (
        "mixcpt_jax.cli.evaluate",
        "measures texts, exams and clozes with intervals; compares two models",
    ),
    "lm-eval": (
        "mixcpt_jax.cli.lm_eval",
        "runs EleutherAI's lm-eval on a model, in JAX",
    ),
    "plan": (
        "mixcpt_jax.cli.plan",
        "computes memory and time of a step on a TPU slice, without the slice",
    ),
    "prepare": (
        "mixcpt_jax.cli.prepare",
        "tokenizes sources and runs the teacher once, for many runs",
    ),
    "report": (
        "mixcpt_jax.cli.report",
        "writes one page about a run, or about several runs",
    ),
}
