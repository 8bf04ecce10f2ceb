"""Several hosts as one run: processes on this machine that find each other.

What takes long, four hosts and all phases with everything they measure, is left to
`HOSTS=whole`.
"""

import os
import signal

import pytest
from etils import epath
from processes import Launcher, finish, wait_until

from mixcpt_jax import metrics, phase

HEARTBEAT_TIMEOUT = 10
ENDS_BY_ITSELF = 3 * HEARTBEAT_TIMEOUT
NUM_STEPS = 24

whole = pytest.mark.skipif(
    os.environ.get("HOSTS") != "whole", reason="HOSTS=whole runs it"
)


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    with Launcher(tmp_path_factory.mktemp("processes")) as launcher:
        yield launcher


@pytest.fixture
def config_flag(tiny_config, write_config_file):
    tiny_config.train.num_steps = NUM_STEPS
    tiny_config.eval.row_length = 64
    return f"--config={write_config_file(tiny_config)}"


def lines(folder):
    """All lines of metrics.jsonl but for the speed."""
    rows = metrics.read(epath.Path(folder))
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in rows]


def files(folder):
    """Name -> content of what a run leaves that does not tell of time or chance."""
    changing = ("checkpoints", "tensorboard", "metrics.jsonl", "reference.npz")
    changing += ("results.json", "provenance.json", "report.md", "report.json")
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
        and not set(changing) & set(file.parts)
        # Which model scored them is in the key of these.
        and not (file.parent.name == "select" and file.suffix == ".npz")
    }


@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_is_killed_and_the_run_goes_on_as_if_nothing_had_been(
    launcher, config_flag, tmp_path, victim
):
    """Two hosts of one device compute what one of two does, to the last bit."""
    alone = launcher.start(config_flag, f"--workdir={tmp_path}/alone", num_devices=2)
    command = (
        config_flag,
        f"--workdir={tmp_path}/killed",
        f"--heartbeat_timeout={HEARTBEAT_TIMEOUT}",
    )
    finish([alone])
    hosts = launcher.start_hosts(2, *command)
    wait_until(lambda: len(lines(tmp_path / "killed")) > NUM_STEPS // 3, hosts)
    hosts[victim].kill()
    assert hosts[1 - victim].wait(ENDS_BY_ITSELF) in (1, -signal.SIGABRT)
    assert hosts[victim].wait(1) == -signal.SIGKILL
    assert not (tmp_path / "killed" / phase.RESULTS_FILE).exists()
    finish(launcher.start_hosts(2, *command))
    assert lines(tmp_path / "killed") == lines(tmp_path / "alone")
    assert len(lines(tmp_path / "alone")) == NUM_STEPS + 2


@pytest.fixture(scope="module")
def six_phases(project, tiny_model):
    """The flags of all of Mix-CPT in a few steps; few of them are measured."""
    records = [
        f"--config.sources.{name}.max_records=48"
        for name in ("domain", "instructions", "preferences")
    ]
    steps = [
        f"--config.{place}train.num_steps=3"
        for place in ("", "overrides.sft.", "overrides.dpo.")
    ]
    return [
        f"--config={project}/configs/mixcpt.py:tiny",
        f"--config.model.path={tiny_model}",
        "--config.optimizer.learning_rate=3e-3",
        "--config.metrics.tensorboard=False",
        "--config.select.keep.instructions=8",
        "--config.select.keep.preferences=8",
        *records,
        *steps,
    ]


def test_all_phases_on_two_hosts(launcher, six_phases, tmp_path):
    """Selection, samples and export, too, are those of one host, and written once."""
    alone = launcher.start(*six_phases, f"--workdir={tmp_path}/alone", num_devices=2)
    finish([alone])
    finish(launcher.start_hosts(2, *six_phases, f"--workdir={tmp_path}/two"), 300)
    expected, found = files(tmp_path / "alone"), files(tmp_path / "two")
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    assert {"select/instructions.jsonl", "evaluate/samples.md"} <= found.keys()
    assert "export/hf/model.safetensors" in found
    for name in ("cpt", "sft", "dpo", "evaluate"):
        assert lines(tmp_path / "two" / name) == lines(tmp_path / "alone" / name)
