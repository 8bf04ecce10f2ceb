"""The job "export": writes the model that a phase starts from as a Hugging Face folder."""

import dataclasses
from typing import Any

import jax

from mixcpt_jax.models import huggingface_export
from mixcpt_jax.models.huggingface_export import FOLDER
from mixcpt_jax.runtime import lease
from mixcpt_jax.training import phase as phase_lib


@phase_lib.job
def run(phase: phase_lib.Phase) -> dict[str, Any]:
    """Writes `hf/` in the phase's folder: weights, config, tokenizer and license.

    Adapters are merged into the weights they adapt. The tokenizer gets the chat template
    used in training, and `generation_config.json` gets the tokens that end a turn or a
    text. The folder appears only when it is complete.

    Returns:
      The content of `results.json`: the folder's path and the dtype of the weights.

    Raises:
      InputError: config, weights or workdir are wrong.
    """
    folder = phase.folder / FOLDER
    model = phase.config.model
    huggingface_export.check_target(folder, model.path, model.tokenizer)
    phase.announce(f"exports {phase.config.export.dtype}")
    phase.claim()
    vocabulary = phase.tokenizer
    # Keep the template of a model that is not for conversations.
    if vocabulary.has_turns:
        vocabulary = dataclasses.replace(vocabulary, chat_template=vocabulary.template)
    dtype = phase.config.export.dtype
    with jax.set_mesh(phase.mesh):
        params = phase.starting_params(phase.config.model.param_dtype)
        lease.check(phase.folder, must_ask=True)
        huggingface_export.save_pretrained(
            str(folder),
            params,
            phase.model_config,
            vocabulary,
            dtype=dtype,
            stop_ids=vocabulary.stop_ids,
            start=phase.config.model.path,
        )
    return phase.finish({"folder": str(folder), "dtype": dtype})
