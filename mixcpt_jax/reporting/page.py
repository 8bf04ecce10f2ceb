"""One self-contained HTML page of runs: figures, tables, samples, settings.

The page is built only from the files of the runs, so it can be rebuilt at any time, also
while a run is in progress and for several runs together. A section whose files are missing
names them.
"""

import base64
import csv
import datetime
import functools
import hashlib
import io
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np

from mixcpt_jax import config as config_lib
from mixcpt_jax.core import paths
from mixcpt_jax.reporting import changes, figures, run_records
from mixcpt_jax.reporting.run_records import Arm
from mixcpt_jax.runtime import timing

# Suffix of the key in the results, label, format of a value and of a change.
MEASURES = (
    ("perplexity", "perplexity", "{:.2f}", "{:+.2f}"),
    ("accuracy", "token accuracy, %", "{:.1%}", "{:+.1%}"),
    ("exact", "exact match, %", "{:.1%}", "{:+.1%}"),
    ("exam", "exam, %", "{:.1%}", "{:+.1%}"),
    ("pair_accuracy", "chosen answer preferred, %", "{:.1%}", "{:+.1%}"),
    ("kl_from_start", "KL(start ‖ now), nats per token", "{:.4f}", "{:+.4f}"),
)
# Key of the metric, title, factor.
_CURVES = (
    ("loss", "Loss, the phase’s own objective", 1),
    ("ntp", "Cross-entropy, nats per token", 1),
    ("correct", "Top-1 token accuracy, %", 100),
    ("kd", "KL(teacher ‖ student), nats per token", 1),
    ("kd_lower_bound", "Lower bound of KL(teacher ‖ student), nats per token", 1),
    ("margin", "Reward margin of pairs", 1),
)
# Suffix of the key in the results, title, label of the axis, factor.
_CHANGES = (
    ("exam", "Exams", "change, points", 100),
    ("exact", "Exact match", "change, points", 100),
    ("accuracy", "Top-1 token accuracy", "change, points", 100),
    ("pair_accuracy", "Chosen answer preferred", "change, points", 100),
    ("loss", "Cross-entropy", "change, nats per token; lower is better", 1),
    ("kl_from_start", "KL(start ‖ now)", "nats per token; lower is better", 1),
)
# Suffix of the key in the results, title, factor.
_OF_MERGES = (
    ("/accuracy", "top-1 token accuracy, %", 100),
    ("/exam", "exams, %", 100),
    ("/kl_from_start", "KL(start ‖ now), nats per token", 1),
)
# Points of a curve.
_POINTS = 100
_TEMPLATE = "package:mixcpt_jax/assets/report.html"


class Page(NamedTuple):
    """A page.

    Attributes:
      html: the page, which needs no other file.
      data: the data of all its figures as CSV. The columns are the figure, the series in
        it, x, y, and the bounds of the 95 % interval of y where there is one.
    """

    html: str
    data: str


def render(arms: Sequence[Arm], domain: Sequence[str] = ()) -> Page:
    """Renders the page and the data of its figures.

    Args:
      arms: from `run_records.load`.
      domain: names of the texts and exams that are about the domain; empty: derived
        from the sources, see `changes.domain_names`.
    """
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["markup"] = jinja2.filters.do_mark_safe
    environment.filters["download"] = _download
    source = paths.require_file(_TEMPLATE).read_text()
    style, script = (_between(source, tag) for tag in ("style", "script"))
    with np.errstate(all="ignore"):  # measures of a diverged run overflow
        content = _content(arms, domain)
    html = environment.from_string(source).render(
        policy="default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"style-src {_hash(style)}; script-src {_hash(script)}",
        **content,
    )
    parts = ("planes", "merges", "curves", "mixtures", "swaps")
    entries = itertools.chain(
        *(content[part] for part in parts), content["changes"]["panels"]
    )
    return Page(html, _csv(entry["figure"] for entry in entries))


