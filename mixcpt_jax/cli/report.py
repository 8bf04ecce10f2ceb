"""Writes the report page of a run, or one page that compares several runs.

    python -m mixcpt_jax report RUN [RUN ...] [--output=report.html]
        [--domain=NAME,NAME]

A run may still be in progress. RUN is a workdir, or a copy of a run's `report.json`.
"""

from mixcpt_jax.cli import command
from mixcpt_jax.core import paths
from mixcpt_jax.reporting import page, run_records
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
    text = page.render(arms, [name for name in given.domain.split(",") if name])
    paths.replace(file, text)
    terminal.show(f"Written to {output}")


def start() -> None:
    """Runs the command from the command line."""
    command.run(main)
