"""Measures a model, or two on the same items.

    python -m mixcpt_jax evaluate --checkpoint=RUN --tasks NAME=PATH ...
        [--compare=OTHER] [--limit=N] [--output=results.json]

measures a model outside a run, with 95 % intervals, and compares it with a second model on
the same items. RUN and OTHER are workdirs of runs, phases' folders, Hugging Face folders,
models of the Hub (ORG/NAME), GGUF files or earlier files of `--output`. `data/tasks.py`
describes tasks.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mixcpt_jax.cli import command
from mixcpt_jax.core import paths, small_files
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.core.small_files import MOST_BYTES_OF_ROWS
from mixcpt_jax.runtime import terminal

if TYPE_CHECKING:
    from mixcpt_jax.data import tasks

_ROW_LENGTH = 1024
# The part of the `--output` file that is read again.
_RESULTS = {
    "checkpoint": str,
    "dtype": str,
    "row_length": int,
    "tasks": {
        str: {
            "kind": str,
            "fingerprint": str,
            "tokens?": str,
            "measures": {str: {"value": float, "low": float, "high": float}},
            "items": {"log_likelihoods?": [[float]], str: [float]},
        }
    },
}


def main() -> None:
    arguments = _parse()
    output = arguments.output and paths.output_file(arguments.output)
    # Imported here so that --help does not wait for jax.
    from mixcpt_jax.data import tasks
    from mixcpt_jax.evaluation import evaluator

    places = [arguments.checkpoint] + [arguments.compare] * bool(arguments.compare)
    read = [tasks.read(setting, arguments.limit) for setting in arguments.tasks]
    names = [task.name for task in read]
    if len(set(names)) < len(names):
        raise InputError(
            f"--tasks: two tasks have the same name in {names}; name them as NAME=PATH"
        )
    arguments.row_length = _row_length(places, arguments.row_length)
    sides = [_measure_place(place, read, arguments) for place in places]
    result = sides[0]
    terminal.show(evaluator.describe(result))
    if arguments.compare:
        terminal.show(f"\n{evaluator.describe(sides[1])}")
        result["compared_with"] = sides[1]
        result["comparison"] = evaluator.compare(*sides, arguments.seed)
        terminal.show(f"\n{evaluator.describe_comparison(result)}")
    if output:
        paths.replace(output, paths.to_json(result, indent=1))


def _parse() -> argparse.Namespace:
    parser = command.parser("evaluate", __doc__)
    add = parser.add_argument
    add(
        "--checkpoint", required=True, metavar="RUN", help="or an earlier --output file"
    )
    add("--compare", default="", metavar="OTHER", help="a second model")
    add(
        "--tasks",
        nargs="+",
        action="extend",
        default=[],
        metavar="TASK",
        help="PATH, NAME=PATH or NAME:KIND=PATH; kinds: text, choice, cloze",
    )
    add(
        "--limit",
        type=command.count,
        default=0,
        help="items of each task, the first; 0: all",
    )
    add(
        "--row_length",
        type=command.row_length,
        default=0,
        help="tokens to which documents are cut; default: 1024, or that of an earlier "
        "--output file",
    )
    add("--batch_size", type=command.batch_size, default=8, help="rows at a time")
    add("--seed", type=command.seed, default=0, help="of the bootstrap")
    add("--dtype", default="", help="float32 (default on CPUs) or bfloat16 (elsewhere)")
    add("--output", default="", help="a JSON file for the results and each item")
    return parser.parse_args()


def _row_length(places: Sequence[str], asked: int) -> int:
    """The length to which documents are truncated: one for all compared models."""
    from mixcpt_jax.evaluation import load_model

    earlier = [_read_results(p)["row_length"] for p in places if p.endswith(".json")]
    contexts = [load_model.context(p) for p in places if not p.endswith(".json")]
    length = asked or (earlier[0] if earlier else _ROW_LENGTH)
    if contexts and min(contexts) < length:
        length = min(contexts)
        terminal.say(f"documents are cut to {length} tokens, the shortest context")
    return length


def _measure_place(
    place: str, read: "Sequence[tasks.Task]", arguments: argparse.Namespace
) -> dict[str, Any]:
    if place.endswith(".json"):
        return _read_results(place)
    if not read:
        raise InputError(
            "--tasks: is missing; name tasks, as in --tasks exam=exam.jsonl"
        )
    names = ", ".join(task.name for task in read)
    from mixcpt_jax.evaluation import evaluator, load_model

    terminal.say(f"reading {place}, then measuring {names}")
    trained = load_model.load(place, arguments.dtype)
    settings = arguments.row_length, arguments.batch_size, arguments.seed
    return evaluator.measure_tasks(trained, read, *settings)


def _read_results(path: str) -> dict[str, Any]:
    file = paths.require_file(path)
    remedy = "name what --output wrote, or a RUN"
    result = small_files.read_json(file, _RESULTS, remedy, MOST_BYTES_OF_ROWS)
    from mixcpt_jax.data import tasks

    if not 0 < result["row_length"] < 2**31:
        raise InputError(
            f"{path}: row_length is {result['row_length']}, must be > 0 and < 2^31; "
            f"{remedy}"
        )
    for name, task in result["tasks"].items():
        if task["kind"] not in tasks.MEASURES:
            raise InputError(
                f"{path}: task {name!a}: its kind {task['kind']!a:.80} must be one of "
                f"{', '.join(tasks.MEASURES)}; evaluate it again"
            )
        lengths = sorted(map(len, task["items"].values()))
        if not lengths or not 0 < lengths[0] == lengths[-1]:
            raise InputError(
                f"{path}: task {name!a}: its columns must have a number for each item, "
                f"they have {lengths!s:.80}; evaluate it again"
            )
    return result


def start() -> None:
    """Runs the command from the command line."""
    command.run(main)
