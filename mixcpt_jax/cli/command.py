"""How commands end: user errors and errors of the system are printed in one line."""

import argparse
import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from mixcpt_jax.config import settings
from mixcpt_jax.core import paths, system
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.runtime import preemption, terminal


def parser(name: str, doc: str) -> argparse.ArgumentParser:
    """A parser of flags, for commands without a config.

    Args:
      name: of the command.
      doc: its docstring, which `--help` prints.
    """
    return _Parser(
        f"python -m mixcpt_jax {name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


class _Parser(argparse.ArgumentParser):
    """Reports a wrong flag as any other user error: one line, exit status 1."""

    def error(self, message: str) -> NoReturn:
        fail(InputError(f"{message}; `{self.prog} --help` explains the flags"))


def number(kind: type[int] | type[float], **bounds: float) -> Callable[[str], float]:
    """The type of a flag that takes numbers within bounds.

    Args:
      kind: int or float.
      bounds: as for `settings.number`.
    """
    setting = settings.number(kind(0), **bounds)
    noun = "an integer" if kind is int else "a number"

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if setting.holds(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(
            f"{settings.shown(text)}: must be {noun} {setting.allowed}"
        )

    return parse


# Types of flags that several commands share.
count = number(int, least=0, most=10**9)
row_length = number(int, least=0, most=2**20)
batch_size = number(int, least=1, most=4096)
seed = number(int, least=0, most=2**31 - 1)


def run(command: Callable[..., Any], *args: Any) -> None:
    """Runs a command to its end; reports anything that ends it early in one line.

    The exit status is 0 after SIGTERM, SIGHUP or a closed pipe, 1 after a user error or an
    error of the system, and 130 after Ctrl-C.
    """
    terminal.take_any_text()
    terminal.take_logs()
    sys.unraisablehook = _report_unraisable
    preemption.interrupt()
    with preemption.exit_deadline(_stop), boundary():
        try:
            command(*args)
        finally:
            preemption.ignore()


@contextlib.contextmanager
def boundary() -> Iterator[None]:
    """Ends the process with one line if an error is not a bug in the program."""
    try:
        yield
    except (InputError, FloatingPointError) as error:
        fail(error)
    except preemption.Preempted as stop:
        terminal.say(str(stop))
        _leave()
    except KeyboardInterrupt:
        terminal.say(
            "stopped; the same command resumes from what it has saved, if anything"
        )
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        _leave()
    except Exception as error:
        kind = type(error).__name__
        # Some of a bucket's errors are the system's, too.
        if paths.is_bucket_error(error):
            fail(
                InputError(
                    f"the bucket cannot be read or written, even after retries ({kind}: "
                    f"{error}); what was saved is whole: the same command resumes it"
                )
            )
        if problem := system.problem(error):
            fail(InputError(problem))
        raise


def _leave() -> NoReturn:
    """Ends the process with status 0.

    The interpreter's own exit would tear down running threads of libraries, which takes
    long and can crash.
    """
    atexit._run_exitfuncs()
    _exit()


def _stop() -> NoReturn:
    """Ends the process while its main thread is in a call; skips exit functions."""
    terminal.say(str(preemption.Preempted()))
    _exit()


def _exit() -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _report_unraisable(entry: Any) -> None:
    """Prints an exception in a callback, except for two that are reported elsewhere.

    One is SIGTERM's, because the signal repeats. The other comes from event loops of a
    failed save or read, which was reported: they are closed already, or never began.
    """
    error = entry.exc_value
    if not isinstance(error, preemption.Preempted) and (
        not system.raised_in(error, "asyncio")
    ):
        sys.__unraisablehook__(entry)


def fail(error: Exception) -> NoReturn:
    """Reports a user error in one line and exits with status 1."""
    # Grain appends its own trace.
    text = str(error).partition("\n-----")[0]
    terminal.say(" ".join(text.split("\n")), "ERROR")
    sys.exit(1)
