"""Writes the numbers and plots of the README beside this file from the studies' results.

    python -m experiments.tables [--beside=FOLDER]

What stands between `<!-- NAME -->` and `<!-- /NAME -->` in the README is made here. With
`--beside` nothing is written: the arms of the controlled study whose results are in FOLDER
are printed as they are recorded, and as they are there.
"""

import argparse
import itertools
import json
import math
import pathlib
import re
import statistics
from collections.abc import Callable, Iterable

import numpy as np
from scipy import stats

from experiments import cells
from experiments.arms import ARMS
from experiments.book import run as book_run
from experiments.controlled import confidence, cost, run
from experiments.controlled.run import RATE, RATES
from mixcpt_jax import metrics
from mixcpt_jax import statistics as intervals

FOLDER = pathlib.Path(__file__).parent
KEPT_LEVEL = 0.9

Record = cells.Record
Point = tuple[float, float]

# What a base's arms are judged by: after which phase, by which measure of what is kept,
# and the names of kept and use.
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


def curves(records: Iterable[Record], base: str, arm: str) -> dict[int, list[Point]]:
    """Seed -> its (kept, use) points: the start, then the learning rates in order.

    The start is where every curve begins, at a rate of 0. A run that diverged keeps and
    knows nothing. Of seeds with all rates only.
    """
    starts: dict[int, Point] = {}
    found: dict[int, dict[float, Point]] = {}
    for record in records:
        if record["base"] != base or record["share"] or record["rule"] != "first":
            continue
        if record["arm"] == "base":
            after = record["phases"]["base"]["after"]
            starts[record["seed"]] = after[JUDGED[base][1]], after["domain_use/exact"]
        elif record["arm"] == arm:
            point = (0.0, 0.0) if "failed" in record else judge(record)
            points = found.setdefault(record["seed"], {})
            if record["rate"] in points:
                raise ValueError(f"{base}, {arm}: two records of rate {record['rate']}")
            points[record["rate"]] = point
    return {
        seed: [starts[seed], *(points[rate] for rate in RATES)]
        for seed, points in sorted(found.items())
        if set(points) == set(RATES)
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

    0 where the curve never keeps so much.
    """
    best = max((y for x, y in points if x >= level), default=0.0)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if (x0 - level) * (x1 - level) < 0:
            best = max(best, y0 + (level - x0) / (x1 - x0) * (y1 - y0))
    return best


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of the 95 % interval of it over seeds (Student's t)."""
    if len(values) < 3:  # of two seeds it says next to nothing
        return statistics.fmean(values), float("nan")
    error = statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), float(stats.t.ppf(0.975, len(values) - 1)) * error


def _cell(shares: list[float], is_difference: bool = False) -> str:
    """Shares in per cent, with their interval where there is one."""
    if not shares:
        return ""
    mean, half = interval([100 * share for share in shares])
    if half != half:
        return f"{mean:.1f}"
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
    reference = curves(records, base, "mixture_ntp")
    rows = []
    for arm in ARMS:
        found = curves(records, base, arm)
        if not found:
            continue
        areas = {seed: hypervolume(points) for seed, points in found.items()}
        gains = [
            area - hypervolume(reference[seed])
            for seed, area in areas.items()
            if seed in reference
        ]
        at_rates = [
            [
                statistics.fmean(points[i][part] for points in found.values())
                for part in (1, 0)
            ]
            for i in range(1, len(RATES) + 1)
        ]
        rows.append(
            (
                statistics.fmean(areas.values()),
                [
                    ARMS[arm].label,
                    str(len(found)),
                    _cell(list(areas.values())),
                    "" if arm == "mixture_ntp" else _cell(gains, True),
                    _cell([use_at(points, KEPT_LEVEL) for points in found.values()]),
                    *(f"{100 * use:.0f} / {100 * kept:.0f}" for use, kept in at_rates),
                ],
            )
        )
    header = ["arm", "seeds", "area", "area over mixture NTP"]
    header += [f"use at {KEPT_LEVEL:.0%} kept", *(f"{rate:g}" for rate in RATES)]
    rows.sort(key=lambda row: -row[0])
    return _table(header, [row for _, row in rows])


def bases_table(records: list[Record]) -> str:
    """What the bases know before an arm begins."""
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
    """What else changes at the rate at which the arms are aligned."""
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


def _at_rate(records: list[Record], base: str, arm: str) -> list[Record]:
    return [
        r
        for r in records
        if (r["base"], r["arm"], r["rate"], r["rule"]) == (base, arm, RATE, "first")
        and not r["share"]
        and "failed" not in r
    ]


