"""The job "evaluate": measures the model that a phase starts from."""

from typing import Any

import jax

from mixcpt_jax import config as config_lib
from mixcpt_jax.evaluation.evaluator import Evaluator
from mixcpt_jax.runtime import hosts, metrics
from mixcpt_jax.training import phase as phase_lib


@phase_lib.job
def run(phase: phase_lib.Phase) -> dict[str, Any]:
    """Measures the model that the phase starts from.

    Returns:
      The content of `results.json`: `after`, as of a training phase.

    Raises:
      InputError: config, data, weights or workdir are wrong.
    """
    phase.announce("measures")
    data = phase.load_data()
    with jax.set_mesh(phase.mesh):
        params = phase.starting_params(phase.config.model.param_dtype)
        start = None
        if config_lib.measures_kl(phase.config):
            start = phase.original_params(phase.frozen_dtype)
        evaluate = Evaluator(phase, data, start=start)
        with metrics.bar(
            phase.name, evaluate.num_batches, phase.shows_progress
        ) as show:
            results = {"before": None, "after": evaluate(params, show)}
        with metrics.Writer(
            phase.folder, phase.config.metrics, -1, {}, hosts.is_first()
        ) as writer:
            writer.write_items(0, evaluate.items)
            writer.write(0, metrics.evaluation_scalars(results["after"]))
            writer.write_samples(0, data.prompts, evaluate.answers(params))
    return phase.finish(results)
