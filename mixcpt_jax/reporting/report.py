"""The report of a run: its table, curves and page."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from mixcpt_jax.core import paths
from mixcpt_jax.reporting import changes, page, run_records
from mixcpt_jax.runtime import metrics

TABLE_FILE = "report.md"

CURVES_FILE = "curves.png"

PAGE_FILE = "report.html"


def write(
    workdir: str, folders: dict[str, str], results: dict[str, dict[str, Any]]
) -> None:
    """Prints the table and writes it, with the curves and the page, to the workdir.

    Where no phase measures or trains, as in an export, there are none.

    Args:
      workdir: the run's folder.
      folders: phase -> its folder.
      results: phase -> what `train.run` returned.
    """
    folder = paths.absolute(workdir)
    paths.replace(folder / "report.json", paths.to_json(results, indent=2))
    arms = run_records.load([workdir])
    if any("after" in result for result in results.values()):
        names = changes.domain_names(arms, ())
        measured = {n for r in results.values() for n in changes.measured(r)}
        roles = {name: changes.role(name, arms, names) for name in measured}
        sentences = "\n".join(changes.verdict(arms))
        text = "\n\n".join(
            [
                comparison(results, roles),
                wall_times(results),
                *filter(None, [sentences]),
            ]
        )
        print(f"\n{text}\n")
        paths.replace(folder / TABLE_FILE, text + "\n")
    phases = {name: metrics.read(paths.absolute(f)) for name, f in folders.items()}
    trained = {
        name: rows for name, rows in phases.items() if any("loss" in r for r in rows)
    }
    if trained:
        _draw_curves(folder / CURVES_FILE, trained)
    if trained or any("after" in result for result in results.values()):
        paths.replace(folder / PAGE_FILE, page.render(arms))
        print(f"Report: {workdir}/{PAGE_FILE}")
        print(f"Talk to it: python -m mixcpt_jax chat --checkpoint={workdir}")
    print(f"Done; everything is in {workdir}")


def comparison(
    results: dict[str, dict[str, Any]], roles: Mapping[str, str] | None = None
) -> str:
    """One Markdown table: each measure before, and after each phase with its change.

    Phases that measure nothing, such as a selection, are left out.

    Args:
      results: phase -> its results.
      roles: of the texts and exams, see `changes.role`: the domain comes first, what is
        untouched next, and what is rehearsed last.
    """
    roles = roles or {}
    results = {name: r for name, r in results.items() if r.get("after")}
    before = next((r["before"] for r in results.values() if r["before"]), {})
    measured = set(before).union(*(r["after"] for r in results.values()))
    header = ["", "before"]
    for phase in results:
        header += [f"after {phase}", "change"]
    rows = []
    for suffix, label, form, change_form in page.MEASURES:
        for key in sorted(k for k in measured if k.endswith(f"/{suffix}")):
            name = key.removesuffix(f"/{suffix}")
            role = roles.get(name, "")
            row = [
                f"{changes.label(name, role) if role else name}: {label}",
                form.format(before[key]) if key in before else "",
            ]
            for result in results.values():
                if key not in result["after"]:
                    row += ["", ""]
                    continue
                after = result["after"][key]
                change = after - before[key] if key in before else None
                row += [
                    form.format(after),
                    "" if change is None else change_form.format(change),
                ]
            cells = [cell.replace("%", "") if i else cell for i, cell in enumerate(row)]
            rows.append((role, cells))
    order = {role: place for place, role in enumerate(changes.ROLES)}
    rows = [cells for _, cells in sorted(rows, key=lambda r: order.get(r[0], 0))]
    return metrics.table(header, rows)


def wall_times(results: dict[str, dict[str, Any]]) -> str:
    """How long each phase took, those that measure nothing too."""
    # What an older version finished may not say.
    times = [
        f"{name} {result['seconds']:.0f} s"
        for name, result in results.items()
        if "seconds" in result
    ]
    return f"Wall time: {', '.join(times)}."


def _draw_curves(path: epath.Path, phases: dict[str, list[dict[str, Any]]]) -> None:
    """Draws every phase's training curves over the steps, one panel per quantity."""
    # Imported here: only the end of a run needs it, and it is slow.
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = {
        "loss": "loss (the phase's own objective)",
        "ntp": "cross-entropy, nats",
        "correct": "top-1 token accuracy",
        "kd": "KL(teacher || student), nats",
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.2))
    for axis, (key, label) in zip(axes, panels.items(), strict=True):
        for phase, rows in phases.items():
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=phase)
        axis.set_xlabel("step")
        axis.set_title(label, fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)
