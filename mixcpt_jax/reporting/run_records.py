"""What runs have left, read back: their phases with results, curves, samples, settings.

Runs may still go on, or be old: what a phase has not written is empty.
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
    """One phase of a run, from the files that it has left; what is missing is empty.

    Attributes:
      number: its place among the colours.
      name: for the reader; the run's too where there are several.
      run, phase: which it is.
      config, results, provenance: its JSON files.
      rows, samples: its JSONL files.
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
        """What was measured before its first step."""
        if "before" in self.results:
            return self.results["before"] or {}
        return next((e for e in self._evaluations if e["step"] == 0), {})

    @property
    def after(self) -> dict[str, Any]:
        """What was measured last."""
        if "after" in self.results:
            return self.results["after"]
        return next((e for e in self._evaluations[::-1] if e["step"]), {})

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The rows of training."""
        # A step to whose loss nothing contributes has none.
        return [row for row in self.rows if {"loss", "learning_rate"} & row.keys()]

    @property
    def trains(self) -> bool:
        """Whether it is a phase that learns."""
        if "job" in self.config:
            return self.config["job"] == "train"
        return bool(self.after.get("step"))  # what only measures takes no steps

    @property
    def begins_with(self) -> str:
        """The phase of the same run that it starts from; empty: none."""
        start = self.config.get("init_from") or self.provenance.get("start", {}).get(
            "init_from", ""
        )
        return start.removeprefix("phase:") if start.startswith("phase:") else ""

    def setting(self, key: str) -> Any:
        """By its dotted name; None if the config does not say."""
        value = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def load(runs: Sequence[str]) -> list[Arm]:
    """The phases of runs, in their order.

    Args:
      runs: workdirs, or files that hold what `report.json` does.

    Raises:
      InputError: names what is no run, or a damaged file.
    """
    arms: list[Arm] = []
    for run in runs:
        folder = paths.absolute(run)
        folders = _phase_folders(folder)
        if not folders:
            raise InputError(
                f"{run}: no run in it; give the --workdir of one, or a file that holds "
                "what report.json does"
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
                    # Studies keep it with the results.
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
    """A run in a word: its folder."""
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
        raise InputError(f"{path}: damaged ({error}); delete or mend it") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: a JSON object is wanted")
    return content
