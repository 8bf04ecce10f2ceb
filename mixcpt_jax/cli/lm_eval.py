"""EleutherAI's lm-evaluation-harness on a model of ours, computed in JAX.

    python -m mixcpt_jax lm-eval --checkpoint=RUN --tasks=NAME,... [--include_path=FOLDER]
        [--limit=N] [--num_fewshot=K] [--apply_chat_template] [--output=results.json]

RUN is the workdir of a run, a phase's folder, a Hugging Face folder, a model of the Hub
(ORG/NAME) or a GGUF file; tasks are the harness's own, or YAML files under
`--include_path`. Needs the package `lm-eval`. In Python the model is
`lm_eval_adapter.Model`.
"""

import argparse

from mixcpt_jax.cli import command
from mixcpt_jax.core import paths
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.runtime import terminal


def main() -> None:
    arguments = _parse()
    output = arguments.output and paths.output_file(arguments.output)
    # Imported here so that --help waits neither for the harness nor for jax.
    try:
        import lm_eval
        from lm_eval import tasks, utils
    except ImportError as error:
        raise InputError(f"{error}; run `pip install lm-eval`") from error
    from mixcpt_jax.evaluation import lm_eval_adapter

    manager = tasks.TaskManager(include_path=arguments.include_path or None)
    names = [name for name in arguments.tasks.split(",") if name]
    for name in names:
        if not manager.match_tasks([name]):
            raise InputError(
                f"--tasks: the harness has no task {name!r}; name the folder of its YAML "
                "file with --include_path"
            )
    model = lm_eval_adapter.Model(
        arguments.checkpoint,
        arguments.batch_size,
        arguments.max_length or None,
        arguments.dtype,
    )
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=manager.match_tasks(names),
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit or None,
        apply_chat_template=arguments.apply_chat_template,
        task_manager=manager,
    )
    terminal.show(utils.make_table(results))
    if results.get("groups"):
        terminal.show(utils.make_table(results, "groups"))
    if output:
        text = paths.to_json(results, indent=1, default=utils.handle_non_serializable)
        paths.replace(output, text)


def _parse() -> argparse.Namespace:
    parser = command.parser("lm-eval", __doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="RUN", help="where the model is")
    add("--tasks", required=True, help="names, separated by commas")
    add("--include_path", default="", help="a folder of YAML files with more tasks")
    add(
        "--limit",
        type=command.count,
        default=0,
        help="items of each task, the first; 0: all",
    )
    add(
        "--num_fewshot",
        type=command.number(int, least=0, most=1000),
        default=None,
        help="examples before each item",
    )
    add("--apply_chat_template", action="store_true", help="items as conversations")
    add("--batch_size", type=command.batch_size, default=8, help="rows at a time")
    add(
        "--max_length",
        type=command.row_length,
        default=0,
        help="tokens of a context; 0: the model's",
    )
    add("--dtype", default="", help="float32 (default on CPUs) or bfloat16 (elsewhere)")
    add("--output", default="", help="a JSON file for results and samples")
    return parser.parse_args()


def start() -> None:
    """Runs the command from the command line."""
    command.run(main)
