import subprocess
import sys

import pytest

from mixcpt_jax.runtime import watchdog

HANGS = """
import sys, threading
from mixcpt_jax.runtime import watchdog

def somewhere():
    threading.Event().wait()

with watchdog.Watchdog(float(sys.argv[1])) as guard:
    guard.alive()
    somewhere()
"""


def test_a_process_without_progress_prints_its_stacks_and_ends(project):
    process = subprocess.run(
        [sys.executable, "-c", HANGS, "0.2"],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 1
    assert process.stderr.startswith("Timeout (0:00:00.2")
    assert "in somewhere" in process.stderr


@pytest.fixture
def calls(monkeypatch):
    """The calls of faulthandler, whose thread would end the process of the tests."""
    calls = []
    for name in ("dump_traceback_later", "cancel_dump_traceback_later"):
        monkeypatch.setattr(
            watchdog.faulthandler,
            name,
            lambda *seconds, name=name, **_: calls.append((name, *seconds)),
        )
    return calls


def test_progress_restarts_the_time_and_the_end_of_the_block_cancels_it(calls):
    with watchdog.Watchdog(0.5) as guard:
        guard.alive()
        assert calls == [("dump_traceback_later", 0.5)] * 2
    assert calls[2:] == [("cancel_dump_traceback_later",)]


def test_a_time_of_0_is_off(calls):
    with watchdog.Watchdog(0.0) as guard:
        guard.alive()
    assert not calls
