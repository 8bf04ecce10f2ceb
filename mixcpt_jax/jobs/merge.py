"""The job "merge": interpolates between the weights at the start and the end of a phase.

`start + a (end - start)` is evaluated with the phase's own measures for each `a` in
`merge.shares`. This gives a curve of learning against forgetting, at the cost of evaluation
only. The weights with the largest `a` that stays within the budgets of `merge.keep` are
saved, and later phases start from them. Interpolated weights often keep more than either
end loses (WiSE-FT, arXiv 2109.01903; LM-Cocktail, arXiv 2311.13534).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mixcpt_jax import config as config_lib
from mixcpt_jax.evaluation.evaluator import Evaluator
from mixcpt_jax.runtime import hosts, metrics, terminal
from mixcpt_jax.training import checkpoint
from mixcpt_jax.training import phase as phase_lib
from mixcpt_jax.training.steps import TrainState

SHARE = "merge/share"


@phase_lib.job
def run(phase: phase_lib.Phase) -> dict[str, Any]:
    """Measures each share, and saves the weights of the largest within all budgets.

    The start, a share of 0, is always measured, because budgets are relative to it. Shares
    that an interrupted run has measured are not measured again.

    Returns:
      The content of `results.json`: `before` and `after`, of the start and of the chosen
      share; `share`; and `curve`, the measures of each share.

    Raises:
      InputError: config, data, weights or workdir are wrong.
    """
    settings = phase.config.merge
    shares = sorted({0.0, *settings.shares})
    phase.announce(f"merges {len(shares)} shares of what was trained")
    checkpoint.check_folder(phase.folder)
    data = phase.load_data()
    with jax.set_mesh(phase.mesh):
        curve = _measure(phase, data, shares)
        chosen = int(hosts.of_first(choose(curve, settings.keep)))
        _save(phase, data, shares[chosen])
    if phase.shows_progress:
        terminal.say(_table(curve, settings.keep))
        why = (
            "the largest within merge.keep" if settings.keep else "merge.keep is empty"
        )
        phase.say(f"saves a share of {shares[chosen]:g} ({why})")
    return phase.finish(
        {
            "before": _measures(curve[0]),
            "after": _measures(curve[chosen]),
            "share": shares[chosen],
            "curve": curve,
        }
    )


def choose(curve: Sequence[Mapping[str, float]], keep: Mapping[str, float]) -> int:
    """The last row of a curve that is within all budgets, as the first (share 0) always is.

    Args:
      curve: the measures of each share, in ascending order of shares, the start first.
      keep: measure -> how much worse than at the start it may be, see
        `config.is_within`.

    Returns:
      The row's index in the curve; without budgets, that of the last row.
    """

    return max(
        number
        for number, row in enumerate(curve)
        if not number or config_lib.is_within(keep, curve[0], row)
    )


def _measure(phase, data, shares: Sequence[float]) -> list[dict[str, float]]:
    """The measures of each share; recorded ones are read from the phase's record."""
    recorded = [row for row in metrics.read(phase.folder) if SHARE in row]
    done = int(hosts.of_first(len(recorded)))
    curve = [
        {"share": row[SHARE], **metrics.evaluation_of(row)} for row in recorded[:done]
    ]
    start = None
    if config_lib.measures_kl(phase.config):
        start = _params(phase, 0.0, phase.frozen_dtype)
    evaluator = Evaluator(phase, data, start=start)
    keep = phase.config.merge.keep
    with metrics.Writer(
        phase.folder, phase.config.metrics, done - 1, {}, hosts.is_first()
    ) as writer:
        for number, share in list(enumerate(shares))[done:]:
            params = _params(phase, share, phase.config.model.param_dtype)
            name = f"{phase.name} {share:g}"
            with metrics.bar(name, evaluator.num_batches, phase.shows_progress) as show:
                results = evaluator(params, show)
            writer.write_items(number, evaluator.items)
            config_lib.require_measured("merge.keep", keep, results)
            scalars = metrics.evaluation_scalars(results)
            writer.write(number, scalars | {SHARE: share})
            writer.save()
            curve.append({"step": number, "share": share, **results})
            del params
    return curve


def _params(phase: phase_lib.Phase, share: float, dtype: str):
    return phase_lib.load_params(
        phase.config.init_from,
        phase.model_config,
        phase.mesh,
        dtype,
        phase.config.model.path,
        share,
    )


def _save(phase: phase_lib.Phase, data, share: float) -> None:
    params = _params(phase, share, phase.config.model.param_dtype)
    state = TrainState(jnp.zeros((), jnp.int32), params, ())
    with checkpoint.Checkpoints(phase.folder) as checkpoints:
        checkpoints.save(
            state, 1, 0, phase.given.to_dict(), {}, phase.provenance(data.files)
        )
        checkpoints.wait()


def _measures(row: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key != "share"}


def _table(curve: Sequence[Mapping[str, float]], keep: Mapping[str, float]) -> str:
    names = sorted({*keep, *(key for key in curve[0] if key.endswith("/loss"))})
    return metrics.table(
        ["share", *names],
        ([f"{row['share']:g}", *(f"{row[n]:.4f}" for n in names)] for row in curve),
    )
