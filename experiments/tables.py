"""Writes the tables and plots of `PAGES` from the results that are committed here.

    python -m experiments.tables [--beside=FOLDER]

Text between `<!-- NAME -->` and `<!-- /NAME -->` in a page is written by this command; a
test compares the pages with the results. `--beside` writes nothing: it prints the tables
of those arms of the controlled study whose results are in FOLDER, once from the committed
results and once from FOLDER.
"""

import argparse
import functools
import itertools
import json
import math
import pathlib
import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from experiments import cells, figures
from experiments.arms import ARMS
from experiments.book import run as book_run
from experiments.controlled import adaptive, confidence, cost, run
from experiments.controlled.config import MERGED_SHARES
from experiments.controlled.run import HIGH, HIGH_RATES, KEEP_RATES, RATE, RATES
from experiments.german import figure as german_figure
from experiments.german import run as german_run
from mixcpt_jax.reporting import report as report_lib
from mixcpt_jax.runtime import metrics

FOLDER = pathlib.Path(__file__).parent
PAGES = (
    FOLDER.parent / "README.md",
    FOLDER / "README.md",
    FOLDER / "controlled" / "README.md",
    FOLDER / "book" / "README.md",
    FOLDER / "german" / "README.md",
    FOLDER / "quickstart" / "README.md",
    FOLDER / "anatomy" / "README.md",
)
QUICKSTART_ROLES = {
    "domain": "domain",
    "general": "untouched",
    "instructions": "rehearsed",
    "preferences": "rehearsed",
}
KEPT_LEVEL = 0.9
# Levels of use, within the reach of next-token prediction on the mixture, at which arms
# are compared by what they keep.
USE_LEVELS = {
    "chat": (0.4, 0.6, 0.8),
    "documents": (0.05, 0.1, 0.15),
    "narrow": (0.2, 0.35, 0.5),
}
# Arms with a weight on the teacher's distribution; compared with "mixture_ntp", the same
# mixture without one.
CONSTRAINED = (
    "mixture_lssd20",
    "mixture_lssd50",
    "mixture_lssd",
    "mixture_mft80",
    "mixture_mft50",
    "ntp_kl",
)

Record = cells.Record
Point = tuple[float, float]

# Base -> how its arms are judged: after which phase, the measure of what is kept, and the
# names of kept and use.
_ANSWERS = ("cpt", "untold_use/exact", "untold answers, %", "domain answers, %")
JUDGED = {
    "chat": _ANSWERS,
    "documents": (
        "sft",
        "untold_memory/exact",
        "untold values in documents, %",
        "domain values in answers, %",
    ),
    "narrow": _ANSWERS,
}


def judge(record: Record) -> Point:
    """(kept, use) of a cell, each in [0, 1]."""
    name, kept, *_ = JUDGED[record["base"]]
    phase = record["phases"][name]
    after = phase["after"]
    if record["base"] == "documents":
        return after[kept], phase["answers"]["domain"]["value"]
    return after[kept], after["domain_use/exact"]


def curves(
    records: Iterable[Record],
    base: str,
    arm: str,
    rates: tuple[float, ...] = RATES,
) -> dict[int, list[Point]]:
    """Seed -> its (kept, use) points: the start, then the learning rates in order.

    The start has the rate 0. A run that diverged has the point (0, 0). Seeds without all
    rates are left out.
    """
    starts: dict[int, Point] = {}
    found: dict[int, dict[float, Point]] = {}
    for record in records:
        if record["base"] != base or record["share"] or record["rule"] != "first":
            continue
        if record["arm"] == "base":
            after = record["phases"]["base"]["after"]
            starts[record["seed"]] = after[JUDGED[base][1]], after["domain_use/exact"]
        elif record["arm"] == arm and record["rate"] in rates:
            point = (0.0, 0.0) if "failed" in record else judge(record)
            points = found.setdefault(record["seed"], {})
            if record["rate"] in points:
                raise ValueError(f"{base}, {arm}: two records of rate {record['rate']}")
            points[record["rate"]] = point
    return {
        seed: [starts[seed], *(points[rate] for rate in rates)]
        for seed, points in sorted(found.items())
        if set(points) == set(rates)
    }


def merge_curves(
    records: Iterable[Record], arm: str, rate: float
) -> dict[int, list[Point]]:
    """Seed -> (kept, use) of each share of a merge on the chat base, the start first."""
    return {
        record["seed"]: [
            (row["untold_use/exact"], row["domain_use/exact"])
            for row in record["phases"]["merge"]["curve"]
        ]
        for record in sorted(records, key=lambda record: record["seed"])
        if (record["base"], record["arm"], record["rate"]) == ("chat", arm, rate)
    }


def hypervolume(points: Iterable[Point]) -> float:
    """Area of the part of the unit square that a point dominates in both coordinates."""
    area, height = 0.0, 0.0
    for x, y in sorted(points, reverse=True):
        area += x * max(y - height, 0.0)
        height = max(height, y)
    return area


def use_at(points: list[Point], level: float) -> float:
    """The most use on the polyline through the points where at least `level` is kept.

    0 if the curve never keeps so much.
    """
    best = max((y for x, y in points if x >= level), default=0.0)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if (x0 - level) * (x1 - level) < 0:
            best = max(best, y0 + (level - x0) / (x1 - x0) * (y1 - y0))
    return best


def kept_at(points: list[Point], level: float) -> float:
    """The most that is kept on the polyline through the points at a use of `level`.

    0 if the curve never reaches it.
    """
    return use_at([(use, kept) for kept, use in points], level)


def interval(values: list[float]) -> tuple[float, float]:
    """The mean over seeds and half of its 95 % interval (Student's t)."""
    if len(values) < 3:  # an interval of two seeds is useless
        return statistics.fmean(values), float("nan")
    error = statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), float(stats.t.ppf(0.975, len(values) - 1)) * error


def _cell(shares: list[float], is_difference: bool = False) -> str:
    """Shares in percent, with their interval if there is one."""
    if not shares:
        return ""
    mean, half = interval([100 * share for share in shares])
    if half != half:
        return f"{mean:+.1f}" if is_difference else f"{mean:.1f}"
    if is_difference:
        return f"{mean:+.1f} ± {half:.1f}"
    low, high = max(mean - half, 0.0), min(mean + half, 100.0)
    return f"{mean:.1f} ({low:.0f} to {high:.0f})"


