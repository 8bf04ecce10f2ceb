"""SIGTERM, which a scheduler sends before it takes a machine back: save, and resume later.

A run may be interrupted at any moment, because its files are written atomically; only the
training steps since the last checkpoint would be lost. So SIGTERM raises `Preempted`
immediately, except in the training loop: there a `Guard` records the signal, and the loop
finishes its step, saves, and raises `Preempted` itself. Python handles signals only between
two of its instructions, and one instruction, such as a compilation, can take minutes. So
`exit_deadline` ends a command that does not end by itself.
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
    """SIGTERM has arrived; like KeyboardInterrupt, it is not an `Exception`."""

    def __init__(self, saved: str = "what it has saved, if anything"):
        super().__init__(f"stopped by SIGTERM; the same command resumes from {saved}")


# SIGTERM, and the alarm that repeats it.
_SIGNALS = signal.SIGTERM, signal.SIGALRM
_SECONDS_BETWEEN_REPEATS = 0.5
# Seconds from SIGTERM to the end of a process that has nothing to save.
_PATIENCE = 5.0

# Whether a `Guard` defers SIGTERM until the training state is saved.
_is_deferred = False


def interrupt() -> None:
    """Makes SIGTERM raise `Preempted` in the main thread."""
    _handle_by(_raise)
    # Closing the terminal ends a run like a scheduler's SIGTERM, unless `nohup` prevents
    # it.
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


def ignore() -> None:
    """Makes SIGTERM have no effect, because the process is about to exit."""
    _handle_by(signal.SIG_IGN)


def _handle_by(handler: Callable[..., None] | signal.Handlers) -> None:
    for number in _SIGNALS:
        signal.signal(number, handler)


def _raise(*_) -> None:
    # An exception raised in a callback is lost, so the signal repeats.
    signal.setitimer(signal.ITIMER_REAL, _SECONDS_BETWEEN_REPEATS)
    raise Preempted


@contextlib.contextmanager
def exit_deadline(end: Callable[[], Any]) -> Iterator[None]:
    """Calls `end` seconds after a SIGTERM in the block, even if the main thread is busy.

    Does not call it while a `Guard` defers the signal, nor in forked children.

    Args:
      end: ends the process, from any thread.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # The signal's number is written to this pipe before any Python code runs.
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_end_if_late, args=(reading, end), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)


def _end_if_late(reading: int, end: Callable[[], Any]) -> None:
    """Reads signal numbers until the pipe is closed."""
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
    """A preemption guard: after `defer`, SIGTERM is only recorded; a context manager.

    With several processes, `jax.distributed.initialize` handles the signal in each of them,
    and all hosts agree on a step to stop after.

    Raises:
      Preempted: at the end of the block, if SIGTERM has arrived.
    """

    def __enter__(self) -> "Guard":
        import jax  # here, because the command line imports this module before jax

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
        """Call it once there is state to save; further calls do nothing."""
        global _is_deferred
        if self._is_alone and not _is_deferred:
            _is_deferred = True
            self._before = [signal.getsignal(number) for number in _SIGNALS]
            _handle_by(self._note)

    def is_requested(self, step: int) -> bool:
        """Whether to stop after this step; every host must call it after every step."""
        if self._is_alone:
            return self._is_requested
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def interruptible(self, function: Callable[..., Any], *args: Any) -> Any | None:
        """Calls a function that SIGTERM may interrupt; returns None if it does.

        If SIGTERM was already recorded, the function is not called. With several processes,
        the function runs to its end, because hosts would not be interrupted at the same
        place.
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
        # Only once: the cleanup after the exception must not be interrupted.
        _handle_by(self._note)
        self._is_requested = True
        raise Preempted