def _csv(shown: Iterable[figures.Figure]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["figure", "series", "x", "y", "low", "high"])
    for figure in shown:
        writer.writerows((figure.title, *row) for row in figure.rows)
    return text.getvalue()


def _download(figure: figures.Figure) -> str:
    """The address of a figure's data, which the page itself holds."""
    content = base64.b64encode(_csv([figure]).encode()).decode()
    return f"data:text/csv;charset=utf-8;base64,{content}"


def _content(arms: Sequence[Arm], domain: Sequence[str]) -> dict[str, Any]:
    """The values of the template."""
    domain_names = changes.domain_names(arms, domain)
    return dict(
        title=", ".join(dict.fromkeys(run_records.name_of(arm.run) for arm in arms)),
        arms=arms,
        style=figures.style,
        facts=[
            ("Outcome", "\n".join(changes.verdict(arms, domain))),
            ("Budget", "\n".join(changes.budgets(arms))),
            *_facts(arms),
        ],
        work=[_work(arm) for arm in arms],
        table=_table(arms, domain_names),
        planes=list(_planes(arms, domain_names)),
        merges=list(_merges(arms)),
        curves=[*_curves(arms), *_forecasts(arms)],
        mixtures=list(_mixtures(arms)),
        swaps=list(_swaps(arms)),
        changes=_changes(arms, domain_names),
        samples=_samples(arms),
        settings=_settings(arms),
        provenance=[(arm, list(_provenance(arm))) for arm in arms if arm.provenance],
    )


def _between(source: str, tag: str) -> str:
    return source.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]


def _hash(content: str) -> str:
    """The name of an inline style or script in a content security policy."""
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _facts(arms: Sequence[Arm]) -> Iterator[tuple[str, str]]:
    """Yields (name, text): the model, the text, the devices, the time."""

    def joined(values) -> str:
        return "; ".join(dict.fromkeys(v for v in values if v))

    environments = [arm.provenance.get("environment", {}) for arm in arms]
    models: dict[str, str] = {}
    for arm, environment in zip(arms, environments, strict=True):
        path = (arm.setting("model.path") or "").rstrip("/").split("/")[-1]
        size = environment.get("parameters")
        models.setdefault(path, path)
        if size:
            models[path] = f"{path}, {size / 1e6:,.1f} M parameters"
    yield "Model", joined(models.values())
    sources = (arm.setting("sources") or {} for arm in arms)
    yield (
        "Text",
        joined(
            f"{name}: {source.get('path', '').split('/')[-1]}"
            for entry in sources
            for name, source in entry.items()
            if source.get("weight")
        ),
    )
    yield "Devices", joined(e.get("devices", "") for e in environments)
    # Results have the seconds of the last start only.
    restarted = any(len({row["began"] for row in arm.timing}) > 1 for arm in arms)
    yield (
        "Time since the last start" if restarted else "Time",
        _duration(sum(arm.results.get("seconds", 0) for arm in arms)),
    )
    yield (
        "Goodput over all starts" if restarted else "Goodput",
        joined(
            f"{arm.name}: {shares}"
            for arm in arms
            if (shares := timing.describe(timing.spent(arm.timing)))
        ),
    )
    started = min((e["started"] for e in environments if "started" in e), default="")
    yield "Started", started.replace("T", " ").replace("+00:00", " UTC")


def _work(arm: Arm) -> dict[str, Any]:
    """A row of the table of phases."""

    def shown(value: Any, form: str) -> str:
        return form.format(value) if value else ""

    last = arm.steps[-1]["step"] if arm.steps else arm.after.get("step")
    total = "" if arm.results else arm.setting("train.num_steps")
    sizes = [arm.setting(f"data.{name}") or 0 for name in ("row_length", "batch_size")]
    return {
        "arm": arm,
        "objective": arm.objective,
        "starts": arm.starts_from or arm.setting("init_from") or "the model",
        "steps": shown(arm.trains and last, "{:,}") + shown(last and total, " of {:,}"),
        "tokens": shown(arm.trains and math.prod(sizes), "{:,}"),
        "learning_rate": shown(
            arm.trains and arm.setting("optimizer.learning_rate"), "{:g}"
        ),
        "rate": shown(arm.results.get("tokens_per_second"), "{:,.0f}"),
        "seconds": _duration(arm.results.get("seconds", 0)),
        "state": "done" if arm.results else "not finished",
    }


