import json
import subprocess
import sys

import pytest

SCRIPT = """
import logging, sys
from mixcpt_jax.runtime import terminal

terminal.take_logs()
{setup}
print("one\\ntwo")
for _ in range(2):
    logging.getLogger("orbax").warning("damaged %d", 3)
terminal.say("cpt 1/2", step=1, loss=0.5, rate=float("nan"))
terminal.say("no such file", "ERROR")
raise ValueError("the end")
"""


@pytest.fixture
def run(project):
    def run(setup):
        script = SCRIPT.format(setup=setup)
        return subprocess.run(
            [sys.executable, "-c", script], cwd=project, capture_output=True, text=True
        )

    return run


def test_every_line_is_an_object_with_what_a_cluster_reads(run):
    process = run("terminal.use_json()")
    (out,) = map(json.loads, process.stdout.splitlines())
    logged, step, error, end = map(json.loads, process.stderr.splitlines())
    assert (out["severity"], out["message"]) == ("INFO", "one\ntwo")
    assert (logged["severity"], logged["message"]) == ("WARNING", "damaged 3")
    assert step == {
        "time": step["time"], "severity": "INFO", "message": "cpt 1/2", "step": 1,
        "loss": 0.5,
    }  # fmt: skip
    assert (error["severity"], error["message"]) == ("ERROR", "no such file")
    assert end["severity"] == "CRITICAL"
    assert end["message"].endswith("ValueError: the end")
    assert process.returncode == 1


def test_people_read_text_without_place_thread_and_date(run):
    process = run("")
    assert process.stdout == "one\ntwo\n"
    assert process.stderr.splitlines()[:3] == [
        "warning: damaged 3",
        "cpt 1/2",
        "error: no such file",
    ]
