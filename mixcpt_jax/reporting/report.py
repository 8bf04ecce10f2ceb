"""The report of a run: its table and its page."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mixcpt_jax.core import paths
from mixcpt_jax.reporting import changes, page, run_records
from mixcpt_jax.runtime import lease, metrics, terminal

TABLE_FILE = "report.md"

PAGE_FILE = "report.html"


def write(workdir: str, results: dict[str, dict[str, Any]]) -> None:
    """Prints the table, and writes it and the page to the workdir.

    Runs that neither evaluate nor train, such as an export, have no table and no page.

    Args:
      workdir: the run's folder.
      results: phase -> its results.
    """
    folder = paths.absolute(workdir)
    lease.check(folder, must_ask=True)
    paths.replace(folder / "report.json", paths.to_json(results, indent=2))
    arms = run_records.load([workdir])
    if any("after" in result for result in results.values()):
        roles = changes.roles(arms, changes.domain_names(arms, ()))
        parts = comparison(results, roles), wall_times(results)
        sentences = "\n".join([*changes.budgets(arms), *changes.verdict(arms)])
        text = "\n\n".join([*parts, sentences]).rstrip()
        terminal.show(f"\n{text}\n")
        paths.replace(folder / TABLE_FILE, text + "\n")
    if any(arm.steps or arm.after for arm in arms):
        write_page(folder / PAGE_FILE, arms)
        terminal.show(f"Report: {paths.address(folder / PAGE_FILE)}")
        terminal.show(f"Chat: python -m mixcpt_jax chat --checkpoint={workdir}")
    terminal.show(f"Done. All files are in {workdir}")


def write_page(
    file: epath.Path, arms: Sequence[run_records.Arm], domain: Sequence[str] = ()
) -> None:
    """Writes the page, and the data of its figures beside it as CSV.

    Args:
      file: of the page.
      arms, domain: as for `page.render`.
    """
    html, data = page.render(arms, domain)
    paths.replace(file, html)
    paths.replace(file.with_suffix(".csv"), data)


def comparison(
    results: dict[str, dict[str, Any]], roles: Mapping[str, str] | None = None
) -> str:
    """A Markdown table: each measure before, and after each phase with its change.

    Phases without an evaluation, such as a selection, are left out.

    Args:
      results: phase -> its results.
      roles: name of a text or exam -> its role, see `changes.role`.
    """
    results = {name: r for name, r in results.items() if r.get("after")}
    before = next((r["before"] for r in results.values() if r["before"]), {})
    measured = set(before).union(*(r["after"] for r in results.values()))
    header = ["", "before"]
    for phase in results:
        header += [f"after {phase}", "change"]
    rows = []
    for key, name, label, form, change_form in page.measure_rows(measured, roles or {}):
        cells = [form.format(before[key]) if key in before else ""]
        for result in results.values():
            if key not in result["after"]:
                cells += ["", ""]
                continue
            after = result["after"][key]
            change = change_form.format(after - before[key]) if key in before else ""
            cells += [form.format(after), change]
        rows.append([f"{name}: {label}", *(cell.replace("%", "") for cell in cells)])
    return metrics.table(header, rows)


def wall_times(results: dict[str, dict[str, Any]]) -> str:
    """The wall time of each phase."""
    # Results of older versions may lack it.
    times = [
        f"{name} {result['seconds']:.0f} s"
        for name, result in results.items()
        if "seconds" in result
    ]
    return f"Wall time: {', '.join(times)}."