def _duration(seconds: float) -> str:
    """Such as "1:23:45"; empty for no duration or one of more than 30 years."""
    is_shown = 0 < seconds < 1e9
    return str(datetime.timedelta(seconds=round(seconds))) if is_shown else ""


def _table(arms: Sequence[Arm], domain: set[str]) -> dict[str, Any]:
    """Each measure at the start of a run, and after each phase with its change."""
    starts = changes.starts(arms)
    measured = [arm for arm in arms if arm.after]
    groups = []  # (run, its start, its phases)
    for run in dict.fromkeys(arm.run for arm in measured):
        start = starts[run].before if run in starts else {}
        of_run = [arm for arm in measured if arm.run == run]
        if groups and _without_step(start) == _without_step(groups[0][1]):
            groups[0][2].extend(of_run)
        else:
            groups.append((run, start, of_run))
    keys = set().union(*(arm.before | arm.after for arm in measured), set())
    rows = []
    roles = changes.roles(arms, domain)
    for key, name, label, form, change_form in measure_rows(keys, roles):
        cells = []
        for run, start, of_run in groups:
            cells.append(_cell(form, start.get(key), run, "before"))
            for arm in of_run:
                before, after = start.get(key), arm.after.get(key)
                cells.append(_cell(form, after, arm.name, "after"))
                change = None
                if before is not None and after is not None:
                    change = after - before
                kind = ""
                if change and not _may_be_chance(key, starts.get(arm.run), arm):
                    is_good = config_lib.lost(key, before, after) < 0
                    kind = "good" if is_good else "bad"
                cells.append(_cell(change_form, change, arm.name, "change", kind))
        rows.append((key, name, label, cells))
    header = []
    for run, _, of_run in groups:
        several = len(groups) > 1
        header.append(
            ("before" + (f", {run_records.name_of(run)}" if several else ""), None, 1)
        )
        header += [(f"after {arm.name}", arm, 2) for arm in of_run]
    return {"header": header, "rows": rows}


def _may_be_chance(key: str, start: Arm | None, arm: Arm) -> bool:
    """Whether the interval of a change includes zero."""
    key = key.replace("/perplexity", "/loss")
    found = changes.interval(key, start, arm)[0] if start else None
    return found is not None and found[0] <= 0 <= found[1]


def measure_rows(
    keys: Collection[str], roles: Mapping[str, str]
) -> Iterator[tuple[str, str, str, str, str]]:
    """The rows of a table of measures, sorted by role, then by kind of measure.

    Args:
      keys: of results, such as "general/accuracy"; keys that are not measures are left out.
      roles: name -> role, see `changes.role`; may lack names.

    Yields:
      (key, name with its role, label, format of a value, format of a change).
    """
    for role in (*changes.ROLES, None):
        for suffix, *forms in MEASURES:
            for key in sorted(k for k in keys if k.endswith(f"/{suffix}")):
                name = _name(key)
                if roles.get(name) == role:
                    yield key, changes.label(name, role or name), *forms


def _without_step(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in evaluation.items() if k != "step"}


def _cell(form, value, arm: str, what: str, kind: str = "") -> dict[str, str]:
    text = "" if value is None else form.format(value).replace("%", "")
    return {"text": text.replace("-", "−"), "arm": arm, "what": what, "kind": kind}


