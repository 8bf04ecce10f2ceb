"""How a command ends: what the user can mend is one line, and SIGTERM is no mistake."""

import argparse
import atexit
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from mixcpt_jax.core import paths
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.runtime import preemption, terminal

# The disk, the user's share of it, or the file may not be larger.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def parser(name: str, doc: str) -> argparse.ArgumentParser:
    """A reader of flags, for commands without a config.

    Args:
      name: of the command.
      doc: its docstring, which is what `--help` says.
    """
    return argparse.ArgumentParser(
        f"python -m mixcpt_jax {name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def integer(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of a flag that takes the integers from `least` to `most`."""

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= (value := int(text)) <= most:
                return value
        raise argparse.ArgumentTypeError(
            f"{text!r}: an integer from {least} to {most} is wanted"
        )

    return parse


def explained(command: Callable[..., Any], *args: Any) -> None:
    """Runs a command to its end; what ends it early is said in one line.

    SIGTERM ends it with exit status 0, what the user can mend with 1, Ctrl-C with 130.
    """
    sys.unraisablehook = _tell_unraisable
    preemption.interrupt()
    with preemption.in_time(_stop):
        try:
            try:
                command(*args)
            finally:
                preemption.ignore()
        except (InputError, FloatingPointError) as error:
            explain(error)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            explain(InputError(f"{error}; make room, and the same command goes on"))
        except Exception as error:
            if not paths.is_bucket_error(error):
                raise
            kind = type(error).__name__
            explain(
                InputError(
                    f"the bucket cannot be read or written ({kind}: {error}), not even "
                    "after trying again; what was saved is whole, and the same command "
                    "goes on"
                )
            )
        except preemption.Preempted as stop:
            terminal.say(str(stop))
            _leave()
        except KeyboardInterrupt:
            terminal.say(
                "stopped; a run keeps what it saved, and the same command goes on"
            )
            sys.exit(128 + signal.SIGINT)


def _leave() -> NoReturn:
    """Ends the process, and well.

    The interpreter would take apart what libraries' threads may still be at, as the
    signal found them: that takes long, and can crash.
    """
    atexit._run_exitfuncs()
    _exit()


def _stop() -> NoReturn:
    """Ends the process while its main thread is in a call, so without exit functions."""
    terminal.say(str(preemption.Preempted()))
    _exit()


def _exit() -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _tell_unraisable(entry: Any) -> None:
    """Tells of an exception in a callback, but for two that are told otherwise.

    SIGTERM comes again. Threads of a save or a read that failed, and was told, call
    later into an event loop that is no more.
    """
    error = entry.exc_value
    if not isinstance(error, preemption.Preempted) and (
        str(error) != "Event loop is closed"
    ):
        sys.__unraisablehook__(entry)


def explain(error: Exception) -> NoReturn:
    """What the user can mend is one line and exit status 1."""
    # Grain adds what it did to the traceback.
    text = str(error).partition("\n-----")[0]
    terminal.say(" ".join(text.split("\n")), "ERROR")
    sys.exit(1)
