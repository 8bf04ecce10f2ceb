"""Ends a run that hangs, after printing where, so that a scheduler can restart it."""

import faulthandler
import sys


class Watchdog:
    """Ends the process some time after the last sign of progress; a context manager.

    The stacks of all threads go to standard error and the exit status is 1. A separate
    thread does this, so it works even if a call never returns.
    """

    def __init__(self, seconds: float):
        """Sets the timeout in seconds; 0: never."""
        self._seconds = seconds

    def __enter__(self) -> "Watchdog":
        self.alive()
        return self

    def __exit__(self, *exception) -> None:
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def alive(self) -> None:
        """Restarts the timeout."""
        if self._seconds:
            # Not sys.stderr, which may be replaced by an object without a file.
            faulthandler.dump_traceback_later(
                self._seconds, exit=True, file=sys.__stderr__
            )
