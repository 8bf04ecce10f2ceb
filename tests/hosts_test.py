"""Several hosts as one run: processes on this machine that find each other.

What takes long, four hosts and all phases with everything they measure, is left to
`HOSTS=whole`.
"""

import os
import re
import signal

import numpy as np
import pytest
import six_phases
from etils import epath
from processes import finish, free_port, wait_until

from mixcpt_jax.core.errors import InputError
from mixcpt_jax.runtime import metrics
from mixcpt_jax.training import checkpoint, phase

pytestmark = pytest.mark.slow

HEARTBEAT_TIMEOUT = 10
NUM_STEPS = 24

whole = pytest.mark.skipif(
    os.environ.get("HOSTS") != "whole", reason="HOSTS=whole runs it"
)


@pytest.fixture
def config_flag(tiny_config, write_config_file):
    tiny_config.train.num_steps = NUM_STEPS
    tiny_config.eval.row_length = 64
    return f"--config={write_config_file(tiny_config)}"


def lines(folder):
    """All lines of metrics.jsonl without the speed."""
    rows = metrics.read(epath.Path(folder))
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in rows]


def files(folder):
    """Name -> content of the files of a run that depend on neither time nor chance."""
    changing = (checkpoint.FOLDER, checkpoint.RECORD_FOLDER, "tensorboard")
    changing += ("metrics.jsonl", "results.json", "provenance.json", "report.md")
    changing += ("report.json", "report.html", "timing.jsonl")
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
        and not set(changing) & set(file.parts)
        # Which model scored them is in the key of these.
        and file.suffix != ".npz"
    }


@pytest.fixture
def alone(launcher, config_flag, tmp_path):
    """The metrics.jsonl of one process with two devices."""
    finish([launcher.start(config_flag, f"--workdir={tmp_path}/alone", num_devices=2)])
    return lines(tmp_path / "alone")


def start_two(launcher, config_flag, folder):
    """Starts or resumes a run on two hosts with one device each."""
    return launcher.start_hosts(
        2,
        config_flag,
        f"--workdir={folder}",
        f"--heartbeat_timeout={HEARTBEAT_TIMEOUT}",
    )


def wait_for_steps(folder, num_steps, hosts):
    wait_until(lambda: lines(folder) and lines(folder)[-1]["step"] >= num_steps, hosts)


