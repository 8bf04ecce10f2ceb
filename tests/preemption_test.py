import os
import signal
import subprocess
import sys
import time

import pytest

from mixcpt_jax.cli import command as command_line
from mixcpt_jax.runtime import preemption

STOPPED = (
    "stopped by SIGTERM; the same command resumes from what it has saved, if anything\n"
)


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def stays(monkeypatch):
    """A command that is stopped returns; its process is that of the tests."""
    monkeypatch.setattr(command_line, "_leave", lambda: None)


def test_sigterm_ends_a_command_at_once_with_status_0(capsys):
    def command(reached):
        sigterm()
        reached.append("what comes after")

    reached = []
    command_line.run(command, reached)
    assert not reached
    assert capsys.readouterr().err == STOPPED
    sigterm()  # at exit nothing is interrupted


def test_sighup_ends_a_command_as_sigterm_does(capsys):
    def command():
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(600)

    command_line.run(command)
    assert capsys.readouterr().err.startswith("stopped by SIGTERM; ")


def test_sighup_stays_ignored_under_nohup(capsys):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    command_line.run(lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert capsys.readouterr().err == ""


def test_ctrl_c_is_one_line(capsys):
    def command():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(600)

    with pytest.raises(SystemExit) as caught:
        command_line.run(command)
    assert caught.value.code == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line == STOPPED.replace(" by SIGTERM", "").rstrip()


def test_code_that_catches_every_exception_does_not_catch_it():
    preemption.interrupt()

    def careless():
        try:
            sigterm()
        except Exception:
            pytest.fail("taken for an error")

    with pytest.raises(preemption.Preempted):
        careless()


def test_a_deferred_signal_interrupts_nothing():
    preemption.interrupt()
    done = []

    def loop():
        with preemption.Guard() as preemption_guard:
            preemption_guard.defer()
            for step in range(1, 5):
                if step == 2:
                    sigterm()
                done.append(step)
                if preemption_guard.is_requested(step):
                    raise preemption.Preempted(f"step {step}")

    with pytest.raises(preemption.Preempted, match="from step 2"):
        loop()
    assert done == [1, 2]
    # Outside it interrupts again.
    with pytest.raises(preemption.Preempted):
        sigterm()


def test_an_interruptible_call_is_interrupted_and_no_other_starts():
    def measure():
        sigterm()
        pytest.fail("was not cut off")

    def stretch():
        with preemption.Guard() as preemption_guard:
            preemption_guard.defer()
            assert preemption_guard.interruptible(lambda x: x + 1, 1) == 2
            assert not preemption_guard.is_requested(1)
            assert preemption_guard.interruptible(measure) is None
            assert preemption_guard.is_requested(1)
            assert preemption_guard.interruptible(pytest.fail) is None
            sigterm()  # a second one is noted like the first
        pytest.fail("it is told on leaving")

    with pytest.raises(preemption.Preempted):
        stretch()


def test_an_error_is_not_hidden_by_a_signal():
    def failing():
        with preemption.Guard() as preemption_guard:
            preemption_guard.defer()
            sigterm()
            assert preemption_guard.is_requested(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()


class Careless:
    """A callback whose exceptions nobody can catch."""

    def __del__(self):
        sigterm()
        time.sleep(0)


def test_a_signal_lost_in_a_callback_repeats(capsys):
    def command():
        Careless()
        time.sleep(600)
        pytest.fail("the signal does not repeat")

    command_line.run(command)
    assert capsys.readouterr().err == STOPPED


def test_a_repeated_signal_interrupts_no_step():
    preemption.interrupt()

    def loop():
        Careless()
        with preemption.Guard() as preemption_guard:
            preemption_guard.defer()
            for step in range(1, 100):
                time.sleep(0.1)
                if preemption_guard.is_requested(step):
                    raise preemption.Preempted(f"step {step}")

    sys.unraisablehook = lambda _: None
    with pytest.raises(preemption.Preempted, match="from step"):
        loop()


# The call locks a mutex of C that is locked already, and no signal ends that. It returns
# when standard input is closed, where a thread unlocks the mutex.
LONG_CALL = """
import ctypes, sys, threading
from mixcpt_jax.cli import command
from mixcpt_jax.runtime import preemption
preemption._PATIENCE = 0.5
C, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
def unlock():
    sys.stdin.read()
    C.pthread_mutex_unlock(mutex)
def long_call():
    C.pthread_mutex_lock(mutex)
    threading.Thread(target=unlock, daemon=True).start()
    print("begins", flush=True)
    C.pthread_mutex_lock(mutex)
"""


@pytest.fixture
def stopped_in_the_call():
    """`program -> process`, to which SIGTERM was sent in its long call."""
    processes = []

    def start(program):
        process = subprocess.Popen(
            [sys.executable, "-c", LONG_CALL + program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout.readline() == "begins\n"
        process.send_signal(signal.SIGTERM)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_long_call_without_signals_is_ended(stopped_in_the_call):
    process = stopped_in_the_call("command.run(long_call)")
    assert process.wait(600) == 0  # although its input is open
    assert process.stderr.read() == STOPPED


def test_state_that_must_be_saved_is_saved_first(stopped_in_the_call):
    process = stopped_in_the_call("""
def train():
    with preemption.Guard() as preemption_guard:
        preemption_guard.defer()
        long_call()
        assert preemption_guard.is_requested(1)
        print("saved", flush=True)
command.run(train)
""")
    time.sleep(1)  # twice its patience
    output, _ = process.communicate("", timeout=600)
    assert (process.returncode, output) == (0, "saved\n")