def _per_cent(share: float) -> str:
    return f"{100 * share:.1f}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    return metrics.table(header, rows) if rows else "Not run yet."


def arms_table(records: list[Record], base: str) -> str:
    """Every arm of a base as a curve, in the order of the area that it dominates."""
    rows = []
    for arm in ARMS:
        found = curves(records, base, arm)
        if not found:
            continue
        areas = [hypervolume(points) for points in found.values()]
        gains = _gains(records, base, arm, "mixture_ntp")
        rows.append(
            (
                statistics.fmean(areas),
                [
                    ARMS[arm].label,
                    str(len(found)),
                    _cell(areas),
                    "" if arm == "mixture_ntp" else _cell(gains, True),
                    _cell([use_at(points, KEPT_LEVEL) for points in found.values()]),
                    *_use_and_kept(_after_start(found.values())),
                ],
            )
        )
    header = ["arm", "seeds", "area", "area over mixture NTP"]
    header += [f"use at {KEPT_LEVEL:.0%} kept", *(f"{rate:g}" for rate in RATES)]
    rows.sort(key=lambda row: -row[0])
    return _table(header, [row for _, row in rows])


def constraint_table(records: list[Record], base: str) -> str:
    """The gain of each constrained arm over next-token prediction on the same mixture."""
    return _differences_table(
        records, base, [(ARMS[arm].label, arm, "mixture_ntp") for arm in CONSTRAINED]
    )


def swap_table(records: list[Record], base: str) -> str:
    """The gain of the swap over plain distillation of the same weight."""
    pairs = [
        ("weight 0.2 beside 0.8 NTP", "mixture_lssd20", "mixture_mft80"),
        ("weight 0.5 beside 0.5 NTP", "mixture_lssd50", "mixture_mft50"),
    ]
    return _differences_table(records, base, pairs)


def mixing_table(records: list[Record]) -> str:
    """The gain in area of a mixture over training on domain documents alone."""
    pairs = [
        ("mixture, NTP, over plain CPT", "mixture_ntp", "plain"),
        ("mixture, 0.8 NTP + 0.2 LSSD, over plain CPT", "mixture_lssd20", "plain"),
        ("mixture, NTP, over replay", "mixture_ntp", "replay"),
    ]
    rows = []
    for base in JUDGED:
        for label, arm, reference in pairs:
            gains = _gains(records, base, arm, reference)
            if gains:
                rows.append([f"{base}: {label}", str(len(gains)), _cell(gains, True)])
    return _table(["base: difference", "seeds", "area"], rows)


def _gains(records: list[Record], base: str, arm: str, reference: str) -> list[float]:
    """The difference of areas, for each seed of both arms."""
    found, others = (curves(records, base, name) for name in (arm, reference))
    return [
        hypervolume(found[seed]) - hypervolume(others[seed])
        for seed in sorted(found.keys() & others.keys())
    ]


def _differences_table(
    records: list[Record], base: str, pairs: list[tuple[str, str, str]]
) -> str:
    """Rows of (label, arm, reference arm): their difference, seed by seed.

    In area, and in what is kept at the same use. A level of use counts only seeds in which
    both curves reach it; the cell says so if some do not.
    """
    rows = []
    for label, arm, reference in pairs:
        found, others = (curves(records, base, a) for a in (arm, reference))
        seeds = sorted(found.keys() & others.keys())
        if not seeds:
            continue
        gains = _gains(records, base, arm, reference)
        row = [label, str(len(seeds)), _cell(gains, True)]
        for level in USE_LEVELS[base]:
            kept = [[kept_at(c[s], level) for c in (found, others)] for s in seeds]
            gains = [mine - other for mine, other in kept if mine and other]
            cell = _cell(gains, True) or "not reached"
            is_partial = 0 < len(gains) < len(seeds)
            row.append(f"{cell} ({len(gains)} of {len(seeds)})" if is_partial else cell)
        rows.append(row)
    levels = [f"kept at a use of {level:.0%}" for level in USE_LEVELS[base]]
    return _table(["difference", "seeds", "area", *levels], rows)


def bases_table(records: list[Record]) -> str:
    """The measures of the bases."""
    columns = {
        "domain answers": "domain_use/exact",
        "domain values": "domain_memory/exact",
        "loss there": "domain_memory/loss",
        "rehearsed answers": "rehearsed_use/exact",
        "untold answers": "untold_use/exact",
        "untold values": "untold_memory/exact",
        "untold documents, loss": "untold_documents/loss",
    }
    found = {
        base: [
            r["phases"]["base"]["after"]
            for r in records
            if (r["base"], r["arm"]) == (base, "base")
        ]
        for base in JUDGED
    }
    return _measures_table("base", columns, found)


def memory_table(records: list[Record], base: str) -> str:
    """Further measures, at the rate at which the arms are aligned."""
    columns = {
        "domain values": "domain_memory/exact",
        "loss there": "domain_memory/loss",
        "rehearsed values": "rehearsed_memory/exact",
        "untold values": "untold_memory/exact",
        "untold documents, loss": "untold_documents/loss",
    }
    found = {
        ARMS[arm].label: [
            r["phases"]["cpt"]["after"] for r in _at_rate(records, base, arm)
        ]
        for arm in ARMS
        if not ARMS[arm].is_merged
    }
    return _measures_table("arm", columns, found)


def _measures_table(
    first: str, columns: dict[str, str], found: dict[str, list[dict[str, float]]]
) -> str:
    """A row of measures for each entry that has any, means over seeds."""
    rows = [
        [label, str(len(seeds))]
        + [
            f"{statistics.fmean(seed[key] for seed in seeds):.2f}"
            if key.endswith("/loss")
            else _cell([seed[key] for seed in seeds])
            for key in columns.values()
        ]
        for label, seeds in found.items()
        if seeds
    ]
    return _table([first, "seeds", *columns], rows)


def _at_rate(
    records: list[Record], base: str, arm: str, rate: float = RATE
) -> list[Record]:
    return [
        r
        for r in records
        if (r["base"], r["arm"], r["rate"], r["rule"]) == (base, arm, rate, "first")
        and not r["share"]
        and "failed" not in r
    ]


