"""Writes the report page of a run, or one page that compares several runs.

    python -m mixcpt_jax report RUN [RUN ...] [--output=report.html]
        [--domain=NAME,NAME] [--open]

A run may still be in progress. RUN is a workdir, or a copy of a run's `report.json`. The
page is one file that needs no server. The data of its figures go to a CSV file beside it.
`--open` shows the page in the browser, if this machine has a display.
"""

import os
import sys
import webbrowser

from mixcpt_jax.cli import command
from mixcpt_jax.core import paths
from mixcpt_jax.reporting import report, run_records
from mixcpt_jax.reporting.report import PAGE_FILE
from mixcpt_jax.runtime import terminal


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = command.parser("report", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a workdir")
    parser.add_argument(
        "--output",
        help="the file to write; default: report.html in the workdir of the run, or in "
        "the current folder for several runs",
    )
    parser.add_argument(
        "--domain",
        default="",
        help="names of the texts and exams that are about the domain, comma-separated; "
        "default: the sources of documents",
    )
    parser.add_argument(
        "--open", action="store_true", help="show the page in the browser"
    )
    given = parser.parse_args(arguments)
    output = given.output or PAGE_FILE
    if (
        not given.output
        and len(given.runs) == 1
        and not given.runs[0].endswith(".json")
    ):
        output = f"{given.runs[0]}/{PAGE_FILE}"
    arms = run_records.load(given.runs)
    file = paths.output_file(output)
    report.write_page(file, arms, [name for name in given.domain.split(",") if name])
    terminal.show(f"Report: {paths.address(file)}")
    if given.open and not paths.is_remote(file) and _has_display():
        webbrowser.open(paths.address(file))


def _has_display() -> bool:
    is_desktop = sys.platform in ("darwin", "win32")
    return is_desktop or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))


def start() -> None:
    """Runs the command from the command line."""
    command.run(main)
