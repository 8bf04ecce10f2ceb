import subprocess
import sys
import time

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
        timeout=60,
    )
    assert process.returncode == 1
    assert process.stderr.startswith("Timeout (0:00:00.2")
    assert "in somewhere" in process.stderr


def test_progress_restarts_the_time_and_the_end_of_the_block_cancels_it():
    with watchdog.Watchdog(0.5) as guard:
        for _ in range(12):
            time.sleep(0.1)
            guard.alive()
    time.sleep(0.7)


def test_a_time_of_0_is_off():
    with watchdog.Watchdog(0.0) as guard:
        guard.alive()