def alignment_table(records: list[Record], base: str) -> str:
    """After each phase: answers in the chat format, of domain people and untold ones."""
    rows = []
    for arm in ARMS:
        found = [r for r in _at_rate(records, base, arm) if r["align"]]
        for phase in ("sft", "dpo"):
            results = [r["phases"][phase] for r in found if phase in r["phases"]]
            if not results:
                continue
            rows.append(
                [
                    f"{ARMS[arm].label}: {phase.upper()}",
                    str(len(results)),
                    *(
                        _cell([r["answers"][group][key] for r in results])
                        for key in ("form", "value")
                        for group in ("domain", "untold")
                    ),
                    _cell([r["after"]["untold_memory/exact"] for r in results]),
                    _cell([r["after"]["untold/reward_accuracy"] for r in results])
                    if phase == "dpo"
                    else "",
                ]
            )
    header = ["arm and phase", "seeds", "format, domain", "format, untold"]
    header += ["value, domain", "value, untold", "untold values", "pairs ranked right"]
    return _table(header, rows)


# Arms that need no general data, then those with a mixture; and the arm of each group that
# the others are compared with.
KEEP_GROUPS = (
    (
        "plain",
        (
            "self_replay",
            "self_replay_lssd20",
            "comprehension",
            "plain_teacher",
            "plain_excess",
            "lssd20",
        ),
    ),
    (
        "mixture_ntp",
        ("mixture_ntp_teacher", "mixture_ntp_excess", "mixture_lssd20", "ntp_kl"),
    ),
)
_KEEP_LEVELS = (0.4, 0.6)


def keep_table(records: list[Record]) -> str:
    """Arms on the chat base at the rates of `KEEP_RATES`, each against its reference.

    Areas and levels are those of seeds with all rates.
    """
    rows = []
    for reference, arms in KEEP_GROUPS:
        others = curves(records, "chat", reference, KEEP_RATES)
        for arm in (reference, *arms):
            at_rates = [_at_rate(records, "chat", arm, rate) for rate in KEEP_RATES]
            if not any(at_rates):
                continue
            found = curves(records, "chat", arm, KEEP_RATES)
            gains = [
                hypervolume(points) - hypervolume(others[seed])
                for seed, points in found.items()
                if seed in others
            ]
            rows.append(
                [
                    ARMS[arm].label,
                    str(max(map(len, at_rates))),
                    _cell([hypervolume(points) for points in found.values()]),
                    "" if arm == reference else _cell(gains, True),
                    _cell([use_at(points, KEPT_LEVEL) for points in found.values()]),
                    *(_kept_at(found.values(), level) for level in _KEEP_LEVELS),
                    *(_use_and_kept([[judge(r) for r in cells] for cells in at_rates])),
                ]
            )
    header = ["arm", "seeds", "area", "area over first row of group"]
    header += [f"use at {KEPT_LEVEL:.0%} kept"]
    header += [f"kept at a use of {level:.0%}" for level in _KEEP_LEVELS]
    return _table([*header, *(f"{rate:g}" for rate in KEEP_RATES)], rows)


def _kept_at(found: Iterable[list[Point]], level: float) -> str:
    """What is kept at a use that all curves reach."""
    kept = [kept_at(points, level) for points in found]
    return _cell(kept) if all(kept) else "not reached"


def _use_and_kept(points: Iterable[Sequence[Point]]) -> list[str]:
    """Mean use / kept of each group of points, in percent."""
    return [
        " / ".join(
            f"{100 * statistics.fmean(point[part] for point in group):.0f}"
            for part in (1, 0)
        )
        if group
        else ""
        for group in points
    ]


def _after_start(found: Iterable[list[Point]]) -> list[tuple[Point, ...]]:
    """The points of all curves at each rate or share; not their starts."""
    return list(zip(*found, strict=True))[1:]


def merge_table(records: list[Record]) -> str:
    """Merges of one run, against the runs of the same arm at all rates."""
    rows = []
    for arm in (name for name, arm in ARMS.items() if arm.is_merged):
        trained = curves(records, "chat", arm.removesuffix("_merged"))
        for rate in RATES:
            found = merge_curves(records, arm, rate)
            if not found:
                continue
            both = sorted(found.keys() & trained.keys())
            rows.append(
                [
                    f"{ARMS[arm].label}, {rate:g}",
                    str(len(found)),
                    _cell([hypervolume(points) for points in found.values()]),
                    _cell(
                        [hypervolume(found[s]) - hypervolume(trained[s]) for s in both],
                        True,
                    ),
                    _cell([use_at(points, KEPT_LEVEL) for points in found.values()]),
                    *_use_and_kept(_after_start(found.values())),
                ]
            )
    header = ["arm, rate", "seeds", "area", "area over the sweep of rates"]
    header += [f"use at {KEPT_LEVEL:.0%} kept", *(f"{a:g}" for a in MERGED_SHARES)]
    return _table(header, rows)


def summary(records: list[Record], german: list[Record]) -> str:
    """The sentences at the top of the first page, with their numbers."""

    def percent(kept: float, use: float) -> str:
        return f"answers {use:.0%} and keeps {kept:.0%}"

    def measured(arm: str) -> str:
        points = [judge(record) for record in _at_rate(records, "chat", arm)]
        return percent(*np.mean(points, axis=0))

    share = 1 + MERGED_SHARES.index(0.8)
    merges = merge_curves(records, "plain_merged", RATE).values()
    merged = percent(*np.mean([curve[share] for curve in merges], axis=0))
    sentences = (
        "Asked about the domain and about what it knew before, a model that reads the "
        f"domain alone {measured('plain')}.",
        f"With general questions beside the same text it {measured('mixture_ntp')}; with "
        "a small weight on what it predicted at the start as well, which is our default, "
        f"it {measured('mixture_lssd20')}.",
        "Where there is no general text, the model's own samples take its place: it "
        f"{measured('self_replay')}.",
        "Where a model has already read the domain alone, taking back a fifth of the "
        f"change costs only evaluation: it {merged}.",
        "These models have a million parameters and live in an invented world. A real "
        "one: " + german_sentence(german),
    )
    return "\n".join(
        textwrap.fill(f"{number}. {text}", 88, subsequent_indent="   ")
        for number, text in enumerate(sentences, 1)
    )


def _listed(values: Iterable[str]) -> str:
    *others, last = values
    return f"{', '.join(others)} and {last}"


