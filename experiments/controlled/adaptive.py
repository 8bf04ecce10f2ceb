"""The weight of LSSD, moved so that the KL from the start follows a budget, and stops.

    python -m experiments.controlled.adaptive --world=runs/controlled/world-0 \\
        --start=runs/controlled/chat-base-seed0-DIGEST --budgets 0.03 0.1 0.3 \\
        --weights 0 0.2 0.5

Every loss token has the weights `1 - w` of next-token prediction and `w` of LSSD. Every
`EVERY` steps the KL from the start on documents about people whom the mixture never
mentions moves `w` by PI control:

    e = KL / target - 1
    i <- clip(i + INTEGRAL e, 0, 1)
    w = clip(i + PROPORTIONAL e, 0, 1)

The target is the budget; with `--ramp` it rises to the budget in proportion to the steps,
and `w` begins at 1 instead of 0. `--weights` runs the same with constant weights, to
compare with. `--stops` trains with NTP alone and measures everything eight times: the
models with which `train.keep_budget` would end. Writes to `adaptive.json`: the measures at
the end of each run with KL and `w` at every evaluation, and those of the stops.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import ml_collections
from etils import epath

from experiments.controlled.config import Cell, make
from mixcpt_jax.data import pipeline
from mixcpt_jax.evaluation import evaluator
from mixcpt_jax.runtime import metrics

FILE = pathlib.Path(__file__).parent / "adaptive.json"
ARM = "mixture_lssd50"  # any arm with both weights above 0 everywhere
WATCHED = "untold_documents"
EVERY = 4
PROPORTIONAL, INTEGRAL = 0.5, 0.25


class Controller:
    """The weight of LSSD: constant, or moved so that the KL follows a budget.

    Attributes:
      weight: now.
      path: (KL, weight after it) of each evaluation.
    """

    def __init__(self, weight: float = 0.0, targets: Sequence[float] = ()):
        """
        Args:
          weight: at the beginning.
          targets: the KL to reach at each evaluation; empty: the weight is constant.
        """
        self._targets, self._integral = targets, weight
        self.weight = weight
        self.path: list[tuple[float, float]] = []

    def observe(self, kl: float) -> None:
        if self._targets:
            error = kl / self._targets[len(self.path)] - 1
            self._integral = _clip(self._integral + INTEGRAL * error)
            self.weight = _clip(self._integral + PROPORTIONAL * error)
        self.path.append((kl, self.weight))


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)


@contextlib.contextmanager
def controlled(controller: Controller, num_steps: int) -> Iterator[None]:
    """Trains with the controller's weight; only the last evaluation measures all texts.

    The weights of tokens are arrays of a batch, so nothing is compiled again.
    """
    batches, measure = pipeline.batches, evaluator.Evaluator.__call__
    last = _num_evaluations(num_steps)

    def weighted(*args):
        for batch in batches(*args):
            both = batch["ntp_weights"] + batch["lssd_weights"]
            yield batch | {
                "ntp_weights": (1 - controller.weight) * both,
                "lssd_weights": controller.weight * both,
            }

    def observed(this, params, *args):
        data = this._data
        if len(controller.path) + 1 < last:
            this._data = dataclasses.replace(data, texts={WATCHED: data.texts[WATCHED]})
        results = measure(this, params, *args)
        this._data = data
        controller.observe(results[f"{WATCHED}/kl_from_start"])
        return results

    with (
        mock.patch.object(pipeline, "batches", weighted),
        mock.patch.object(evaluator.Evaluator, "__call__", observed),
    ):
        yield


def _num_evaluations(num_steps: int) -> int:
    return math.ceil(num_steps / EVERY)


def run(config: ml_collections.ConfigDict, controller: Controller) -> dict[str, Any]:
    """Trains from a base; returns the measures at the end and the controller's path."""
    config.train.eval_every = EVERY
    with controlled(controller, config.train.num_steps):
        *_, after = _evaluations(config)
    path = [[float(f"{x:.4g}") for x in place] for place in controller.path]
    return {"after": after, "path": path}


def stops(config: ml_collections.ConfigDict) -> list[dict[str, float]]:
    """All measures at eight steps of a run, each with its `step`."""
    config.train.eval_every = config.train.num_steps // 8
    config.eval.kl_from_start = "always"
    return _evaluations(config)


def _evaluations(config: ml_collections.ConfigDict) -> list[dict[str, float]]:
    from mixcpt_jax import main  # it defines flags

    with tempfile.TemporaryDirectory() as workdir:
        folders, _ = main.run(config, workdir)
        rows = metrics.evaluations(metrics.read(epath.Path(folders["cpt"])))
    return [
        {k: float(f"{v:.5g}") for k, v in row.items() if not k.endswith("/perplexity")}
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--world", required=True, help="a folder of world.write")
    parser.add_argument("--start", required=True, help="the workdir of a chat base")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--budgets", type=float, nargs="*", default=[])
    parser.add_argument("--ramp", action="store_true")
    parser.add_argument("--weights", type=float, nargs="*", default=[])
    parser.add_argument("--stops", action="store_true")
    parser.add_argument("--results", default=str(FILE))
    arguments = parser.parse_args()
    file = pathlib.Path(arguments.results)

    def config_of(arm: str) -> ml_collections.ConfigDict:
        return make(Cell(arguments.world, arm, "chat", arguments.start, arguments.rate))

    config = config_of(ARM)
    count = _num_evaluations(config.train.num_steps)
    shares = [(n + 1) / count if arguments.ramp else 1.0 for n in range(count)]
    kind = "ramp" if arguments.ramp else "budget"
    runs = [
        (f"{kind} {b:g}", Controller(float(arguments.ramp), [b * s for s in shares]))
        for b in arguments.budgets
    ] + [(f"weight {w:g}", Controller(w)) for w in arguments.weights]
    work = [(name, functools.partial(run, config, c)) for name, c in runs]
    if arguments.stops:
        work.append(("stops", functools.partial(stops, config_of("mixture_ntp"))))
    for name, measured in work:
        record = measured()
        found = json.loads(file.read_text()) if file.exists() else {}
        found[f"rate {arguments.rate:g}, {name}"] = record
        lines = (f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(found.items()))
        file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(name, record, flush=True)


if __name__ == "__main__":
    main()