@pytest.mark.long
def test_a_run_on_two_hosts_is_stopped_and_killed_and_ends_like_one_on_one(
    launcher, config_flag, alone, tmp_path
):
    """SIGTERM to one, then SIGKILL to the other; every number is equal to the last bit."""
    folder = tmp_path / "two"
    hosts = start_two(launcher, config_flag, folder)
    wait_for_steps(folder, NUM_STEPS // 4, hosts)
    os.kill(hosts[1].process.pid, signal.SIGTERM)
    finish(hosts)
    (stopped,) = {re.search(r"SIGTERM; .* from step (\d+)", h.output)[1] for h in hosts}
    steps = {int(p.name) for p in (folder / checkpoint.FOLDER).iterdir()}
    assert max(steps) == int(stopped) < NUM_STEPS

    hosts = start_two(launcher, config_flag, folder)
    wait_for_steps(folder, int(stopped) + 3, hosts)
    hosts[0].kill()
    # The connection breaks, or the heartbeats stop.
    assert hosts[1].wait() in (1, -signal.SIGABRT)
    assert hosts[0].wait() == -signal.SIGKILL
    assert not (folder / phase.RESULTS_FILE).exists()

    finish(start_two(launcher, config_flag, folder))
    assert len(alone) == NUM_STEPS + 2
    assert lines(folder) == alone


@pytest.mark.long
def test_two_slices_lose_one_and_a_slice_alone_resumes(
    launcher, config_flag, alone, tmp_path
):
    """Two processes of two devices are told to be slices."""
    folder = tmp_path / "slices"
    flags = (config_flag, f"--workdir={folder}")
    slices = ("--config.mesh.slices=2", "--config.mesh.data=2")
    timeout = f"--heartbeat_timeout={HEARTBEAT_TIMEOUT}"
    hosts = launcher.start_hosts(2, *flags, *slices, timeout, num_devices=2)
    wait_for_steps(folder, NUM_STEPS // 4, hosts)
    os.kill(hosts[0].process.pid, signal.SIGTERM)
    finish(hosts)
    hosts = launcher.start_hosts(2, *flags, *slices, timeout, num_devices=2)
    wait_for_steps(folder, lines(folder)[-1]["step"] + 2, hosts)
    hosts[1].kill()
    assert hosts[0].wait() in (1, -signal.SIGABRT)
    # The checkpoint of two slices is restored on one.
    finish([launcher.start(*flags, num_devices=2)])
    found = lines(folder)
    assert len(found) == len(alone)
    for row, other in zip(found, alone, strict=True):
        assert row.keys() == other.keys()
        if "loss" in row:
            # The order of sums differs, and training amplifies it.
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)


@whole
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_host_dies_or_hangs_the_other_ends(
    launcher, config_flag, alone, tmp_path, victim, number
):
    hosts = start_two(launcher, config_flag, tmp_path / "two")
    wait_for_steps(tmp_path / "two", NUM_STEPS // 4, hosts)
    os.kill(hosts[victim].process.pid, number)
    assert hosts[1 - victim].wait() in (1, -signal.SIGABRT)
    hosts[victim].kill()
    finish(start_two(launcher, config_flag, tmp_path / "two"))
    assert lines(tmp_path / "two") == alone


@whole
def test_four_devices_on_four_hosts_two_or_one(launcher, config_flag, tmp_path):
    """Equal on several hosts; on one the sums over devices have another order."""
    found = {}
    for num_hosts in (1, 2, 4):
        folder = tmp_path / str(num_hosts)
        settings = config_flag, f"--workdir={folder}"
        num_devices = 4 // num_hosts
        if num_hosts == 1:
            finish([launcher.start(*settings, num_devices=num_devices)])
        else:
            finish(launcher.start_hosts(num_hosts, *settings, num_devices=num_devices))
        found[num_hosts] = lines(folder)
    assert found[4] == found[2]
    for row, other in zip(found[4][:2], found[1][:2]):
        assert row.keys() == other.keys()
        # A sum over four devices is rounded three times.
        eps = 3 * float(np.finfo(np.float32).eps)
        largest = max(map(abs, other.values()))
        for name in row:
            assert row[name] == pytest.approx(other[name], abs=eps * largest), name


def test_a_host_that_fails_alone_ends_the_run(
    launcher, tiny_config, write_config_file, tmp_path
):
    """Its disk lacks a file; the other hosts end too."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "model").symlink_to(tiny_config.model.path)
    tiny_config.model.path = "~/model"
    address = f"--coordinator=localhost:{free_port()}"
    hosts = [
        launcher.start(
            f"--config={write_config_file(tiny_config)}",
            f"--workdir={tmp_path}/run",
            f"--heartbeat_timeout={HEARTBEAT_TIMEOUT}",
            address,
            "--num_processes=2",
            f"--process_id={host}",
            env={"HOME": str(home if host == 0 else tmp_path)},
        )
        for host in range(2)
    ]
    assert hosts[1].wait() == 1
    assert "error: ~/model/config.json: no such file" in hosts[1].output
    assert hosts[0].wait() in (1, -signal.SIGABRT)


def test_hosts_with_different_settings_are_refused(launcher, config_flag, tmp_path):
    address = f"--coordinator=localhost:{free_port()}"
    hosts = [
        launcher.start(
            config_flag,
            f"--workdir={tmp_path}/run",
            f"--config.seed={host}",
            address,
            "--num_processes=2",
            f"--process_id={host}",
        )
        for host in range(2)
    ]
    assert sorted(host.wait() for host in hosts)[1] == 1
    assert any(
        "the settings of host 1 differ from those of host 0" in host.output
        for host in hosts
    )
    assert not (tmp_path / "run").exists()


def test_hosts_that_cannot_be_discovered_are_requested(launcher, config_flag):
    process = launcher.start(config_flag, "--distributed")
    assert process.wait() == 1
    assert process.output.startswith("error: --distributed: ")
    assert "--coordinator=HOST:PORT" in process.output


def test_a_workdir_that_is_not_shared_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(phase, "_SECONDS_UNTIL_SEEN", 0)
    file = epath.Path(tmp_path) / phase.CONFIG_FILE
    with pytest.raises(
        InputError, match="not seen by host 0; give a --workdir that all"
    ):
        phase._check_is_shared(file)
    file.touch()
    phase._check_is_shared(file)


def test_two_hosts_prepare_the_same_as_one(launcher, config_flag, tmp_path):
    def prepare(name):
        return (
            config_flag,
            f"--workdir={tmp_path}/{name}",
            f"--config.data.prepared={tmp_path}/{name}",
            "--config.sources.domain.max_records=20",
            "--config.sources.instructions.max_records=40",
            "--teacher",
            "--workers=0",
        )

    module = "mixcpt_jax.cli.prepare"
    finish([launcher.start(*prepare("one"), num_devices=2, module=module)])
    finish(launcher.start_hosts(2, *prepare("two"), module=module))
    assert sum(name.endswith("manifest.json") for name in files(tmp_path / "one")) == 4
    assert files(tmp_path / "two") == files(tmp_path / "one")


@pytest.mark.long
def test_the_phases_on_two_hosts(
    launcher, project, tiny_model, six_phase_run, tmp_path
):
    """Selection, samples and export, too, are those of one host, and written once."""
    flags = six_phases.flags(project, tiny_model, tmp_path / "two")
    finish(launcher.start_hosts(2, *flags))
    expected, found = files(six_phase_run), files(tmp_path / "two")
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    assert {"select/instructions.jsonl", "evaluate/samples.md"} <= found.keys()
    assert "export/hf/model.safetensors" in found
    for name in set(six_phases.PHASES) - {"select", "export"}:
        assert lines(tmp_path / "two" / name) == lines(six_phase_run / name)