def _german_measures(german: list[Record]) -> dict[str, dict[str, float]]:
    """Measures of the first seed: of the start, of arms at the middle rate, at the low one.

    Returns:
      "start", "plain", "mixture", "default", "replay" or "low" (plain CPT at the low rate)
      -> its measures.
    """
    low, middle, _ = german_run.RATES
    cells_of = {
        "start": ("none", 0),
        "plain": ("plain", middle),
        "mixture": ("mixture_ntp", middle),
        "default": ("mixture_lssd20", middle),
        "replay": ("self_replay", middle),
        "low": ("plain", low),
    }
    after = {
        (record["arm"], record["rate"]): german_figure.measured(record)["after"]
        for record in german
        if record["seed"] == 0 and record.get("start") and "failed" not in record
    }
    return {name: after[cell] for name, cell in cells_of.items()}


def german_sentence(german: list[Record]) -> str:
    """What one seed of the German study shows."""
    found = _german_measures(german)
    low, rate, _ = german_run.RATES

    def perplexity(name: str, text: str) -> str:
        return f"{math.exp(found[name][f'{text}/loss']):.1f}"

    def perplexities(text: str) -> str:
        ends = ("plain", "mixture", "default", "replay")
        now = _listed(perplexity(name, text) for name in ends)
        return f"{perplexity('start', text)} to {now}"

    return (
        f"SmolLM2-135M reads a German handbook (one seed, rate {rate:g}). Under plain CPT, "
        "NTP on the mixture, the default, and replay of own samples, German perplexity "
        f"goes from {perplexities('unread_pages')}, English from "
        f"{perplexities('wikitext')}. A lower rate does as much: at {low:g} plain CPT ends "
        f"at {perplexity('low', 'unread_pages')} and {perplexity('low', 'wikitext')}."
    )


def german_findings(german: list[Record]) -> str:
    """Seven sentences on the first seed, with their numbers."""
    found = _german_measures(german)
    start, plain, mixture, default, replay, low = found.values()
    ends = plain, mixture, default, replay

    def changes(key: str) -> str:
        return _listed(f"{100 * (end[key] - start[key]):+.1f}" for end in ends)

    def times(end: dict[str, float]) -> str:
        return f"{math.exp(end['wikitext/loss'] - start['wikitext/loss']):.1f} times"

    def lower(end: dict[str, float], other: dict[str, float]) -> str:
        kl = "wikitext/kl_from_start"
        return f"{1 - end[kl] / other[kl]:.0%} lower"

    german_now = _listed(f"{math.exp(end['unread_pages/loss']):.1f}" for end in ends)
    sentences = (
        "Plain CPT, NTP on the mixture, the default and replay of own samples learn the "
        "German about equally well: the perplexity of unread pages goes from "
        f"{math.exp(start['unread_pages/loss']):.1f} to {german_now}.",
        "Plain CPT forgets: WikiText-2's perplexity becomes "
        f"{times(plain)} that of the start.",
        "To tell which English sentence translates a German one, a model needs its "
        f"English: these answers change by {changes('translation/exam')} points.",
        "NTP on the mixture keeps a part: WikiText-2's perplexity becomes "
        f"{times(mixture)} that of the start, and the KL from the start is "
        f"{lower(mixture, plain)} than under plain CPT. LSSD beside it keeps more: "
        f"{times(default)}, and the KL is {lower(default, plain)}.",
        "KL on the model's own samples, without any general data, keeps most: "
        f"{times(replay)}, and the KL is {lower(replay, plain)}.",
        f"LAMBADA changes by {changes(LAMBADA)} points: only replay keeps a part of it. "
        "LAMBADA is prose from novels; the mixture's general text is instructions and "
        "preferences.",
        f"The rate matters more than the arm: at {german_run.RATES[0]:g} plain CPT learns "
        f"more German ({math.exp(low['unread_pages/loss']):.1f}), WikiText-2's perplexity "
        f"becomes {times(low)} that of the start, and LAMBADA changes by "
        f"{100 * (low[LAMBADA] - start[LAMBADA]):+.1f} points.",
    )
    return "\n".join(
        textwrap.fill(f"{number}. {sentence}", 92, subsequent_indent="   ")
        for number, sentence in enumerate(sentences, 1)
    )


def budget_table(records: list[Record]) -> str:
    """Arms with a budget of forgetting, beside the same arms without one."""
    rows = []
    for arm in (name for name, arm in ARMS.items() if arm.budget):
        for name in (arm.removesuffix("_budget"), arm):
            for rate in RATES[1:]:
                found = _at_rate(records, "chat", name, rate)
                if not found:
                    continue
                phases = [record["phases"]["cpt"] for record in found]
                ends = [p["keep_budget"] for p in phases if "keep_budget" in p]
                rows.append(
                    [
                        f"{ARMS[name].label}, {rate:g}",
                        str(len(found)),
                        _cell([judge(record)[1] for record in found]),
                        _cell([judge(record)[0] for record in found]),
                        _loss(phases, "untold_documents/loss"),
                        ", ".join(str(end["step"]) for end in ends),
                    ]
                )
    header = ["arm, rate", "seeds", "domain answers", "untold answers"]
    return _table([*header, "untold documents, loss", "steps of each seed"], rows)


def adaptive_table(found: dict[str, Any]) -> str:
    """Constant and adaptive weights of LSSD, and stops, by their KL from the start."""
    labels = {
        "weight": lambda w: f"{1 - w:g} NTP + {w:g} LSSD",
        "budget": lambda kl: f"weight follows a KL of {kl:g}",
        "ramp": lambda kl: f"weight rises to a KL of {kl:g}",
    }
    shown = {}
    for key, record in found.items():
        rate, _, name = key.partition(", ")
        if name == "stops":
            *_, last = record
            for row in (record[1], record[2], last):
                end = "to its end" if row is last else f"to step {row['step']:.0f}"
                shown[f"NTP, {rate}, {end}"] = row
            continue
        kind, value = name.split()
        if key != "rate 0.002, weight 0":  # the stops have its end
            shown[labels[kind](float(value))] = record["after"]
    measures = ("domain_use/exact", "untold_use/exact")
    rows = [
        (row[f"{adaptive.WATCHED}/kl_from_start"], label, [row[m] for m in measures])
        for label, row in shown.items()
    ]
    return _table(
        ["mixture", "KL", "domain answers", "untold answers"],
        [
            [label, f"{kl:.3f}", *(f"{100 * share:.1f}" for share in shares)]
            for kl, label, shares in sorted(rows, reverse=True)
        ],
    )


