"""The command line in processes of their own, whose imports are paid once."""

import atexit
import contextlib
import importlib
import multiprocessing
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

_PRELOADED = [
    "mixcpt_jax.cli.prepare", "mixcpt_jax.cli.report", "mixcpt_jax.jobs.export",
    "mixcpt_jax.jobs.select", "mixcpt_jax.jobs.train", "mixcpt_jax.main",
    "gcsfs", "pytest",  # of `chaos` and `bucket`
]  # fmt: skip
# Seconds after which a process counts as hung, however slow the machine.
_PATIENCE = 1200.0


def context() -> multiprocessing.context.BaseContext:
    """Forks processes from one that has the imports behind it, and started no backend.

    A test process has one such server; the first to ask starts it. So all ask here, and
    give their processes the environment that they are to have.
    """
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(_PRELOADED)
    return made


class Process(NamedTuple):
    """A process and the files that its standard output and error go to."""

    process: multiprocessing.process.BaseProcess
    stdout: pathlib.Path
    stderr: pathlib.Path

    @property
    def output(self) -> str:
        """All that it wrote: standard output, then standard error."""
        return self.stdout.read_text() + self.stderr.read_text()

    def wait(self) -> int:
        """Its exit status, which is below 0 for a signal."""
        self.process.join(_PATIENCE)
        assert self.process.exitcode is not None, f"still runs:\n{self.output}"
        return self.process.exitcode

    def kill(self) -> None:
        """Does nothing if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)


class Launcher:
    """Starts processes; all of them have ended when its `with` does."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._context = context()
        self._started: list[Process] = []

    def __enter__(self) -> "Launcher":
        return self

    def __exit__(self, *exception) -> None:
        for started in self._started:
            started.kill()
            started.process.join()

    def start(
        self,
        *arguments: str,
        num_devices: int = 1,
        module: str = "mixcpt_jax.main",
        env: Mapping[str, str] | None = None,
    ) -> Process:
        """One process that does as `python -m MODULE ARGUMENTS`, in this folder."""
        files = [
            self._folder / f"{len(self._started)}.{name}" for name in ("out", "err")
        ]
        for file in files:
            file.touch()
        environment = os.environ | dict(env or {})
        settings = module, arguments, num_devices, os.getcwd(), environment, *files
        process = self._context.Process(target=_run, args=settings)
        process.start()
        self._started.append(Process(process, *files))
        return self._started[-1]

    def start_hosts(self, num_hosts: int, *arguments: str, **settings) -> list[Process]:
        """So many processes that find each other."""
        address = f"--coordinator=localhost:{free_port()}"
        return [
            self.start(
                address,
                f"--num_processes={num_hosts}",
                f"--process_id={host}",
                *arguments,
                **settings,
            )
            for host in range(num_hosts)
        ]


def finish(processes: list[Process]) -> None:
    """Waits for processes that succeed."""
    for process in processes:
        assert process.wait() == 0, process.output


def _poll(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.01)


def wait_until(holds: Callable[[], bool], processes: list[Process]) -> None:
    """Returns when it holds; fails when a process ends before."""

    def holds_or_fails():
        ended = [process for process in processes if not process.process.is_alive()]
        found = holds()
        assert found or not ended, ended[0].output
        return found

    _poll(holds_or_fails)


def kill(process: Process, holds: Callable[[], bool]) -> bool:
    """Kills a process once it holds; False if the process ended by itself before."""
    _poll(lambda: not process.process.is_alive() or holds())
    process.kill()
    return process.wait() == -signal.SIGKILL


def free_port() -> int:
    """A port that the system gives to no connection, which may come before a server."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("localhost", port))
            return port


def _run(
    module: str,
    arguments: tuple[str, ...],
    num_devices: int,
    folder: str,
    env: dict[str, str],
    stdout: pathlib.Path,
    stderr: pathlib.Path,
) -> None:
    for number, file in enumerate((stdout, stderr), 1):
        with file.open("ab", buffering=0) as output:
            os.dup2(output.fileno(), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    import jax

    jax.config.update("jax_num_cpu_devices", num_devices)
    # What one process compiled, later ones with the same devices read.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # An entry that another process is about to write cannot be read; it is compiled.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation")
    sys.argv = [module, *arguments]
    command = importlib.import_module(module)
    try:
        importlib.import_module("mixcpt_jax.main").launch(command.main)
    finally:
        # Processes of multiprocessing do not do so; jax leaves the other hosts here.
        atexit._run_exitfuncs()


def lines_of(command: list[str], folder: pathlib.Path) -> list[str]:
    """What a command that must succeed writes to stdout, run in a folder."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()