def alignment_table(records: list[Record], base: str) -> str:
    """After each phase: answers in the chat format, of domain people and untold ones."""
    rows = []
    for arm in ARMS:
        found = [r for r in _at_rate(records, base, arm) if r["align"] == "dpo"]
        for phase in ("sft", "dpo") if found else ():
            results = [r["phases"][phase] for r in found]
            rows.append(
                [
                    f"{ARMS[arm].label}: {phase.upper()}",
                    str(len(found)),
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
    """What a step of each arm costs that was run, in brackets beside plain CPT's."""
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
    """How sure the bases are of what they cannot know."""
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


# What is measured of the model that read a book: column -> (measure, form). Exams and
# clozes in per cent.
_BOOK = {
    "unread modules, perplexity": ("unread/loss", _perplexity),
    "top-1": ("unread/accuracy", _per_cent),
    "exam, read": ("read_modules/exam", _per_cent),
    "exam, unread": ("unread_modules/exam", _per_cent),
    "ARC-easy": ("arc_easy/exam", _per_cent),
    "PIQA": ("piqa/exam", _per_cent),
    "OpenBookQA": ("openbook_qa/exam", _per_cent),
    "LAMBADA": ("lambada/exact", _per_cent),
    "WikiText-2, perplexity": ("wikitext/loss", _perplexity),
}
# What the phases after it are for, on held-out samples, which only their cells have.
_BOOK_ALIGNED = {
    "instructions, perplexity": ("instructions/loss", _perplexity),
    "chosen answer likelier": ("preferences/pair_accuracy", _per_cent),
}


def book_table(records: list[Record], is_aligned: bool) -> str:
    """The book study: a row for each arm and rate, or for each phase after it."""
    groups: dict[tuple[str, float], list[Record]] = {}
    for record in records:
        is_start = record["arm"] == "start"
        if "failed" not in record and (is_start or bool(record["align"]) == is_aligned):
            groups.setdefault((record["arm"], record["rate"]), []).append(record)
    if is_aligned and len(groups) < 2:
        return _table([], [])
    order = ["start", *ARMS]
    columns = _BOOK | _BOOK_ALIGNED if is_aligned else _BOOK
    rows = []
    for arm, rate in sorted(groups, key=lambda key: (order.index(key[0]), key[1])):
        found = groups[arm, rate]
        name = f"{ARMS[arm].label}, {rate:g}" if arm in ARMS else arm
        for phase in found[0]["phases"]:
            after = [r["phases"][phase]["after"] for r in found if phase != "select"]
            if not after:
                continue
            label = f"{name}: {phase.upper()}" if is_aligned and arm in ARMS else name
            rows.append([label, str(len(found))] + [
                _mean_and_range([seed[key] for seed in after if key in seed], form)
                for key, form in columns.values()
            ])  # fmt: skip
    return _table(["arm, rate", "seeds", *columns], rows)


def _mean_and_range(values: list[float], form: Callable[[float], str]) -> str:
    if not values:
        return ""
    mean = form(statistics.fmean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ({form(min(values))} to {form(max(values))})"


def book_changes_table(records: list[Record]) -> str:
    """What each arm changed of each exam of the book study, in points, the first seed.

    The interval is over questions, which are the same before and after.
    """
    first = [r for r in records if r["seed"] == 0 and "failed" not in r]
    start = next((r for r in first if r["arm"] == "start"), None)
    if start is None:
        return _table([], [])
    (start_phase,) = start["phases"].values()
    arms = [r for r in first if r["arm"] in ARMS and not r["align"]]
    arms.sort(key=lambda r: (list(ARMS).index(r["arm"]), r["rate"]))
    columns = {
        key.partition("/")[0]: column
        for column, (key, _) in _BOOK.items()
        if key.partition("/")[0] in start_phase["questions"]
    }
    rows = []
    for record in arms:
        rows.append([f"{ARMS[record['arm']].label}, {record['rate']:g}"])
        for name in columns:
            before_N, after_N = (
                np.array(list(phase["questions"][name]), int)
                for phase in (start_phase, record["phases"]["cpt"])
            )
            low, high = intervals.change_of_share(before_N, after_N)
            change = after_N.mean() - before_N.mean()
            rows[-1].append(
                f"{100 * change:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
            )
    return _table(["arm, rate", *columns.values()], rows)


def draw(records: list[Record], base: str, path: pathlib.Path) -> None:
    """Curves over learning rates, use against kept, with 95 % intervals over seeds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.5, 5))
    for arm in ARMS:
        found = list(curves(records, base, arm).values())
        if not found:
            continue
        at_rates = [
            [interval([100 * points[i][part] for points in found]) for part in (0, 1)]
            for i in range(len(RATES) + 1)
        ]
        (x, x_half), (y, y_half) = (
            zip(*(rate[part] for rate in at_rates), strict=True) for part in (0, 1)
        )
        axis.errorbar(
            x, y, xerr=x_half, yerr=y_half, marker="o", ms=4, lw=1.3, elinewidth=0.6,
            label=ARMS[arm].label,
        )  # fmt: skip
    *_, kept, use = JUDGED[base]
    axis.set_xlabel(f"kept: {kept}")
    axis.set_ylabel(f"use: {use}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


def blocks(records: list[Record]) -> dict[str, Callable[[], str]]:
    """Name of a block in the README -> what makes it."""
    book = cells.load(book_run.RESULTS)
    return {
        "bases": lambda: bases_table(records),
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
        "confidence": lambda: confidence_table(json.loads(confidence.FILE.read_text())),
        "book": lambda: book_table(book, is_aligned=False),
        "book-changes": lambda: book_changes_table(book),
        "book-alignment": lambda: book_table(book, is_aligned=True),
        "cost": lambda: cost_table(records, json.loads(cost.FILE.read_text())),
    }


def fill(text: str, records: list[Record]) -> str:
    """The README with its blocks made anew."""
    for name, make in blocks(records).items():
        block = f"<!-- {name} -->\n\n{make()}\n\n<!-- /{name} -->"
        pattern = rf"<!-- {name} -->.*?<!-- /{name} -->"
        text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
    return text


def reproduced(records: list[Record], others: list[Record]) -> str:
    """The tables of arms of other records, each under that of the same in ours."""

    def key(record: Record) -> tuple[str, str, int]:
        return record["base"], record["arm"], record["seed"]

    wanted = set(map(key, others))
    recorded = [record for record in records if key(record) in wanted]
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
    readme = FOLDER / "README.md"
    readme.write_text(fill(readme.read_text(), records))
    for base in JUDGED:
        if any(curves(records, base, arm) for arm in ARMS):
            draw(records, base, FOLDER / "controlled" / f"{base}.png")


if __name__ == "__main__":
    main()