def teacher_table(records: list[Record]) -> str:
    """Arms with a teacher trained longer, beside the same arms and seeds without it."""
    rows = []
    for arm in (name for name, arm in ARMS.items() if arm.has_longer_teacher):
        found = _at_rate(records, "chat", arm)
        seeds = {record["seed"] for record in found}
        own = _at_rate(records, "chat", arm.removesuffix("_longer"))
        for group in ([r for r in own if r["seed"] in seeds], found):
            if not group:
                continue
            phases = [record["phases"]["cpt"] for record in group]
            rows.append(
                [
                    ARMS[group[0]["arm"]].label,
                    str(len(group)),
                    _cell([judge(record)[1] for record in group]),
                    _cell([judge(record)[0] for record in group]),
                    _loss(phases, "domain_memory/loss"),
                    _loss(phases, "untold_documents/loss"),
                ]
            )
    header = ["arm", "seeds", "domain answers", "untold answers"]
    header += ["domain values, loss", "untold documents, loss"]
    return _table(header, rows)


def _loss(phases: list[Record], measure: str) -> str:
    return f"{statistics.fmean(phase['after'][measure] for phase in phases):.2f}"


def high_table(records: list[Record]) -> str:
    """Use / kept of the first seed at rates up to where every arm forgets."""
    rates = (*RATES[2:], *HIGH_RATES)
    found = {arm: curves(records, "chat", arm, rates) for arm in HIGH}
    rows = [
        [ARMS[arm].label, *_use_and_kept(_after_start([seeds[0]]))]
        for arm, seeds in found.items()
        if 0 in seeds
    ]
    return _table(["arm", *(f"{rate:g}" for rate in rates)], rows)


def selection_table(records: list[Record]) -> str:
    """Format and answers by rule and number of samples."""
    groups: dict[tuple, list[Record]] = {}
    for r in records:
        if r["rule"] != "first" and "failed" not in r:
            groups.setdefault((r["arm"], r["rule"], r["samples"]), []).append(r)
    shown = ("untold", "form"), ("untold", "value"), ("domain", "value")
    rows = [
        [
            f"{ARMS[arm].label}: {rule}",
            str(samples),
            str(len(found)),
            *(
                _cell([r["phases"][phase]["answers"][group][key] for r in found])
                for phase in ("sft", "dpo")
                for group, key in shown
            ),
        ]
        for (arm, rule, samples), found in sorted(groups.items())
    ]  # fmt: skip
    header = ["arm and rule", "samples", "seeds"]
    header += [
        f"{phase}: {what}"
        for phase in ("SFT", "DPO")
        for what in ("format", "value, untold", "value, domain")
    ]
    return _table(header, rows)


def shares_table(records: list[Record]) -> str:
    """The mixture's share of domain tokens."""
    groups: dict[tuple, list[Point]] = {}
    for r in records:
        if r["base"] == "chat" and r["arm"] in ARMS and r["rule"] == "first":
            share = r["share"] or ARMS[r["arm"]].share
            if "failed" not in r and ARMS[r["arm"]].general is not None:
                key = (r["arm"], r["rate"], share)
                groups.setdefault(key, []).append(judge(r))
    several = {(arm, rate) for arm, rate, share in groups if share != 0.5}
    rows = [
        [f"{ARMS[arm].label}, rate {rate:g}", f"{share:.0%}", str(len(found))]
        + [_cell([point[part] for point in found]) for part in (1, 0)]
        for (arm, rate, share), found in sorted(groups.items())
        if (arm, rate) in several
    ]
    return _table(
        ["arm", "domain's share", "seeds", "domain answers", "untold answers"], rows
    )


def cost_table(records: list[Record], costs: dict[str, dict[str, float]]) -> str:
    """The cost of a step of each arm, in brackets relative to plain CPT."""
    arms = {record["arm"] for record in records}
    columns = {
        "MFLOP a token": lambda cost: cost["flops_per_token"] / 1e6,
        "MiB": lambda c: (c["argument_bytes"] + c["temporary_bytes"]) / 2**20,
        "milliseconds a step": lambda cost: 1000 * cost["seconds"],
        "steps": lambda cost: cost["steps"],
    }
    rows = [
        [ARMS[arm].label]
        + [
            f"{value(cost):,.1f} ({value(cost) / value(costs['plain']):.2f})"
            for value in columns.values()
        ]
        for arm, cost in costs.items()
        if arm in arms
    ]
    return _table(["arm", *columns], rows)


def confidence_table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """The confidence of the bases in values that they cannot know."""
    columns = {
        "p_a": "mean p_a",
        "p_y": "mean p_y",
        "swapped": "tokens swapped, %",
        "ceiling": "least loss under LSSD",
    }
    rows = [
        [base, str(len(seeds))]
        + [
            f"{100 * mean:.1f}" if key == "swapped" else f"{mean:.2f}"
            for key in columns
            for mean in [statistics.fmean(seed[key] for seed in seeds.values())]
        ]
        for base, seeds in found.items()
    ]
    return _table(["base", "seeds", *columns.values()], rows)


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.2f}"


LAMBADA = "lambada/exact"
# Study of a real model -> its measures: column -> (measure, form). Shares are in percent.
_EXAMS = {
    "ARC-easy": ("arc_easy/exam", _per_cent),
    "PIQA": ("piqa/exam", _per_cent),
    "OpenBookQA": ("openbook_qa/exam", _per_cent),
    "LAMBADA": (LAMBADA, _per_cent),
}
_WIKITEXT = {"WikiText-2, perplexity": ("wikitext/loss", _perplexity)}
BOOK = {
    "unread modules, perplexity": ("unread/loss", _perplexity),
    "top-1": ("unread/accuracy", _per_cent),
    "exam, read": ("read_modules/exam", _per_cent),
    "exam, unread": ("unread_modules/exam", _per_cent),
    **_EXAMS,
    **_WIKITEXT,
}
GERMAN = {
    "unread pages, perplexity": ("unread_pages/loss", _perplexity),
    "top-1": ("unread_pages/accuracy", _per_cent),
    "last words": ("last_words/exact", _per_cent),
    "translation": ("translation/exam", _per_cent),
    **_WIKITEXT,
    "its KL from the start": ("wikitext/kl_from_start", "{:.3f}".format),
    **_EXAMS,
}
# After the phases that follow CPT.
GERMAN_ALIGNED = {
    column: GERMAN[column]
    for column in (
        "translation",
        "ARC-easy",
        "PIQA",
        "unread pages, perplexity",
        *_WIKITEXT,
    )
}
# Measures of the phases after CPT, on holdout samples, which only their cells have.
_ALIGNED = {
    "instructions, perplexity": ("instructions/loss", _perplexity),
    "chosen answer preferred": ("preferences/pair_accuracy", _per_cent),
}
_MEASURED = ("evaluate", "cpt", "sft", "dpo")  # phases with a row
_Columns = dict[str, tuple[str, Callable[[float], str]]]


