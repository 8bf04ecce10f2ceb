"""SIGTERM, with which a scheduler takes a machine back: the run saves, and goes on later.

Whatever a run does may be cut off at any moment, since its files are written whole or
not at all. Only what training has learnt since its last checkpoint would be lost. So
SIGTERM raises `Preempted` at once, wherever the run is, but for the training loop: there a
`Notice` takes it down, the loop ends its step and saves, and raises `Preempted` itself.
"""

import signal
from collections.abc import Callable
from typing import Any


class Preempted(BaseException):
    """SIGTERM has come; like KeyboardInterrupt it is not for `except Exception`."""

    def __init__(self, done: str = ""):
        super().__init__(f"stopped by SIGTERM{done}; the same command goes on")


# SIGTERM, and the alarm that repeats it.
_SIGNALS = signal.SIGTERM, signal.SIGALRM
_SECONDS_BETWEEN_REPEATS = 0.5


def interrupt() -> None:
    """From now on SIGTERM raises `Preempted` in the main thread."""
    _handle_by(_raise)


def ignore() -> None:
    """From now on, as all is done but to exit, SIGTERM changes nothing."""
    _handle_by(signal.SIG_IGN)


def _handle_by(handler: Callable[..., None] | signal.Handlers) -> None:
    for number in _SIGNALS:
        signal.signal(number, handler)


def _raise(*_) -> None:
    # Where it is raised in a callback nobody can catch it, so it comes again.
    signal.setitimer(signal.ITIMER_REAL, _SECONDS_BETWEEN_REPEATS)
    raise Preempted


class Notice:
    """SIGTERM is noted and nothing more; use it as a context manager.

    With several processes jax notes the signal (`jax.distributed.initialize` takes it
    over, everywhere), tells the other hosts, and agrees with them on a step.

    Raises:
      Preempted: on leaving, if SIGTERM came and the block ended as if it had not.
    """

    def __enter__(self) -> "Notice":
        import jax  # here, as the command line has this module before it has jax

        self._has_come = False
        self._is_alone = jax.process_count() == 1
        if self._is_alone:
            self._before = [signal.getsignal(number) for number in _SIGNALS]
            _handle_by(self._note)
        return self

    def __exit__(self, kind, *exception) -> None:
        if self._is_alone:
            for number, handler in zip(_SIGNALS, self._before, strict=True):
                signal.signal(number, handler)
        if self._has_come and kind is None:
            raise Preempted

    def has_come(self, step: int) -> bool:
        """Whether to stop after this step; asked after every step, on every host."""
        if self._is_alone:
            return self._has_come
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def unless_it_comes(self, function: Callable[..., Any], *args: Any) -> Any | None:
        """Calls a function that leaves nothing half done; None if SIGTERM cut it off.

        Once SIGTERM has come nothing is called. With several processes the function is
        not cut off, as it would not be at the same place on all of them.
        """
        if not self._is_alone:
            return function(*args)
        try:
            _handle_by(self._note_and_raise)
            result = None if self._has_come else function(*args)
            _handle_by(self._note)
        except Preempted:
            return None
        return result

    def _note(self, *_) -> None:
        self._has_come = True

    def _note_and_raise(self, *_) -> None:
        # Once only: what cleans up behind the exception is not to be cut off.
        _handle_by(self._note)
        self._has_come = True
        raise Preempted
