"""Writes data that many runs can read: the sources' tokens and the teacher's outputs.

    python -m mixcpt_jax prepare --config=configs/cpt.py \\
        --config.data.prepared=prepared [--teacher] [--phase=cpt] [--workers=8]

With `data.prepared` set, training reads every unchanged source from that folder and
tokenizes the others: the stream of rows is the same. With `--teacher` the frozen model also
runs over the packed rows, for `objective.teacher='prepared'`.

With `--inspect` the command loads no model and writes nothing: it shows what each source
would read.

Running the same command again keeps valid files and rewrites the others.
"""

import functools
import os

import ml_collections
from absl import flags
from etils import epath

from mixcpt_jax import main as command_line
from mixcpt_jax.core.errors import InputError

flags.adopt_module_key_flags(command_line)
_TEACHER = flags.DEFINE_bool("teacher", False, "Prepare the teacher too.")
_INSPECT = flags.DEFINE_bool(
    "inspect", False, "Show what would be read and what is left out; prepare nothing."
)
_SECONDS = flags.DEFINE_float(
    "inspect_seconds",
    10.0,
    "With --inspect: the most seconds to read each source.",
    lower_bound=0.1,
)
_WORKERS = flags.DEFINE_integer(
    "workers",
    min(os.cpu_count() or 1, 256),
    "Processes that tokenize; 0: this one alone.",
    lower_bound=0,
    upper_bound=256,
)


def main(argv: list[str]) -> None:
    run_config, workdir = command_line.read(argv)
    if _INSPECT.value:
        _inspect(run_config, workdir)
        return
    command_line.join(run_config)
    name, config = command_line.training_phase(
        command_line.phase_configs(run_config, workdir)
    )
    folder = command_line.phase_folder(run_config, workdir, name)
    if not config.data.prepared:
        raise InputError(
            "data.prepared: is empty; name the folder to write to, as in "
            "--config.data.prepared=prepared"
        )
    # Imported here so that --help does not wait for them.
    from mixcpt_jax import config as config_lib
    from mixcpt_jax.data import hub, token_cache_writer
    from mixcpt_jax.models import tokenizer

    if _TEACHER.value:
        config.objective.teacher = "prepared"
    config_lib.validate(config)
    resolved = config_lib.resolve_phases(config, str(epath.Path(folder).parent))
    resolved = hub.pin_now(resolved)
    vocabulary = tokenizer.load(
        resolved.model.tokenizer or resolved.model.path, resolved.model.chat_template
    )
    with command_line.owning(config.data.prepared):
        command_line.on_first_host(
            functools.partial(
                token_cache_writer.prepare, resolved, vocabulary, _WORKERS.value
            )
        )
        if _TEACHER.value:
            from mixcpt_jax.training import teacher_outputs

            teacher_outputs.prepare(config, folder, name)


def _inspect(run_config: ml_collections.ConfigDict, workdir: str) -> None:
    from mixcpt_jax import config as config_lib
    from mixcpt_jax.data import hub, inspection
    from mixcpt_jax.runtime import terminal

    phases = command_line.checked_phases(run_config, workdir)
    _, config = command_line.training_phase(phases)
    resolved = config_lib.resolve_phases(config, workdir)
    # No model needs to exist.
    resolved.model.path = resolved.model.tokenizer = resolved.teacher.path = ""
    resolved = hub.pin_now(resolved)
    for line in inspection.inspect(resolved, _SECONDS.value):
        terminal.show(line)


def start() -> None:
    """Runs the command from the command line."""
    command_line.launch(main)
