"""Reads the files of runs: results, metrics, samples and settings of their phases.

A run may be in progress or old: what a phase has not written is empty.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from mixcpt_jax.core import paths
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.runtime import metrics


@dataclasses.dataclass(frozen=True)
class Arm:
    """One phase of a run, as its files have it.

    Attributes:
      number: of its color.
      name: of the phase; with the run's where there are several runs.
      run: the workdir, as given.
      phase: its name in the config.
      config, results, provenance: the JSON files.
      rows, samples: the lines of `metrics.jsonl` and `samples.jsonl`.
      items: step -> measure -> what `items.jsonl` holds.
    """

    number: int
    name: str
    run: str
    phase: str
    config: dict[str, Any]
    results: dict[str, Any]
    provenance: dict[str, Any]
    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    items: dict[int, dict[str, np.ndarray]]

    @property
    def _evaluations(self) -> list[dict[str, Any]]:
        found = ({k: v for k, v in r.items() if k.startswith("eval/")} | {"step": r["step"]}
                 for r in self.rows)  # fmt: skip
        return [
            {k.removeprefix("eval/"): v for k, v in row.items()}
            for row in found
            if len(row) > 1
        ]

    @property
    def before(self) -> dict[str, Any]:
        """The measures before the first step."""
        if "before" in self.results:
            return self.results["before"] or {}
        return next((e for e in self._evaluations if e["step"] == 0), {})

    @property
    def after(self) -> dict[str, Any]:
        """The last measures."""
        if "after" in self.results:
            return self.results["after"]
        return next((e for e in self._evaluations[::-1] if e["step"]), {})

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The rows of training steps."""
        # A step without loss tokens has no loss.
        return [row for row in self.rows if {"loss", "learning_rate"} & row.keys()]

    @property
    def trains(self) -> bool:
        """Whether the phase trains."""
        if "job" in self.config:
            return self.config["job"] == "train"
        return bool(self.after.get("step"))  # an evaluation takes no steps

    @property
    def starts_from(self) -> str:
        """The phase of the same run that this one starts from; empty: none."""
        start = self.config.get("init_from") or self.provenance.get("start", {}).get(
            "init_from", ""
        )
        return start.removeprefix("phase:") if start.startswith("phase:") else ""

    def setting(self, key: str) -> Any:
        """The setting of a dotted key; None if the config does not have it."""
        value = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def load(runs: Sequence[str]) -> list[Arm]:
    """Reads the phases of runs, in their order.

    Args:
      runs: workdirs, or files with the content of a `report.json`.

    Raises:
      InputError: a folder holds no run, or a file is damaged.
    """
    arms: list[Arm] = []
    for run in runs:
        folder = paths.absolute(run)
        folders = _phase_folders(folder)
        if not folders:
            raise InputError(
                f"{run}: holds no run; give the --workdir of a run, or a copy of its "
                "report.json"
            )
        recorded = _recorded(folder)
        name = name_of(run)
        for phase, place in folders.items():
            results = _read(place, "results.json") or recorded.get(phase, {})
            is_alone = len(folders) == 1 and len(runs) > 1
            long_name = name if is_alone else f"{name}/{phase}"
            arms.append(
                Arm(
                    number=len(arms),
                    name=long_name if len(runs) > 1 else phase,
                    run=run,
                    phase=phase,
                    config=_read(place, "config.json"),
                    results=results,
                    # The records of the studies have it in their results.
                    provenance=_read(place, "provenance.json")
                    or {k: results[k] for k in ("start", "files") if k in results},
                    rows=metrics.read(place, metrics.FILE),
                    samples=metrics.read(place, metrics.SAMPLES_FILE),
                    items={
                        row["step"]: {k: np.array(v) for k, v in row["items"].items()}
                        for row in metrics.read(place, metrics.ITEMS_FILE)
                    },
                )
            )
    return arms


def name_of(run: str) -> str:
    """The name of a run: that of its folder."""
    path = paths.absolute(run)
    return path.parent.name if path.suffix == ".json" else path.name


def _phase_folders(folder: epath.Path) -> dict[str, epath.Path]:
    recorded = _recorded(folder)
    if folder.suffix == ".json":
        return dict.fromkeys(recorded, folder / "none")
    if (folder / "config.json").exists():
        return {next(iter(recorded), folder.name): folder}
    found = []
    if folder.is_dir():
        files = (f / "config.json" for f in folder.iterdir() if f.is_dir())
        found = [(f.stat().mtime, f.parent.name) for f in files if f.exists()]
    place = f"{folder / 'report.json'}: phase"
    folders = {name: paths.child(folder, name, place) for name in recorded}
    return folders | {name: folder / name for _, name in sorted(found)}


def _recorded(folder: epath.Path) -> dict[str, dict[str, Any]]:
    if folder.suffix == ".json":
        return _read(folder.parent, folder.name)
    return _read(folder, "report.json")


def _read(folder: epath.Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(
            f"{path}: not valid JSON ({error}); restore or delete it"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold a JSON object; restore or delete it")
    return content
