"""SIGTERM, with which a scheduler takes a machine back: the run saves, and goes on later.

Whatever a run does may be cut off at any moment, since its files are written whole or
not at all. Only what training has learnt since its last checkpoint would be lost. So
SIGTERM raises `Preempted` at once, wherever the run is, but for the training loop: there a
`Guard` takes it down, the loop ends its step and saves, and raises `Preempted` itself.
Python raises only between two of its own instructions, and a compilation is one, which can
take minutes: a command that does not end `in_time` is ended.
"""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any


class Preempted(BaseException):
    """SIGTERM has come; like KeyboardInterrupt it is not for `except Exception`."""

    def __init__(self, done: str = ""):
        super().__init__(f"stopped by SIGTERM{done}; the same command goes on")


# SIGTERM, and the alarm that repeats it.
_SIGNALS = signal.SIGTERM, signal.SIGALRM
_SECONDS_BETWEEN_REPEATS = 0.5
# From SIGTERM to the end of a process that has nothing to save.
_PATIENCE = 5.0

# Whether a `Guard` has put SIGTERM off, so that what was learnt is saved first.
_is_deferred = False


def interrupt() -> None:
    """From now on SIGTERM raises `Preempted` in the main thread."""
    _handle_by(_raise)
    # A terminal that closes ends a run as a scheduler does, unless `nohup` prevents it.
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


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


@contextlib.contextmanager
def in_time(end: Callable[[], Any]) -> Iterator[None]:
    """Seconds after SIGTERM came inside `end` is called, whatever the main thread is in.

    Not where a `Guard` has put it off. Of a child that is forked inside nothing is
    heard.

    Args:
      end: ends the process, from any thread.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # Written to as the signal comes, before Python can do anything about it.
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_end_if_late, args=(reading, end), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)


def _end_if_late(reading: int, end: Callable[[], Any]) -> None:
    """Reads numbers of signals until there is no more to come."""
    deadline = None
    while True:
        left = None if deadline is None else max(0, deadline - time.monotonic())
        if select.select([reading], [], [], left)[0]:
            number = os.read(reading, 1)
            if not number:
                break
            ends = signal.SIGTERM, signal.SIGHUP
            if number[0] in ends and deadline is None:
                deadline = time.monotonic() + _PATIENCE
        elif _is_deferred:
            deadline = None
        else:
            end()
    os.close(reading)


class Guard:
    """From `defer` on SIGTERM is noted and nothing more; use it as a context manager.

    With several processes jax notes the signal (`jax.distributed.initialize` takes it
    over, everywhere), tells the other hosts, and agrees with them on a step.

    Raises:
      Preempted: on leaving, if SIGTERM came and the block ended as if it had not.
    """

    def __enter__(self) -> "Guard":
        import jax  # here, as the command line has this module before it has jax

        self._is_requested = False
        self._is_alone = jax.process_count() == 1
        return self

    def __exit__(self, kind, *exception) -> None:
        global _is_deferred
        if _is_deferred:
            for number, handler in zip(_SIGNALS, self._before, strict=True):
                signal.signal(number, handler)
            _is_deferred = False
        if self._is_requested and kind is None:
            raise Preempted

    def defer(self) -> None:
        """To be called as soon as there is something to save; again it does nothing."""
        global _is_deferred
        if self._is_alone and not _is_deferred:
            _is_deferred = True
            self._before = [signal.getsignal(number) for number in _SIGNALS]
            _handle_by(self._note)

    def is_requested(self, step: int) -> bool:
        """Whether to stop after this step; asked after every step, on every host."""
        if self._is_alone:
            return self._is_requested
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def interruptible(self, function: Callable[..., Any], *args: Any) -> Any | None:
        """Calls a function that leaves nothing half done; None if SIGTERM cut it off.

        Once SIGTERM is noted nothing is called. With several processes the function is
        not cut off, as it would not be at the same place on all of them.
        """
        if not _is_deferred:
            return function(*args)
        try:
            _handle_by(self._note_and_raise)
            result = None if self._is_requested else function(*args)
            _handle_by(self._note)
        except Preempted:
            return None
        return result

    def _note(self, *_) -> None:
        self._is_requested = True

    def _note_and_raise(self, *_) -> None:
        # Once only: what cleans up behind the exception is not to be cut off.
        _handle_by(self._note)
        self._is_requested = True
        raise Preempted
