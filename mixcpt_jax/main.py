"""The command line: flags in, phases out.

    python -m mixcpt_jax.main --config=configs/quickstart.py [--workdir=runs/mine]
        [--config.train.num_steps=100 ...]

Running the same command again resumes an interrupted run.
"""

import contextlib
import functools
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from mixcpt_jax.cli import command, shipped
from mixcpt_jax.core import system
from mixcpt_jax.core import text as text_lib
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.runtime import terminal

_CONFIG = config_flags.DEFINE_config_file("config", help_string="The config file.")


class _ConfigParser(flags.ArgumentParser):
    """Reads a config file, and adds the sources, texts and exams that flags add."""

    def __init__(self, files: flags.ArgumentParser):
        self._files = files

    def parse(self, path: str) -> ml_collections.ConfigDict:
        from mixcpt_jax import config as config_lib

        config = _load(self._files, path)
        keys = [found[1] for found in map(_NAMES_KEY.match, _given_flags()) if found]
        for entry in filter(None, map(_NEW_ENTRY.fullmatch, keys)):
            section, name = entry.groups()
            if section == "sources" and name not in config.sources:
                _check_deliberate(name, keys, config.sources)
            config_lib.add_entry(config, section, name)
        for key in keys:
            config_lib.check_key(config, key, f"--config.{key}")
        return config


def _check_deliberate(name: str, keys: list[str], known: Iterable[str]) -> None:
    """Checks that flags add a source on purpose: they must also give its share."""
    key = f"sources.{name}"
    if f"{key}.weight" not in keys:
        raise InputError(
            f"--config.{key}.path: the config has no source {name!r}; to add one, give its "
            f"share too, as in --config.{key}.weight=0.2; {text_lib.advice(name, known)}"
        )


def _load(files: flags.ArgumentParser, path: str) -> ml_collections.ConfigDict:
    """The config that a file returns.

    Raises:
      InputError: there is no such file, it fails, or it returns something else.
    """
    file = shipped.find(path)
    try:
        config = files.parse(file)
        if isinstance(config, ml_collections.ConfigDict):
            return config
        # ml_collections keeps an OSError until an attribute is read.
        getattr(config, "phases", None)
    except InputError:
        raise
    except ModuleNotFoundError as error:
        raise InputError(
            f"--config={path}: the file imports {error.name}, which is not found from "
            f"{pathlib.Path.cwd()}; run in the folder that has it, or install it"
        ) from error
    except Exception as error:
        raise InputError(f"--config={path}: {_failure(error, file)}") from error
    raise InputError(
        f"--config={path}: get_config() returns {type(config).__name__}; it must return "
        "a config, such as mixcpt_jax.config.default() with some changes"
    )


def _failure(error: BaseException, file: str) -> str:
    """The exception of a config file, and the line that raised it."""
    if str(error).startswith("Error whilst parsing config file"):
        error = error.__context__
    error = error.__cause__ or error
    if str(error).endswith("has no attribute 'get_config'"):
        return "the file defines no function get_config()"
    if "get_config() takes 0 positional arguments" in str(error):
        return "this config has no variants; leave out what follows the colon"
    name = file.partition(":")[0]
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == name]
    place = f"line {lines[-1]}: " if lines else ""
    told = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return place + (system.problem(error) or told)


def _given_flags() -> list[str]:
    """The command line, with each `--flagfile` replaced by its flags."""
    return flags.FLAGS.read_flags_from_files(sys.argv, force_gnu=False)


_NAMES_CONFIG = re.compile("--?config(=.*)?", re.DOTALL)
_NAMES_KEY = re.compile(r"--?(?:no)?config\.([^=]*)")
# A path adds an entry; any other key of a name that the config lacks is a mistake.
_NEW_ENTRY = re.compile(r"(sources|eval\.texts|eval\.exams|eval\.pairs)\.(\w+)\.path")
flags.FLAGS["config"].parser = _ConfigParser(flags.FLAGS["config"].parser)
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "Folder of the run; empty: runs/<config's name>."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "For a run on several hosts that jax finds by itself: TPU slices, Kubernetes (GKE), "
    "Slurm, Open MPI. Set it on every host.",
)
_PHASE = flags.DEFINE_string(
    "phase",
    "",
    "For a config with phases: the one to plan or prepare; empty: the first that trains. "
    "A run does all phases.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "For hosts that jax does not find by itself: HOST:PORT of the first host, set on "
    "every host. Implies --distributed.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes",
    None,
    "With --coordinator: the number of hosts.",
    lower_bound=1,
    upper_bound=2**16,
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id",
    None,
    "With --coordinator: the number of this host, from 0.",
    lower_bound=0,
    upper_bound=2**16 - 1,
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout",
    100,
    "Seconds without a heartbeat after which a host counts as dead and the run ends.",
    lower_bound=1,
    upper_bound=7 * 86_400,
)