def real_table(records: list[Record], columns: _Columns, is_aligned: bool) -> str:
    """A study of a real model: a row for each arm and rate, or for each phase after it."""
    groups: dict[tuple[int, float, str], list[Record]] = {}
    for record in records:
        is_start = record["arm"] not in ARMS
        if "failed" not in record and (
            is_start or bool(record.get("align")) == is_aligned
        ):
            order = -1 if is_start else list(ARMS).index(record["arm"])
            key = order, record["rate"], _arm_and_rate(record)
            groups.setdefault(key, []).append(record)
    if is_aligned and len(groups) < 2:
        return _table([], [])
    columns = columns | _ALIGNED if is_aligned else columns
    rows = []
    for (order, _, name), found in sorted(groups.items(), key=lambda group: group[0]):
        for phase in found[0]["phases"]:
            if phase not in _MEASURED:
                continue
            after = [r["phases"][phase]["after"] for r in found]
            is_phase = is_aligned and order >= 0
            label = f"{name}: {phase.upper()}" if is_phase else name
            rows.append([label, str(len(found))] + [
                _mean_and_range([seed[key] for seed in after if key in seed], form)
                for key, form in columns.values()
            ])  # fmt: skip
    return _table(["arm, rate", "seeds", *columns], rows)


def _arm_and_rate(record: Record) -> str:
    """What names a run of a real model before a merge; a start has no rate."""
    if record["arm"] not in ARMS:
        return "start" if record.get("start", "start") else "four-bit file"
    arm = ARMS[record["arm"].removesuffix("_merged")]
    return f"{arm.label}, {record['rate']:g}"


