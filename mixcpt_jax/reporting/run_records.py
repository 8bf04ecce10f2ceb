"""Reads the files of runs: results, metrics, samples and settings of their phases.

A run may be in progress or old: files that a phase has not written count as empty.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from mixcpt_jax.core import paths, small_files
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.core.small_files import OBJECT
from mixcpt_jax.runtime import metrics, record

_REMEDY = "restore it from a copy, or move it away"

# Shapes of the parts of a run's files that are read; older versions wrote less.
_MEASURES = {"step?": int, str: float}
_START = {"init_from?": str}
RESULTS = {
    "before?": (_MEASURES, None),
    "after?": (_MEASURES, None),
    "seconds?": float,
    "tokens_per_second?": (float, None),
    "start?": _START,
    "files?": OBJECT,
    "keep_budget?": {
        "step": int,
        "exceeded_at": (int, None),
        "measures": {str: {"spent": float, "budget": float}},
    },
    "curve?": [{"share": float, str: float}],
    "mixture?": [
        {
            "name": str,
            "documents": int,
            "loss_tokens?": int,
            "learnt_tokens?": int,  # its name in older versions
            "epochs?": float,
            "share_asked": float,
            "share_delivered": float,
        }
    ],
}
_PROVENANCE = {
    "start?": _START,
    "files?": OBJECT,
    "commits?": {str: str},
    "environment?": {"devices?": str, "parameters?": int, "started?": str},
}
_WEIGHT = (float, None)
_SOURCE = {
    "path?": str,
    "format?": str,
    "weight?": float,
    "ntp_weight?": _WEIGHT,
    "lssd_weight?": _WEIGHT,
    "kd_weight?": _WEIGHT,
    "selective_weight?": _WEIGHT,
}
CONFIG = {
    "job?": str,
    "init_from?": str,
    "model?": {"path?": str},
    "data?": {"row_length?": int, "batch_size?": int},
    "train?": {"num_steps?": int},
    "optimizer?": {"learning_rate?": float},
    "lora?": {"rank?": int},
    "objective?": {
        "kind?": str,
        "ntp_weight?": float,
        "lssd_weight?": float,
        "kd_weight?": float,
        "selective_weight?": float,
    },
    "preference?": {"loss?": str, "beta?": float},
    "sources?": {str: _SOURCE},
    "eval?": {
        "texts?": {str: _SOURCE},
        "pairs?": {str: _SOURCE},
        "exams?": {str: {"source?": str}},
    },
}

_LOSSES = {
    "ntp": "next-token prediction",
    "lssd": "logit swap self-distillation",
    "kd": "distillation",
    "selective": "selective distillation",
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One phase of a run, as recorded in its files.

    Attributes:
      number: of its color.
      name: of the phase; with the run's name if there are several runs.
      run: the workdir, as given.
      phase: its name in the config.
      config, results, provenance: the JSON files.
      rows, samples: the lines of `metrics.jsonl` and `samples.jsonl`.
      timing: the rows of `timing.jsonl`.
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
    timing: list[dict[str, Any]]
    items: dict[int, dict[str, np.ndarray]]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """`step` and measures of each evaluation, also of those over a budget."""
        return metrics.evaluations(self.rows)

    @property
    def before(self) -> dict[str, Any]:
        """The measures before the first step."""
        if "before" in self.results:
            return self.results["before"] or {}
        return next((e for e in self.evaluations if e["step"] == 0), {})

    @property
    def after(self) -> dict[str, Any]:
        """The last measures."""
        if "after" in self.results:
            return self.results["after"] or {}
        return next((e for e in self.evaluations[::-1] if e["step"]), {})

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
    def objective(self) -> str:
        """The loss of a phase that trains, in words; for another phase, its job."""
        if not self.trains:
            return self.setting("job") or ""
        objective = self.setting("objective") or {}
        if objective.get("kind") == "preference":
            loss = self.setting("preference.loss") or ""
            name = "DPO" if loss == "sigmoid" else loss.upper()
            text = f"{name}, beta {self.setting('preference.beta') or 0:g}"
        else:
            weights = {key: objective.get(f"{key}_weight") for key in _LOSSES}
            parts = [f"{w:g} {_LOSSES[key]}" for key, w in weights.items() if w]
            text = " + ".join(parts)
            if len(parts) == 1:
                text = text.removeprefix("1 ")
            sources = (self.setting("sources") or {}).values()
            if any(
                s.get(f"{key}_weight") is not None for s in sources for key in weights
            ):
                text += "; some sources have weights of their own"
        if rank := self.setting("lora.rank"):
            text += f"; adapters of rank {rank}"
        return text

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
            results = _read(place / "results.json", RESULTS) or recorded.get(phase, {})
            is_alone = len(folders) == 1 and len(runs) > 1
            long_name = name if is_alone else f"{name}/{phase}"
            arms.append(
                Arm(
                    number=len(arms),
                    name=long_name if len(runs) > 1 else phase,
                    run=run,
                    phase=phase,
                    config=_read(place / "config.json", CONFIG),
                    results=results,
                    # The records of the studies store it in their results.
                    provenance=_read(place / "provenance.json", _PROVENANCE)
                    or {k: results[k] for k in ("start", "files") if k in results},
                    rows=metrics.read(place, metrics.FILE),
                    samples=metrics.read(place, metrics.SAMPLES_FILE),
                    timing=record.read_timing(place),
                    items={
                        row["step"]: {
                            k: np.array(v, float) for k, v in row["items"].items()
                        }
                        for row in metrics.read(place, metrics.ITEMS_FILE)
                    },
                )
            )
    return arms


def name_of(run: str) -> str:
    """The name of a run: that of its folder."""
    path = paths.absolute(run)
    return path.parent.name if path.suffix == ".json" else path.name


def _is_file(path: epath.Path) -> bool:
    return path.suffix == ".json" and not path.is_dir()


def _phase_folders(folder: epath.Path) -> dict[str, epath.Path]:
    recorded = _recorded(folder)
    if _is_file(folder):
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
    file = folder if _is_file(folder) else folder / "report.json"
    return _read(file, {str: RESULTS})


def _read(file: epath.Path, shape: small_files.Shape) -> dict[str, Any]:
    if not file.exists():
        return {}
    return small_files.read_json(file, shape, _REMEDY)
