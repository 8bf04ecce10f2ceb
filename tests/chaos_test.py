"""A share of the rounds of `chaos`, and by hand what they meet by chance."""

import json
import os
import signal

import chaos
import jax
import pytest

from mixcpt_jax.evaluation import evaluator
from mixcpt_jax.jobs import train
from mixcpt_jax.runtime import preemption, sharding, watchdog
from mixcpt_jax.training import phase

pytestmark = pytest.mark.slow

ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "25"))


@pytest.mark.long
def test_disturbed_runs_end_like_one_that_is_not(capfd):
    assert chaos.run(ROUNDS, seed=0), capfd.readouterr().out


@pytest.fixture
def tiny_run(tmp_path, monkeypatch):
    """Runs chaos's config on one device: `folder's name -> results`."""
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(
        phase.sharding, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1])
    )
    (tmp_path / "model").mkdir()
    config = chaos.make_config(tmp_path / "model")
    config.train.log_every = 2
    config.train.save_every = 0

    # Not what is being tested, and it counts the devices of the process.
    monkeypatch.setattr(phase, "check_model", lambda *_: None)

    def run(name):
        return train.run(config, str(tmp_path / name), "run")

    return run


def test_what_sigterm_cuts_off_of_the_measuring_is_made_up_for(
    tiny_run, tmp_path, monkeypatch
):
    """In the middle, where no save is due and nothing logged, and at the end."""
    signs = []
    with monkeypatch.context() as patch:
        alive = watchdog.Watchdog.alive
        patch.setattr(
            watchdog.Watchdog, "alive", lambda this: signs.append(alive(this))
        )
        expected = tiny_run("whole")
    # Each step that is read, each batch that is measured, the save and the beginning.
    assert len(signs) > chaos.NUM_STEPS // 2 + 3
    measure, measured = evaluator.sums_per_example, []

    def interrupted(*args):
        measured.append(measure(*args))
        if len(measured) in (2, 4):
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("was not cut off")
        return measured[-1]

    monkeypatch.setattr(evaluator, "sums_per_example", interrupted)
    for step in (3, 6):
        with pytest.raises(preemption.Preempted, match=f"from step {step}"):
            tiny_run("parts")
    results = tiny_run("parts")
    # The start, and twice step 3 and 6.
    assert len(measured) == 5
    assert chaos.rows_of(tmp_path / "parts") == chaos.rows_of(tmp_path / "whole")
    for timed in ("seconds", "tokens_per_second"):
        del results[timed], expected[timed]
    assert results == expected
    stored = json.loads((tmp_path / "parts" / phase.RESULTS_FILE).read_text())
    assert stored["after"] == expected["after"]


def test_sigterm_in_a_step_ends_the_run_after_it(tiny_run, tmp_path, monkeypatch):
    batches = train.pipeline.batches

    def interrupting(*args):
        for number, batch in enumerate(batches(*args), 1):
            if number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    tiny_run("whole")
    monkeypatch.setattr(train.pipeline, "batches", interrupting)
    for step in (2, 4, 6):
        with pytest.raises(preemption.Preempted, match=f"from step {step}"):
            tiny_run("parts")
    assert not (tmp_path / "parts" / phase.RESULTS_FILE).exists()
    tiny_run("parts")
    assert chaos.rows_of(tmp_path / "parts") == chaos.rows_of(tmp_path / "whole")
