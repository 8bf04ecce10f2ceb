"""A run that hangs says where, and ends, so that whoever started it can start it anew."""

import faulthandler
import sys


class Watchdog:
    """Ends the process some time after the last sign of life; use it as a context manager.

    All threads' stacks go to standard error and the exit status is 1. Nothing of the
    program has to run for that, so a call that never returns is no hindrance.
    """

    def __init__(self, seconds: float):
        """Sets the time; 0: never."""
        self._seconds = seconds

    def __enter__(self) -> "Watchdog":
        self.alive()
        return self

    def __exit__(self, *exception) -> None:
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def alive(self) -> None:
        """The time begins anew."""
        if self._seconds:
            # Not sys.stderr, which may be replaced by what has no file of its own.
            faulthandler.dump_traceback_later(
                self._seconds, exit=True, file=sys.__stderr__
            )
