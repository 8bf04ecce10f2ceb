"""The commands of the paper's experiment, and the table of its results.

    python -m experiments.paper commands --workdir=gs://BUCKET/paper
    python -m experiments.paper table --workdir=runs/paper

`commands` prints a line to train and a line to evaluate each arm of each model and domain;
`table` reads what the evaluations wrote, `ARM/lm_eval.json`, and prints a row per
capability, with the mean of its tasks. `docs/reproduce.md` explains both.
"""

import argparse
import itertools
import pathlib
from collections.abc import Mapping, Sequence

from configs import paper
from mixcpt_jax.core import paths, small_files
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.runtime import metrics

# Tasks of lm-eval. The paper has seven capabilities and seventeen benchmarks; which ones is
# not public as far as we know, so all of these are our choice. Task -> its measure.
CAPABILITIES: dict[str, dict[str, str]] = {
    "knowledge": {
        "mmlu": "acc,none",
        "triviaqa": "exact_match,remove_whitespace",
        "nq_open": "exact_match,remove_whitespace",
    },
    "common sense": {
        "hellaswag": "acc_norm,none",
        "winogrande": "acc,none",
        "piqa": "acc_norm,none",
        "commonsense_qa": "acc,none",
    },
    "reasoning": {
        "bbh": "exact_match,get-answer",
        "arc_challenge": "acc_norm,none",
    },
    "reading": {"boolq": "acc,none", "race": "acc,none"},
    "mathematics": {
        "gsm8k": "exact_match,strict-match",
        "minerva_math": "exact_match,none",
    },
    "code": {"humaneval": "pass@1,create_test", "mbpp": "pass_at_1,none"},
    "instructions and truth": {
        "ifeval": "prompt_level_strict_acc,none",
        "truthfulqa_mc2": "acc,none",
    },
}
RESULTS_FILE = "lm_eval.json"
_SHAPE = {"results": {str: {str: object}}}


def names() -> list[str]:
    """Every model, domain and arm, as the variant of `configs/paper.py`."""
    return [
        ",".join(chosen)
        for chosen in itertools.product(paper.MODELS, paper.DOMAINS, paper.ARMS)
    ]


def commands(workdir: str, slice_name: str) -> list[str]:
    """A command to train and a command to evaluate each of `names`."""
    tasks = ",".join(task for tasks in CAPABILITIES.values() for task in tasks)
    lines = []
    for name in names():
        folder = f"{workdir}/{name.replace(',', '-')}"
        lines += [
            f"python -m mixcpt_jax.main --config=configs/paper.py:{name},{slice_name} "
            f"--distributed --workdir={folder}",
            f"python -m mixcpt_jax lm-eval --checkpoint={folder} --tasks={tasks} "
            f"--output={folder}/{RESULTS_FILE}",
        ]
    return lines


def table(
    folders: Sequence[str],
    capabilities: Mapping[str, Mapping[str, str]] = CAPABILITIES,
) -> str:
    """A row per capability and a column per folder, in percent.

    Args:
      folders: workdirs with a file of `lm-eval --output`.
      capabilities: name -> task -> key of its measure in that file.

    Raises:
      InputError: a file is missing, or lacks a task or a measure.
    """
    found = [_read(folder, capabilities) for folder in folders]
    columns = [pathlib.PurePath(folder).name for folder in folders]
    rows = []
    for capability, tasks in capabilities.items():
        means = [sum(values[task] for task in tasks) / len(tasks) for values in found]
        rows.append([capability, *(f"{100 * mean:.1f}" for mean in means)])
    every = [sum(values.values()) / len(values) for values in found]
    rows.append(["all tasks", *(f"{100 * mean:.1f}" for mean in every)])
    return metrics.table(["", *columns], rows)


def _read(
    folder: str, capabilities: Mapping[str, Mapping[str, str]]
) -> dict[str, float]:
    file = paths.require_file(f"{folder}/{RESULTS_FILE}", "run `lm-eval` first")
    remedy = "run `lm-eval` with all tasks again"
    bound = small_files.MOST_BYTES_OF_ROWS
    results = small_files.read_json(file, _SHAPE, remedy, bound)["results"]
    values = {}
    for task, measure in itertools.chain(*(t.items() for t in capabilities.values())):
        value = results.get(task, {}).get(measure)
        if not isinstance(value, int | float):
            raise InputError(f"{file}: task {task} has no {measure}; {remedy}")
        values[task] = float(value)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("commands", "table"))
    parser.add_argument("--workdir", default="runs/paper")
    parser.add_argument("--slice", default="v5e-64", choices=paper.SLICES)
    arguments = parser.parse_args()
    if arguments.what == "commands":
        print("\n".join(commands(arguments.workdir, arguments.slice)))
        return
    root = paths.absolute(arguments.workdir)
    folders = sorted(str(file.parent) for file in root.glob(f"*/{RESULTS_FILE}"))
    if not folders:
        raise SystemExit(f"{root}: no folder in it has a {RESULTS_FILE}")
    print(table(folders))


if __name__ == "__main__":
    main()
