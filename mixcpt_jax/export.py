"""The job "export": what a phase starts from, as a Hugging Face folder."""

import dataclasses
from typing import Any

import jax
import ml_collections

from mixcpt_jax import phase as phase_lib
from mixcpt_jax import weights
from mixcpt_jax.errors import InputError

FOLDER = "hf"


def run(config: ml_collections.ConfigDict, workdir: str, name: str) -> dict[str, Any]:
    """Writes `hf/` in the phase's folder: weights, config and tokenizer.

    Adapters are merged into the weights they adapt. The tokenizer gets the chat template
    that was trained with, and generation the tokens that end a turn or a text. The folder
    is whole or not there.

    Returns:
      What `results.json` holds: the folder's path and the dtype of the weights.

    Raises:
      InputError: config, weights or workdir are wrong.
    """
    results = phase_lib.finished(config, workdir)
    if results is not None:
        return results
    phase = phase_lib.start(config, workdir, name)
    phase.claim()
    vocabulary = phase.tokenizer
    stop_ids = {vocabulary.end_of_document_id, vocabulary.eos_id} - {None}
    try:
        stop_ids |= {vocabulary.end_of_turn_id}
        vocabulary = dataclasses.replace(vocabulary, chat_template=vocabulary.template)
    except InputError:
        # Not a model for conversations; its own template, if any, is not ours to change.
        pass
    dtype = phase.config.export.dtype
    with jax.set_mesh(phase.mesh):
        params = phase.starting_params(phase.config.model.param_dtype)
        weights.save_pretrained(
            str(phase.folder / FOLDER),
            params,
            phase.model_config,
            vocabulary,
            dtype=dtype,
            stop_ids=stop_ids,
        )
    return phase.finish({"folder": str(phase.folder / FOLDER), "dtype": dtype})