def _mean_and_range(values: list[float], form: Callable[[float], str]) -> str:
    if not values:
        return ""
    mean = form(statistics.fmean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ({form(min(values))} to {form(max(values))})"


def real_changes_table(records: list[Record], columns: _Columns) -> str:
    """The changes of each exam and cloze of a real model in points, for the first seed.

    The interval is over questions, which are the same before and after.
    """
    first = [r for r in records if r["seed"] == 0 and "failed" not in r]
    starts = [
        p for r in first if _arm_and_rate(r) == "start" for p in r["phases"].values()
    ]
    start = next((phase for phase in starts if "questions" in phase), None)
    if start is None:
        return _table([], [])
    arms = [r for r in first if r["arm"] in ARMS and not r.get("align")]
    arms.sort(key=lambda r: (list(ARMS).index(r["arm"]), r["rate"]))
    shown = {
        key.partition("/")[0]: column
        for column, (key, _) in columns.items()
        if key.partition("/")[0] in start["questions"]
    }
    rows = []
    for record in arms:
        rows.append([_arm_and_rate(record)])
        for name in shown:
            ends = start, record["phases"]["cpt"]
            change = cells.change(*(phase["questions"][name] for phase in ends))
            rows[-1].append("{:+.1f} ({:+.1f} to {:+.1f})".format(*change))
    return _table(["arm, rate", *shown.values()], rows)


def real_merge_table(records: list[Record], columns: _Columns) -> str:
    """The merges of a real model: a row for each share, the start first."""
    rows = [
        [
            f"{ARMS[record['arm']].label}, {record['rate']:g}",
            f"{row['share']:g}",
            *(form(row[key]) if key in row else "" for key, form in columns.values()),
        ]
        for record in records
        if "failed" not in record
        for row in record["phases"].get("merge", {}).get("curve", ())
    ]
    return _table(["arm, rate", "share of the change", *columns], rows)


def aligned_table(records: list[Record], columns: _Columns) -> str:
    """The phases after CPT, with each number of samples; one row for the end of CPT.

    The change of the form is to plain CPT with the same rate, samples and phase.
    """
    found = {
        (r["rate"], list(ARMS).index(r["arm"]), r["samples"]): r["phases"]
        for r in records
        if "failed" not in r
    }
    rows = []
    for (rate, place, samples), phases in sorted(found.items()):
        arm = list(ARMS)[place]
        plain = found.get((rate, list(ARMS).index("plain"), samples), {})
        for name, phase in phases.items():
            if "answers" not in phase:
                continue
            form, right = (phase["answers"][key] for key in ("form", "right"))
            change = ""
            if arm != "plain" and name in plain:
                ends = plain[name]["answers"]["form"], form
                change = "{:+.1f} ({:+.1f} to {:+.1f})".format(*cells.change(*ends))
            rows.append([
                f"{ARMS[arm].label}, {rate:g}",
                name.upper() if samples else "CPT",
                str(samples) if samples else "",
                _per_cent(form.count("1") / len(form)),
                change,
                _per_cent(right.count("1") / len(right)),
                *(display(phase["after"][key]) for key, display in columns.values()),
            ])  # fmt: skip
    header = ["arm, rate", "after", "samples", "form", "against plain CPT", "right"]
    return _table([*header, *columns], rows)


# Base -> arm -> place of the label: kept, use, and the side of the label that is there.
_LABELS = {
    "chat": {
        "plain": (17, 44, "left"),
        "mixture_ntp": (24, 82, "left"),
        "mixture_lssd20": (76, 70, "left"),
        "ntp_kl": (61, 92, "right"),
        "mixture_lssd": (84, 8, "right"),
    },
    "documents": {
        "plain": (29, 1, "right"),
        "mixture_ntp": (27, 25, "left"),
        "mixture_lssd20": (53.5, 17, "left"),
        "ntp_kl": (36.5, 6.5, "right"),
        "mixture_lssd": (42, 6.6, "left"),
    },
    "narrow": {
        "plain": (31, 32, "right"),
        "mixture_ntp": (33, 66, "left"),
        "mixture_lssd20": (65, 62, "left"),
        "mixture_lssd": (74, 37, "right"),
    },
}


def draw(records: list[Record], base: str, shown: Callable[[str], str]) -> Any:
    """The arms of `figures.STYLES` as curves over learning rates, use against kept.

    Bars are 95 % intervals over seeds. Where use stays low, a second panel shows the lower
    part of the square.

    Args:
      records: of the study.
      base: its name.
      shown: see `figures.save_themes`, for which this draws.
    """
    tops = sorted({100, _top(base)}, reverse=True)
    pyplot = figures.pyplot()
    figure, axes = pyplot.subplots(
        1, len(tops), figsize=(6.2 * len(tops), 5.6), squeeze=False
    )
    for axis, top in zip(axes[0], tops, strict=True):
        for arm, style in figures.STYLES.items():
            found = list(curves(records, base, arm).values())
            if not found:
                continue
            label = _LABELS[base][arm] if top == tops[-1] else None
            _draw_curve(axis, found, style, label, shown)
        _label_axes(axis, base, top)
    figure.tight_layout()
    return figure


# The arms of the figure of ways to keep: kept, use and side of the label.
_KEEP_LABELS = {
    "plain": (21, 44, "left"),
    "mixture_ntp": (24, 82, "left"),
    "mixture_lssd20": (76, 70, "left"),
    "self_replay": (36, 62, "left"),
}


def draw_keep(records: list[Record], shown: Callable[[str], str]) -> Any:
    """Use against kept on the chat base, with and without general data; see `draw`."""
    figure, axis = figures.pyplot().subplots(figsize=(6.6, 5.2))
    for arm, (x, y, side) in _KEEP_LABELS.items():
        found = list(curves(records, "chat", arm, KEEP_RATES).values())
        if found:
            _draw_curve(axis, found, figures.STYLES[arm], (x, y, side), shown)
    merged = list(merge_curves(records, "plain_merged", RATE).values())
    if merged:
        style = figures.STYLES["plain_merged"]
        _draw_curve(axis, merged, style, (60, 30, "left"), shown)
    _label_axes(axis, "chat", 100)
    figure.tight_layout()
    return figure


def _draw_curve(
    axis,
    found,
    style: figures.Style,
    place: tuple[float, float, str] | None,
    shown: Callable[[str], str],
) -> None:
    """A curve with its bars, and its label, if any, at (kept, use, side)."""
    (kept, kept_bars), (use, use_bars) = _means_and_bars(found)
    color = shown(style.color)
    axis.errorbar(
        kept, use, xerr=kept_bars, yerr=use_bars, color=color,
        marker=style.marker, ms=6, lw=2, elinewidth=0.8,
    )  # fmt: skip
    if place is None:
        return
    x, y, side = place
    axis.text(
        x, y, style.label, color=color, ha=side, va="bottom",
        bbox={"color": axis.get_facecolor(), "alpha": 0.8, "pad": 1}, zorder=5,
    )  # fmt: skip


def draw_others(records: list[Record], base: str, shown: Callable[[str], str]) -> Any:
    """A panel for each arm that `draw` leaves out, with next-token prediction in grey."""
    arms = [a for a in ARMS if a not in figures.STYLES and curves(records, base, a)]
    columns = min(4, len(arms))
    rows = -(-len(arms) // columns)
    figure, axes = figures.pyplot().subplots(
        rows, columns, figsize=(3.1 * columns, 3.1 * rows), sharex=True, sharey=True,
        squeeze=False,
    )  # fmt: skip
    reference = list(curves(records, base, "mixture_ntp").values())
    for axis in axes.flat[len(arms) :]:
        axis.axis("off")
    for axis, arm in zip(axes.flat, arms, strict=False):
        kept, use = (means for means, _ in _means_and_bars(reference))
        axis.plot(kept, use, color="#BBBBBB", marker="^", ms=4, lw=1.5)
        found = list(curves(records, base, arm).values())
        (kept, kept_bars), (use, use_bars) = _means_and_bars(found)
        axis.errorbar(
            kept, use, xerr=kept_bars, yerr=use_bars, color=shown("#0072B2"),
            marker="o", ms=4, lw=1.5, elinewidth=0.7,
        )  # fmt: skip
        axis.set_title("\n".join(textwrap.wrap(ARMS[arm].label, 34)), fontsize=8)
        _label_axes(axis, base, _top(base))
        axis.label_outer()
    figure.tight_layout()
    return figure


def _means_and_bars(
    found: list[list[Point]],
) -> list[tuple[list[float], list[tuple[float, ...]]]]:
    """For the curves of all seeds: (means, (below, above)) of kept and of use, in percent.

    Kept and use are shares, so bars stay within 0 to 100.
    """
    parts = []
    for part in (0, 1):
        by_rate = zip(*found, strict=True)
        pairs = [interval([100 * p[part] for p in points]) for points in by_rate]
        below = tuple(min(half, mean) for mean, half in pairs)
        above = tuple(min(half, 100 - mean) for mean, half in pairs)
        parts.append(([mean for mean, _ in pairs], [below, above]))
    return parts


def _top(base: str) -> int:
    """The upper end of the axis of use, in percent."""
    return 100 if max(USE_LEVELS[base]) > 0.2 else 40


def _label_axes(axis, base: str, top: int) -> None:
    *_, kept, use = JUDGED[base]
    axis.set(xlim=(0, 100), ylim=(0, top))
    axis.set_xlabel(f"kept: {kept}")
    axis.set_ylabel(f"use: {use}")
    axis.grid(alpha=0.3)


def run_table(study: str, roles: Mapping[str, str] | None = None) -> str:
    """The measures of a one-run study before and after each phase, and its time.

    Args:
      study: its folder.
      roles: see `report.comparison`.
    """
    results = json.loads((FOLDER / study / "results.json").read_text())
    # The job "evaluate" repeats what the last training phase measured at its end.
    measured = {name: result for name, result in results.items() if name != "evaluate"}
    parts = [report_lib.comparison(measured, roles)]
    if any("seconds" in result for result in results.values()):
        parts.append(report_lib.wall_times(results))
    return "\n\n".join(parts)


def five_numbers() -> str:
    """What the quickstart learned and kept, without the rehearsed sources."""
    header, rule, *rows = run_table("quickstart", QUICKSTART_ROLES).splitlines()
    return "\n".join([header, rule, *rows[:5]])


# Columns of the quickstart's pilot.
_PILOT = {
    "domain, perplexity": "domain/perplexity",
    "domain": "domain/accuracy",
    "general, perplexity": "general/perplexity",
    "general": "general/accuracy",
    "last words": "cloze/exact",
    "exam": "general/exam",
}


def _pilot() -> list[dict]:
    return json.loads((FOLDER / "quickstart" / "pilot.json").read_text())["settings"]


def _pilot_cells(measured: Mapping[str, float], columns: Iterable[str]) -> list[str]:
    """Perplexities, and shares in percent."""
    values = {column: measured[_PILOT[column]] for column in columns}
    return [
        f"{value if 'perplexity' in column else 100 * value:.1f}"
        for column, value in values.items()
    ]


def pilot_table() -> str:
    """The settings of the quickstart's pilot, with both arms of each."""
    rows = []
    for setting in _pilot():
        place = (
            f"{setting['domain']}, {setting['rate']:g}, "
            f"{setting['steps']} x {setting['row_length']}"
        )
        for arm in ("before", "plain_cpt", "mixcpt"):
            rows.append([place, arm, *_pilot_cells(setting[arm], _PILOT)])
            place = ""
    return metrics.table(["domain, rate, steps x row", "arm", *_PILOT], rows)


def pilot_rates_table() -> str:
    """Both arms over the rates of the pilot, at one domain and length."""
    settings = [
        s
        for s in _pilot()
        if (s["domain"], s["steps"], s["row_length"]) == ("jax", 16, 128)
    ]
    settings.sort(key=lambda setting: setting["rate"])
    columns = ("domain, perplexity", "general, perplexity", "general", "exam")
    rows = [["", "before", *_pilot_cells(settings[0]["before"], columns)]]
    for arm in ("plain_cpt", "mixcpt"):
        rows += [
            [arm, f"{setting['rate']:g}", *_pilot_cells(setting[arm], columns)]
            for setting in settings
        ]
    return metrics.table(["arm", "rate", *columns], rows)


def blocks(records: list[Record]) -> dict[str, Callable[[], str]]:
    """Name of a block of a page -> the function that writes it."""
    book = cells.load(book_run.RESULTS)
    german = [r for r in cells.load(german_run.RESULTS) if r["arm"] != "start"]
    aligned = [r for r in german if r.get("trained")]
    german = [r for r in german if not r.get("trained")]
    # A merge repeats the measures of the cell that it merges.
    unmerged = [r for r in german if "merge" not in r.get("phases", ())]
    compared = {
        f"{base}-{name}": functools.partial(make, records, base)
        for base in JUDGED
        for name, make in (("constraint", constraint_table), ("swap", swap_table))
    }
    return compared | {
        "quickstart": lambda: run_table("quickstart", QUICKSTART_ROLES),
        "five-numbers": five_numbers,
        "quickstart-pilot": pilot_table,
        "quickstart-rates": pilot_rates_table,
        "anatomy": lambda: run_table("anatomy"),
        "bases": lambda: bases_table(records),
        "mixing": lambda: mixing_table(records),
        "chat": lambda: arms_table(records, "chat"),
        "chat-memory": lambda: memory_table(records, "chat"),
        "documents": lambda: arms_table(records, "documents"),
        "narrow": lambda: arms_table(records, "narrow"),
        "narrow-memory": lambda: memory_table(records, "narrow"),
        "documents-memory": lambda: memory_table(records, "documents"),
        "chat-alignment": lambda: alignment_table(records, "chat"),
        "documents-alignment": lambda: alignment_table(records, "documents"),
        "selection": lambda: selection_table(records),
        "shares": lambda: shares_table(records),
        "summary": lambda: summary(records, german),
        "keep": lambda: keep_table(records),
        "merge": lambda: merge_table(records),
        "high-rates": lambda: high_table(records),
        "budget": lambda: budget_table(records),
        "adaptive": lambda: adaptive_table(json.loads(adaptive.FILE.read_text())),
        "teacher": lambda: teacher_table(records),
        "confidence": lambda: confidence_table(json.loads(confidence.FILE.read_text())),
        "book": lambda: real_table(book, BOOK, is_aligned=False),
        "book-changes": lambda: real_changes_table(book, BOOK),
        "book-alignment": lambda: real_table(book, BOOK, is_aligned=True),
        "german-sentence": lambda: textwrap.fill(german_sentence(german), 88),
        "german-findings": lambda: german_findings(german),
        "german": lambda: real_table(unmerged, GERMAN, is_aligned=False),
        "german-changes": lambda: real_changes_table(unmerged, GERMAN),
        "german-merge": lambda: real_merge_table(german, GERMAN),
        "german-aligned": lambda: aligned_table(aligned, GERMAN_ALIGNED),
        "cost": lambda: cost_table(records, json.loads(cost.FILE.read_text())),
    }


def fill(text: str, records: list[Record]) -> str:
    """A page with its blocks written from the results.

    Raises:
      KeyError: a block of the page has no such name here.
    """
    made = blocks(records)

    def block(found: re.Match) -> str:
        name = found[1]
        return f"<!-- {name} -->\n\n{made[name]()}\n\n<!-- /{name} -->"

    return re.sub(r"<!-- ([\w-]+) -->.*?<!-- /\1 -->", block, text, flags=re.DOTALL)


def reproduced(records: list[Record], others: list[Record]) -> str:
    """The tables of the arms of other records, each below the same table of ours."""

    def key(record: Record) -> tuple[str, str, int]:
        return record["base"], record["arm"], record["seed"]

    keys = set(map(key, others))
    recorded = [record for record in records if key(record) in keys]
    return "\n\n".join(
        f"{base} base, {label}:\n\n{arms_table(found, base)}"
        for base in dict.fromkeys(record["base"] for record in others)
        for label, found in (("as recorded", recorded), ("as run here", others))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--beside", metavar="FOLDER", help="print, and write nothing")
    beside = parser.parse_args().beside
    records = cells.load(run.RESULTS)
    if beside:
        print(reproduced(records, cells.load(pathlib.Path(beside))))
        return
    for page in PAGES:
        page.write_text(fill(page.read_text(), records))
    german_figure.draw(cells.load(german_run.RESULTS), FOLDER / "german" / "german.png")
    plots = {"keep": functools.partial(draw_keep, records)}
    for base in JUDGED:
        plots[base] = functools.partial(draw, records, base)
        plots[f"{base}-others"] = functools.partial(draw_others, records, base)
    for name, plot in plots.items():
        figures.save_themes(plot, FOLDER / "controlled" / f"{name}.png")


if __name__ == "__main__":
    main()
