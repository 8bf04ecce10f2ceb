"""The figure of the German study: what is learned against what is kept."""

import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from experiments import cells, figures
from experiments.german import run

ARMS = {
    "plain": "plain CPT",
    "mixture_ntp": "the mixture, NTP alone",
    "mixture_lssd20": "the mixture, 0.8 NTP + 0.2 LSSD (default)",
    "self_replay": "no general data: KL on the model's own samples",
}
EXAMS = {
    "translation": "translation\n(one of four)",
    "arc_easy": "ARC-easy",
    "piqa": "PIQA",
    "openbook_qa": "OpenBookQA",
    "lambada": "LAMBADA",
}
RATE = run.RATES[1]  # of the changes
LEARNED, KEPT = "unread_pages/loss", "wikitext/loss"


def measured(record: cells.Record) -> cells.Record:
    """The phase that measures a cell: training, or the evaluation of the start."""
    phases = record["phases"]
    return phases["cpt"] if "cpt" in phases else phases["evaluate"]


def perplexities(records: Iterable[cells.Record]) -> dict[float, tuple[float, float]]:
    """Rate -> perplexity of English and of German, the geometric mean over seeds."""
    losses: dict[float, list[tuple[float, float]]] = {}
    for record in records:
        after = measured(record)["after"]
        losses.setdefault(record["rate"], []).append((after[KEPT], after[LEARNED]))
    return {
        rate: tuple(np.exp(np.mean(losses[rate], axis=0))) for rate in sorted(losses)
    }


def changes(
    start: cells.Record, end: cells.Record
) -> dict[str, tuple[float, float, float]]:
    """Exam -> (change, low, high) in points: 95 % intervals over the same questions."""
    before, after = (measured(record)["questions"] for record in (start, end))
    return {name: cells.change(before[name], after[name]) for name in EXAMS}


def draw(records: list[cells.Record], path: pathlib.Path) -> None:
    """Writes the figure, light and dark; see `figures.save_themes`.

    A cell that diverged has no point, nor has one of the phases after CPT.
    """
    records = [r for r in records if "failed" not in r and not r.get("trained")]
    (start,) = (r for r in records if r["arm"] == "none" and r["start"])
    found = {arm: [r for r in records if r["arm"] == arm] for arm in ARMS}
    found = {arm: those for arm, those in found.items() if those}

    def draw_one(shown: Callable[[str], str]) -> Any:
        figure, (left, right) = figures.pyplot().subplots(
            1, 2, figsize=(8.2, 4.6), width_ratios=(1.15, 1)
        )
        lines = [
            _draw_perplexities(left, start, those, figures.STYLES[arm], shown)
            for arm, those in found.items()
        ]
        _label_perplexities(left, start)
        for place, (arm, those) in enumerate(found.items()):
            first = (r for r in those if r["rate"] == RATE and r["seed"] == 0)
            for record in first:
                offset = (place - (len(found) - 1) / 2) * 0.18
                change = changes(start, record)
                _draw_changes(right, change, figures.STYLES[arm], offset, shown)
        _label_changes(right)
        figure.legend(
            lines, [ARMS[arm] for arm in found], loc="lower center", frameon=False,
            bbox_to_anchor=(0.5, 0.97), ncols=2, columnspacing=2,
        )  # fmt: skip
        figure.tight_layout(w_pad=2)
        return figure

    figures.save_themes(draw_one, path)


def _draw_perplexities(axis, start, records, style: figures.Style, shown) -> Any:
    points = [*perplexities([start]).values(), *perplexities(records).values()]
    kept, learned = zip(*points, strict=True)
    color = shown(style.color)
    axis.plot(kept, learned, color=color, lw=1.2, alpha=0.5)
    (line,) = axis.plot(
        kept[1:], learned[1:], color=color, marker=style.marker, ms=9, lw=2
    )
    return line


def _label_perplexities(axis, start) -> None:
    ((kept, learned),) = perplexities([start]).values()
    axis.plot([kept], [learned], "*", ms=15, color="#8B949E")
    axis.annotate(
        "start", (kept, learned), (-12, -5), textcoords="offset points", ha="right"
    )
    axis.set(xscale="log", yscale="log")
    for which in (axis.xaxis, axis.yaxis):
        which.set_major_locator(figures.ticks(10, 12, 15, 18, 20, 25, 30, 40, 50, 60))
        which.set_major_formatter("{x:g}")
        which.set_minor_locator(figures.ticks())
        which.set_inverted(True)
    axis.set_xlabel("English, perplexity on WikiText-2\n(kept better →)")
    axis.set_ylabel("German, perplexity of unread pages\n(learned better →)")
    axis.grid(alpha=0.25)


def _draw_changes(axis, measured, style: figures.Style, offset: float, shown) -> None:
    change, low, high = np.array(list(measured.values())).T
    axis.errorbar(
        change, np.arange(len(measured)) + offset, xerr=(change - low, high - change),
        fmt=style.marker, color=shown(style.color), ms=6.5, elinewidth=1.3,
    )  # fmt: skip


def _label_changes(axis) -> None:
    axis.axvline(0, color="#8B949E", lw=1)
    axis.set_yticks(range(len(EXAMS)), EXAMS.values())
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel(f"correct answers, change in points\n(rate {RATE:g})")
    axis.grid(alpha=0.25, axis="x")