def _planes(arms: Sequence[Arm], domain: set[str]) -> Iterator[dict[str, Any]]:
    """The domain against untouched text and exams, one figure per kind of measure."""
    measured = [arm for arm in arms if arm.trains and arm.after]
    # Only measures that all arms have can be compared.
    shared = (
        set.intersection(*(set(arm.after) for arm in measured)) if measured else set()
    )
    roles = {key: changes.role(_name(key), arms, domain) for key in shared}

    def having(suffix: str, role: str) -> list[str]:
        return sorted(
            key for key in shared if key.endswith(f"/{suffix}") and roles[key] == role
        )

    for suffix in ("exam", "exact", "accuracy"):
        learned = having(suffix, "domain")
        # Only untouched measures show what the model has kept; rehearsed text is trained
        # on.
        kinds = dict.fromkeys((suffix, "accuracy"))
        kept_suffix = next((k for k in kinds if having(k, "untouched")), "")
        kept = having(kept_suffix, "untouched")
        if not learned or not kept:
            continue
        journeys = [
            figures.Journey(
                arm.number,
                arm.name,
                _place(_start_of(arm, arms), learned, kept),
                _place(arm.after, learned, kept),
            )
            for arm in measured
        ]
        x_label = f"{_names(learned)}: {changes.SHORT[suffix]}, %"
        y_label = f"{_names(kept)}: {changes.SHORT[kept_suffix]}, %"
        what = f"{x_label}, against {y_label}"
        of = ["mean of " if len(keys) > 1 else "" for keys in (learned, kept)]
        title = (
            f"{changes.SHORT[suffix].capitalize()} learned, "
            f"{changes.SHORT[kept_suffix]} kept"
        )
        yield {
            "figure": figures.Figure(
                title,
                figures.journeys(journeys, x_label, y_label, what),
                [row for journey in journeys for row in journey.rows],
            ),
            "caption": f"x: {of[0]}{_names(learned)} ({changes.SHORT[suffix]}). "
            f"y: {of[1]}{_names(kept)} ({changes.SHORT[kept_suffix]}; untouched).",
        }


def _place(
    evaluation: dict[str, Any], learned: Sequence[str], kept: Sequence[str]
) -> tuple[float, float] | None:
    """The means of two groups of measures in percent; None if a measure is missing."""
    if not all(key in evaluation for key in (*learned, *kept)):
        return None
    x, y = (100 * np.mean([evaluation[k] for k in keys]) for keys in (learned, kept))
    return float(x), float(y)


def _start_of(arm: Arm, arms: Sequence[Arm]) -> dict[str, Any]:
    """An arm's measures at its start: its own, the previous phase's or the run's."""
    earlier = (a.after for a in arms if (a.run, a.phase) == (arm.run, arm.starts_from))
    first = (a.before for a in arms if a.run == arm.run and a.before)
    return arm.before or next(earlier, {}) or next(first, {})


def _names(keys: Sequence[str]) -> str:
    return ", ".join(map(_name, keys))


def _name(key: str) -> str:
    return key.rpartition("/")[0]


def _merges(arms: Sequence[Arm]) -> Iterator[dict[str, Any]]:
    """For each merge, its measures over the share of the phase that is merged."""
    for arm in arms:
        curve = arm.results.get("curve", [])
        for suffix, title, factor in _OF_MERGES:
            names = sorted(_name(k) for k in set().union(*curve) if k.endswith(suffix))
            series = [
                figures.Series(
                    number,
                    name,
                    [
                        (row["share"], factor * row[key])
                        for row in curve
                        if (key := name + suffix) in row
                    ],
                )
                for number, name in enumerate(names)
            ]
            if series:
                title = f"{arm.name}: {title}"
                what = f"{title}, over the share"
                svg = figures.lines(series, what, "share of the phase", 0.0)
                yield {"figure": _of_lines(title, svg, series), "names": names}


