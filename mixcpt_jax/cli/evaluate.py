"""Measures a model, or two on the same items.

    python -m mixcpt_jax evaluate --checkpoint=RUN --tasks NAME=PATH ...
        [--compare=OTHER] [--limit=N] [--output=results.json]

measures a model outside a run, with 95 % intervals, and compares it with a second model on
the same items. RUN and OTHER are workdirs of runs, phases' folders, Hugging Face folders,
GGUF files or earlier files of `--output`. `data/tasks.py` describes tasks.
"""

import argparse
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mixcpt_jax.cli import command
from mixcpt_jax.core import paths
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.runtime import terminal

if TYPE_CHECKING:
    from mixcpt_jax.data import tasks

_ROW_LENGTH = 1024


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
    print(evaluator.describe(result))
    if arguments.compare:
        print(f"\n{evaluator.describe(sides[1])}")
        result["compared_with"] = sides[1]
        result["comparison"] = evaluator.compare(*sides, arguments.seed)
        print(f"\n{evaluator.describe_comparison(result)}")
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
    """Tokens to which documents are cut: one length for all compared models."""
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
    try:
        result = json.loads(paths.require_file(path).read_text())
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    match result:
        case {
            "checkpoint": str(),
            "dtype": str(),
            "row_length": int(),
            "tasks": dict(tasks),
        }:
            for name, task in tasks.items():
                _check_items(path, name, task)
            return result
    raise InputError(f"{path}: not what --output wrote; name one of these, or a RUN")


def _check_items(path: str, name: str, task: Any) -> None:
    """Checks that every item of a task has a finite number in each column."""
    items = task.get("items") if isinstance(task, dict) else None
    columns = items.items() if isinstance(items, dict) else [("items", None)]
    lengths = set()
    for key, column in columns:
        values = column if isinstance(column, list) else [None]
        lengths.add(len(values))
        for number, value in enumerate(values, 1):
            scores = value if key == "log_likelihoods" else [value]
            if not isinstance(scores, list) or not all(map(_is_finite, scores)):
                raise InputError(
                    f"{path}: task {name}: {key} of item {number} is {value!a:.40}, a "
                    "finite number is wanted; measure it anew"
                )
    if len(lengths) > 1:
        raise InputError(
            f"{path}: task {name}: its columns have {min(lengths)} to {max(lengths)} "
            "items; measure it anew"
        )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def start() -> None:
    """Runs the command from the command line."""
    command.explained(main)
