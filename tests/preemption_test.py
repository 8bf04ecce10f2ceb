import os
import signal
import subprocess
import sys
import time

import pytest

from mixcpt_jax.cli import command as command_line
from mixcpt_jax.runtime import preemption


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def handler(monkeypatch):
    """Restores the process's signal handlers after each test."""
    monkeypatch.setattr(command_line, "_leave", lambda: None)
    numbers = signal.SIGTERM, signal.SIGALRM, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    hook = sys.unraisablehook
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)
    sys.unraisablehook = hook


def test_sigterm_ends_a_command_at_once_with_status_0(capsys):
    def command(reached):
        sigterm()
        reached.append("what comes after")

    reached = []
    command_line.explained(command, reached)
    assert not reached
    assert capsys.readouterr().err == "stopped by SIGTERM; the same command resumes\n"
    sigterm()  # at exit nothing is interrupted


def test_sighup_ends_a_command_as_sigterm_does(capsys):
    def command():
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(10)

    command_line.explained(command)
    assert capsys.readouterr().err.startswith("stopped by SIGTERM; ")


def test_sighup_stays_ignored_under_nohup(capsys):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    command_line.explained(lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert capsys.readouterr().err == ""


def test_ctrl_c_is_one_line(capsys):
    def command():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    with pytest.raises(SystemExit) as caught:
        command_line.explained(command)
    assert caught.value.code == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "stopped; a run keeps what it saved: the same command resumes it"


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
                    raise preemption.Preempted(f" after step {step}")

    with pytest.raises(preemption.Preempted, match="after step 2"):
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
        time.sleep(60)

    began = time.monotonic()
    command_line.explained(command)
    assert time.monotonic() - began < 30
    assert capsys.readouterr().err == "stopped by SIGTERM; the same command resumes\n"


def test_a_repeated_signal_interrupts_no_step():
    preemption.interrupt()

    def loop():
        Careless()
        with preemption.Guard() as preemption_guard:
            preemption_guard.defer()
            for step in range(1, 100):
                time.sleep(0.1)
                if preemption_guard.is_requested(step):
                    raise preemption.Preempted(f" after step {step}")

    sys.unraisablehook = lambda _: None
    with pytest.raises(preemption.Preempted, match="after step"):
        loop()


# Python handles no signals in this loop; the first million takes about a second.
LONG_CALL = """
import hashlib, sys
from mixcpt_jax.cli import command
from mixcpt_jax.runtime import preemption
preemption._PATIENCE = 0.5
def long_call(millions):
    print("begins", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", millions * 2_000_000)
"""


def stop_in_the_call(program):
    child = subprocess.Popen(
        [sys.executable, "-c", LONG_CALL + program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout.readline() == "begins\n"
        began = time.monotonic()
        child.send_signal(signal.SIGTERM)
        output, errors = child.communicate(timeout=60)
    return child.returncode, output, errors, time.monotonic() - began


def test_a_long_call_without_signals_is_ended():
    program = "command.explained(long_call, 100)"
    status, _, errors, seconds = stop_in_the_call(program)
    assert status == 0
    assert errors == "stopped by SIGTERM; the same command resumes\n"
    assert seconds < 20


def test_state_that_must_be_saved_is_saved_first():
    program = """
def train():
    with preemption.Guard() as preemption_guard:
        preemption_guard.defer()
        long_call(2)
        assert preemption_guard.is_requested(1)
        print("saved", flush=True)
command.explained(train)
"""
    status, output, _, seconds = stop_in_the_call(program)
    assert (status, output) == (0, "saved\n")
    assert seconds > 0.5
