"""The card of an exported model on the Hub, from the records of the phases that made it."""

import json
from collections.abc import Sequence
from typing import Any

from mixcpt_jax.reporting import changes, report
from mixcpt_jax.reporting.run_records import Arm
from mixcpt_jax.runtime import metrics

_PAPER = "2407.10804"
_DATA_SETS = "hf://datasets/"


def render(
    arms: Sequence[Arm], base: str, license_of_base: dict[str, Any], command: str
) -> str:
    """A card in Markdown with its header in YAML.

    Local paths are left out: of a source that is not on the Hub the card has only the name.

    Args:
      arms: the phases that made the model, in their order; from `run_records.load`.
      base: the model that the first of them started from, ORG/NAME; empty: not on the Hub.
      license_of_base: the license's keys in the header of that model's card.
      command: the command of the run.
    """
    trained = [arm for arm in arms if arm.trains]
    rows = [row for arm in trained for row in _sources(arm)]
    sets = {
        name: None
        for arm in trained
        for source in (arm.setting("sources") or {}).values()
        if source.get("weight")
        for name in _data_sets(arm, source)
    }
    header = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mixcpt", "continual-pre-training", f"arxiv:{_PAPER}"],
        **({"base_model": [base]} if base else {}),
        **license_of_base,
        **({"datasets": list(sets)} if sets else {}),
    }
    # JSON values are YAML values.
    yaml = "\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items())
    of_base = f"[{base}](https://huggingface.co/{base})" if base else "a local model"
    paper = f"[Mix-CPT](https://arxiv.org/abs/{_PAPER})"
    parts = [
        f"---\n{yaml}\n---",
        f"# {of_base}, adapted to a domain",
        f"This model was trained by {paper}, with `mixcpt_jax`, from {of_base}. "
        f"{_license(license_of_base)}",
    ]
    if any(arm.after for arm in arms):
        roles = changes.roles(arms, changes.domain_names(arms, ()))
        results = {arm.phase: arm.results for arm in arms}
        parts += ["## What it learned and kept", report.comparison(results, roles)]
        parts += changes.verdict(arms)
    if rows:
        columns = ["phase", "source", "format", "share", "loss tokens", "on the Hub"]
        parts += ["## Data", metrics.table(columns, rows)]
    if trained:
        recipe = [[arm.phase, *_recipe(arm)] for arm in trained]
        columns = ["phase", "loss", "steps", "tokens a step", "learning rate"]
        parts += ["## Recipe", metrics.table(columns, recipe)]
    parts += ["## Command", f"```sh\n{command}\n```"]
    return "\n\n".join(parts) + "\n"


def _license(license_of_base: dict[str, Any]) -> str:
    if not license_of_base:
        return (
            "The license of that model applies; its files, if any, are in this folder."
        )
    names = [str(v) for k, v in license_of_base.items() if k != "license_link"]
    return f"The license of that model applies: {', '.join(names)}."


def _sources(arm: Arm) -> list[list[str]]:
    """A row of the table of data for each source that a phase trained on."""
    read = {row["name"]: row for row in arm.results.get("mixture", [])}
    rows = []
    for name, entry in (arm.setting("sources") or {}).items():
        if not entry.get("weight"):
            continue
        found = read.get(name, {})
        rows.append(
            [
                arm.phase,
                name,
                entry.get("format", ""),
                f"{found['share_delivered']:.1%}" if found else "",
                f"{found['loss_tokens']:,}" if "loss_tokens" in found else "",
                ", ".join(f"{k}@{v[:12]}" for k, v in _data_sets(arm, entry).items()),
            ]
        )
    return rows


def _data_sets(arm: Arm, source: dict[str, Any]) -> dict[str, str]:
    """The data sets of the Hub that a source reads, ORG/NAME -> commit."""
    return {
        root.removeprefix(_DATA_SETS).partition("@")[0]: commit
        for root, commit in arm.provenance.get("commits", {}).items()
        if root.startswith(_DATA_SETS) and root in source.get("path", "")
    }


def _recipe(arm: Arm) -> list[str]:
    """The loss, the steps, the tokens of a step and the learning rate of a phase."""
    rows, length = arm.setting("data.batch_size"), arm.setting("data.row_length")
    steps = arm.after.get("step") or arm.setting("train.num_steps")
    rate = arm.setting("optimizer.learning_rate")
    return [arm.objective, f"{steps:,}", f"{rows} x {length:,}", f"{rate:g}"]