def _of_lines(title: str, svg: str, series: Sequence[figures.Series]) -> figures.Figure:
    return figures.Figure(title, svg, [row for one in series for row in one.rows])


def _curves(arms: Sequence[Arm]) -> Iterator[dict[str, Any]]:
    for key, title, scale in _CURVES:
        series = [
            figures.Series(arm.number, arm.name, _curve(arm.steps, key, scale))
            for arm in arms
            if any(key in row for row in arm.steps)
        ]
        if series:
            svg = figures.lines(series, f"{title} over the steps")
            yield {"figure": _of_lines(title, svg, series)}


def _forecasts(arms: Sequence[Arm]) -> Iterator[dict[str, Any]]:
    """For each text, its KL from the start of the phase at every evaluation."""
    trained = [arm for arm in arms if arm.trains]
    rows = [row for arm in trained for row in arm.evaluations]
    keys = sorted({k for row in rows for k in row if k.endswith("/kl_from_start")})
    for key in keys:
        series = [
            figures.Series(arm.number, arm.name, _curve(arm.evaluations, key))
            for arm in trained
            if any(key in row for row in arm.evaluations)
        ]
        title = f"{_name(key)}: KL(start ‖ now), nats per token"
        svg = figures.lines(series, f"{title}, over the steps")
        yield {"figure": _of_lines(title, svg, series)}


def _curve(
    rows: Sequence[dict], key: str, scale: float = 1
) -> list[tuple[float, float]]:
    """At most `_POINTS` points, each the mean over neighboring steps."""
    points = np.array([(r["step"], scale * r[key]) for r in rows if key in r])
    parts = np.array_split(points, min(len(points), _POINTS))
    return [tuple(map(float, part.mean(axis=0))) for part in parts]


def _mixtures(arms: Sequence[Arm]) -> Iterator[dict[str, Any]]:
    for arm in arms:
        sources = [row for row in arm.results.get("mixture", []) if row["share_asked"]]
        if not sources:
            continue
        bars = [
            figures.Bar(row["name"], row["share_asked"], row["share_delivered"])
            for row in sources
        ]
        title = f"{arm.name}: shares of the mixture"
        yield {
            "arm": arm,
            "figure": figures.Figure(
                title,
                figures.bars(bars, title),
                [row for bar in bars for row in bar.rows],
            ),
            "rows": [
                {
                    "name": row["name"],
                    "requested": f"{row['share_asked']:.1%}".replace("%", ""),
                    "delivered": f"{row['share_delivered']:.1%}".replace("%", ""),
                    "samples": f"{row['documents']:,}",
                    "tokens": f"{row.get('loss_tokens', row.get('learnt_tokens', 0)):,}",
                    "epochs": f"{row['epochs']:.2f}" if "epochs" in row else "",
                }
                for row in sources
            ],
        }


def _swaps(arms: Sequence[Arm]) -> Iterator[dict[str, Any]]:
    for arm in arms:
        weights = [arm.setting("objective.lssd_weight")]
        weights += [
            s.get("lssd_weight") for s in (arm.setting("sources") or {}).values()
        ]
        names = [
            k.removesuffix("/swapped") for k in _keys(arm) if k.endswith("/swapped")
        ]
        if not names or (arm.config and not any(weights)):
            continue
        series = [
            figures.Series(number, name, _curve(arm.steps, f"{name}/swapped", 100))
            for number, name in enumerate(names)
        ]
        title = f"{arm.name}: swapped tokens, %"
        figure = _of_lines(title, figures.lines(series, title), series)
        yield {"arm": arm, "names": names, "figure": figure}


def _keys(arm: Arm) -> list[str]:
    return list(dict.fromkeys(key for row in arm.steps for key in row))