def main(argv: list[str]) -> None:
    config, workdir = read(argv)
    # Imported here so that --help does not wait for jax.
    from mixcpt_jax.reporting import report as report_lib

    join(config)
    with owning(workdir):
        _, results = run(config, workdir)
        on_first_host(functools.partial(report_lib.write, workdir, results))


def read(argv: list[str]) -> tuple[ml_collections.ConfigDict, str]:
    """The config and the workdir of the flags.

    Raises:
      InputError: there are arguments that are not flags.
    """
    if len(argv) > 1:
        raise InputError(f"unknown argument {argv[1]!r}; write flags as --NAME=VALUE")
    # absl's default logs every backend that jax looks for.
    logging.set_verbosity(logging.WARNING)
    terminal.take_logs()
    config = _CONFIG.value
    if config.get("metrics", {}).get("log") == "json":
        terminal.use_json()
    return config, _WORKDIR.value or _default_workdir()


def join(config: ml_collections.ConfigDict) -> None:
    """Joins the other hosts, if the flags name several.

    Raises:
      InputError: they could not be discovered, or have another config.
    """
    if _is_distributed():
        from mixcpt_jax.runtime import hosts

        hosts.join(
            _COORDINATOR.value,
            _NUM_PROCESSES.value,
            _PROCESS_ID.value,
            _HEARTBEAT_TIMEOUT.value,
        )
        hosts.require_same(config.to_json(sort_keys=True))


def on_first_host(work: Callable[[], None]) -> None:
    """Calls `work` on the first host while the others wait."""
    if not _is_distributed():
        work()
        return
    from mixcpt_jax.runtime import hosts

    if hosts.is_first():
        work()
    hosts.wait_for_all("work of the first host")


def owning(folder: str) -> contextlib.AbstractContextManager:
    """While the context is open, no other run or command writes to a folder.

    Raises:
      InputError: on entering, if another process owns it.
    """
    from mixcpt_jax.core import paths
    from mixcpt_jax.runtime import lease

    path = paths.absolute(folder)
    if not _is_distributed():
        return lease.hold(path)
    from mixcpt_jax.runtime import hosts

    return hosts.owning(path)


def checked_phases(
    config: ml_collections.ConfigDict, workdir: str
) -> dict[str, ml_collections.ConfigDict]:
    """Phase -> its config; for a config without phases, the workdir's name -> the config.

    Raises:
      InputError: a key or a value is wrong.
    """
    from mixcpt_jax import config as config_lib

    config_lib.check_values(config)
    configs = {name: config_lib.for_phase(config, name) for name in config.phases} or {
        pathlib.PurePath(workdir).name: config
    }
    for name, phase_config in configs.items():
        with _naming(name, config):
            config_lib.check_values(phase_config)
    teacher = config.teacher.path or config.teacher.init_from
    if teacher and not any(map(config_lib.has_other_teacher, configs.values())):
        raise InputError(
            f"teacher: no phase distils from {teacher}, as every weight that needs a "
            "teacher is 0; set objective.lssd_weight or kd_weight, or leave teacher empty"
        )
    return configs


def phase_configs(
    config: ml_collections.ConfigDict, workdir: str
) -> dict[str, ml_collections.ConfigDict]:
    """As `checked_phases`, with all sizes chosen.

    Raises:
      InputError: a key or a value is wrong, or sizes cannot be chosen.
    """
    configs = checked_phases(config, workdir)
    if config.data.batch_size != 0:
        return configs
    from mixcpt_jax.planning import sizing

    sizing.resolve(config, workdir)
    return checked_phases(config, workdir)


def training_phase(
    configs: dict[str, ml_collections.ConfigDict],
) -> tuple[str, ml_collections.ConfigDict]:
    """The phase named by `--phase`, or the first one that trains, and its config.

    Args:
      configs: phase -> its config.

    Raises:
      InputError: no phase of this name trains.
    """
    trained = [key for key, entry in configs.items() if entry.job == "train"]
    name = _PHASE.value or next(iter(trained), "")
    if name not in trained:
        raise InputError(
            f"--phase={name}: the phases of this config that train are "
            f"{', '.join(trained) or 'none'}"
        )
    return name, configs[name]


def phase_folder(config: ml_collections.ConfigDict, workdir: str, phase: str) -> str:
    """The folder of a phase."""
    return f"{workdir}/{phase}" if config.phases else workdir


