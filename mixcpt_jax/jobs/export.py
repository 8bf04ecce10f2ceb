"""The job "export": writes the model that a phase starts from as a Hugging Face folder."""

import dataclasses
import shlex
import sys
from typing import Any

import jax
import ml_collections

from mixcpt_jax import config as config_lib
from mixcpt_jax.data import hub
from mixcpt_jax.models import huggingface_export
from mixcpt_jax.models.huggingface_export import FOLDER
from mixcpt_jax.reporting import model_card, run_records
from mixcpt_jax.runtime import hosts, lease
from mixcpt_jax.training import checkpoint
from mixcpt_jax.training import phase as phase_lib

# The keys of a card's header about the license.
_LICENSE = ("license", "license_name", "license_link")


@phase_lib.job
def run(phase: phase_lib.Phase) -> dict[str, Any]:
    """Writes `hf/` in the phase's folder: weights, config, tokenizer and license.

    Adapters are merged into the weights they adapt. The tokenizer gets the chat template
    used in training, and `generation_config.json` gets the tokens that end a turn or a
    text. The folder appears only when it is complete.

    With `export.hub_id` it also has a model card, and is pushed to the Hub.

    Returns:
      The content of `results.json`: the folder's path, the dtype of the weights, and the
      address and commit on the Hub.

    Raises:
      InputError: config, weights or workdir are wrong.
    """
    folder = phase.folder / FOLDER
    model, name = phase.config.model, phase.config.export.hub_id
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
            card=_card(phase) if name else "",
        )
    results = {"folder": str(folder), "dtype": dtype}
    if name and hosts.is_first():
        results["pushed"] = hub.push(folder, name, phase.config.export.private)
        phase.say(f"pushed to {results['pushed']}")
    return phase.finish(results)


def _card(phase: phase_lib.Phase) -> str:
    """The card of the model that the phase exports."""
    arms, start = [], phase.config.init_from
    while start:
        folder = checkpoint.phase_folder(start)
        (arm,) = run_records.load([str(folder)])
        arms.insert(0, dataclasses.replace(arm, run=""))
        config = ml_collections.ConfigDict({"init_from": arm.config["init_from"]})
        start = config_lib.resolve_phases(config, str(folder.parent)).init_from
    base = phase.config.model.path
    header = hub.card_of_model(base)
    return model_card.render(
        arms,
        hub.name_of_model(base),
        {key: header[key] for key in _LICENSE if key in header},
        shlex.join(["python", "-m", "mixcpt_jax.main", *sys.argv[1:]]),
    )