def _changes(arms: Sequence[Arm], domain: set[str]) -> dict[str, Any]:
    """The change of each measure since the start of its run, with intervals."""
    found = {
        arm.number: {c.key: c for c in changes.changes(arm, arms, domain)}
        for arm in arms
        if arm.trains
    }
    measured = [arm for arm in arms if found.get(arm.number)]
    methods, panels = set(), []
    for suffix, title, label, scale in _CHANGES:
        roles = {
            key: change.role
            for of_arm in found.values()
            for key, change in of_arm.items()
            if key.endswith(f"/{suffix}")
        }
        rows = []
        for key in sorted(roles, key=lambda k: (changes.ROLES.index(roles[k]), k)):
            dots = []
            for arm in measured:
                if change := found[arm.number].get(key):
                    methods.add(change.method)
                    bounds = change.interval and tuple(
                        scale * b for b in change.interval
                    )
                    dots.append(
                        figures.Whisker(
                            arm.number, arm.name, scale * change.difference, bounds
                        )
                    )
            rows.append((changes.label(_name(key), roles[key]), dots))
        if rows:
            svg = figures.whiskers(rows, f"{title}: change since the start", label)
            data_rows = [dot.row(name) for name, dots in rows for dot in dots]
            figure = figures.Figure(f"{title}: {label}", svg, data_rows)
            panels.append({"title": title, "figure": figure})
    return {"arms": measured, "panels": panels, "methods": sorted(methods - {""})}


def _samples(arms: Sequence[Arm]) -> dict[str, Any]:
    """Each prompt with its answer at the start of each run and after each phase."""
    sampled = [arm for arm in arms if arm.samples]
    runs = dict.fromkeys(arm.run for arm in sampled)
    prompts: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        of_run = [arm for arm in sampled if arm.run == run]
        for number, arm in enumerate(of_run):
            steps = {row["step"] for row in arm.samples}
            # The later phases of a run start from the end of the previous phase.
            shown = {max(steps)} | ({0} & steps if number == 0 else set())
            for row in arm.samples:
                if row["step"] not in shown:
                    continue
                is_start = row["step"] == 0 and arm.trains
                which = "start"
                if len(runs) > 1:
                    which += f" of {run_records.name_of(run)}"
                prompts.setdefault(json.dumps(row["messages"]), []).append(
                    {
                        "title": which if is_start else f"after {arm.name}",
                        "kind": "ink" if is_start else figures.style(arm.number),
                        "answer": row["answer"],
                    }
                )
    return {"prompts": [(json.loads(k), answers) for k, answers in prompts.items()]}


def _settings(arms: Sequence[Arm]) -> dict[str, Any]:
    """All settings by dotted key: those that differ from the defaults, and the others."""
    flat = [
        {k: v for k, v in _flatten(arm.config) if not k.startswith("overrides.")}
        for arm in arms
        if arm.config
    ]
    changed, others = [], []
    for key in dict.fromkeys(key for entry in flat for key in entry):
        values = [entry.get(key) for entry in flat]
        default = _default(key)
        row = (key, [_text(v) for v in values], len({_text(v) for v in values}) > 1)
        (others if all(v == default for v in values) else changed).append(row)
    return {
        "arms": [arm for arm in arms if arm.config],
        "changed": changed,
        "others": others,
    }


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _default(key: str) -> Any:
    """The default of a setting; None if there is no such setting."""
    kind, _, rest = key.removeprefix("eval.").partition(".")
    makers = dict.fromkeys(("sources", "texts", "pairs"), config_lib.source)
    makers["exams"] = config_lib.exam
    if kind in makers:
        return _defaults(makers[kind]).get(rest.partition(".")[2])
    return _defaults(config_lib.default).get(key)


@functools.cache
def _defaults(make: Callable) -> dict[str, Any]:
    return dict(_flatten(json.loads(make().to_json())))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _provenance(arm: Arm) -> Iterator[tuple[str, str]]:
    for part in ("start", "commits", "environment", "files"):
        for key, value in _flatten(arm.provenance.get(part, {})):
            yield f"{part} · {key}", _text(value)