def run(
    config: ml_collections.ConfigDict, workdir: str
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Runs the unfinished phases of a config one after the other.

    Returns:
      Phase -> its folder, and phase -> its results, of all phases.

    Raises:
      InputError: config, data, weights or workdir are wrong, or another process owns the
        workdir.
      FloatingPointError: a loss is no longer finite.
    """
    import jax

    from mixcpt_jax import config as config_lib
    from mixcpt_jax.core import paths
    from mixcpt_jax.data import pipeline
    from mixcpt_jax.jobs import evaluate, export, generate, merge, select, train
    from mixcpt_jax.runtime import compiled, hosts
    from mixcpt_jax.training import phase

    jobs = {
        "train": train.run,
        "generate": generate.run,
        "merge": merge.run,
        "select": select.run,
        "evaluate": evaluate.run,
        "export": export.run,
    }
    configs = phase_configs(config, workdir)
    for name, phase_config in configs.items():
        with _naming(name, config):
            config_lib.validate(phase_config, jax.device_count())
    compiled.keep(config.runtime.compilation_cache, workdir)
    folders = {name: phase_folder(config, workdir, name) for name in configs}
    results = {}
    with hosts.owning(paths.absolute(workdir)):
        # Check all phases before the first one: hours of training must not end in an error.
        for name, phase_config in configs.items():
            if phase.finished(phase_config, folders[name]) is None:
                with _naming(name, config):
                    if phase_config.job in pipeline.JOBS:
                        pipeline.find_files(phase_config, workdir)
                    phase.check_teacher(phase_config)
        for number, (name, phase_config) in enumerate(configs.items(), 1):
            if config.phases and phase.shows_progress(config):
                terminal.say(f"phase {number} of {len(configs)}: {name}")
            folder = paths.absolute(folders[name])
            with _naming(name, config), hosts.owning(folder):
                run_job = jobs[phase_config.job]
                results[name] = run_job(phase_config, folders[name], name)
    return folders, results


@contextlib.contextmanager
def _naming(phase: str, config: ml_collections.ConfigDict) -> Iterator[None]:
    """Adds the phase's name to an error, if the phase has its own settings."""
    try:
        yield
    except InputError as error:
        if phase not in config.overrides:
            raise
        raise InputError(
            f"phase {phase}, whose own settings are overrides.{phase}: {error}"
        ) from error


def _is_distributed() -> bool:
    given = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    return _DISTRIBUTED.value or any(value is not None for value in given)


def _ending_together() -> contextlib.AbstractContextManager:
    if not _is_distributed():
        return contextlib.nullcontext()
    from mixcpt_jax.runtime import hosts

    return hosts.ending_together()


def _default_workdir() -> str:
    file, _, variant = config_flags.get_config_filename(
        flags.FLAGS["config"]
    ).partition(":")
    name = pathlib.PurePath(file).stem
    return f"runs/{name}_{variant}" if variant else f"runs/{name}"


@command.boundary()
def _parse(argv: list[str]) -> list[str]:
    """Parses flags and reads the config file."""
    try:
        if not any(map(_NAMES_CONFIG.fullmatch, _given_flags())):
            raise InputError(f"--config is missing; name {shipped.known()}")
        return flags.FLAGS(argv)
    except flags.Error as error:
        text = str(error).removeprefix("flag ")
        for problem, plain in _PLAIN.items():
            text = re.sub(problem, plain, text)
        raise InputError(text) from error


# absl's messages about flags -> plain messages.
_PLAIN = {
    r"invalid literal for int\(\) with base 10: .*": "must be an integer",
    "could not convert string to float: .*": "must be a number",
    r"\('Non-boolean argument to boolean flag', .*\)": "must be true or false",
    "ERROR:: Unable to open flagfile:": "--flagfile:",
}


def launch(main: Callable[[list[str]], None]) -> None:
    """Runs a command with the flags of this module and its own.

    Args:
      main: the command, called with the remaining arguments. `--help` prints the
        docstring of its module and its flags.
    """
    if {"--help", "-h", "-help"} & set(sys.argv[1:]):
        module = sys.modules[main.__module__]
        terminal.show(f"{module.__doc__}\nflags:\n{flags.FLAGS.module_help(module)}")
        return
    shipped.make_importable()

    def run(argv: list[str]) -> None:
        with _ending_together():
            command.run(main, argv)

    app.run(run, flags_parser=_parse)


def start() -> None:
    """Runs the command from the command line."""
    launch(main)


if __name__ == "__main__":
    start()
