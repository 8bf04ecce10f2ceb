"""One owner of a folder, with processes of its own and with owners of elsewhere."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import bucket
import owners
import pytest
from etils import epath
from processes import finish, wait_until

from mixcpt_jax.core.errors import InputError
from mixcpt_jax.runtime import lease, metrics


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path / "parent" / "run")


@pytest.fixture
def quick(monkeypatch):
    """A minute is half a second."""
    monkeypatch.setattr(lease, "SECONDS_BETWEEN_BEATS", 0.05)
    monkeypatch.setattr(lease, "SECONDS_TO_DEATH", 0.5)
    monkeypatch.setattr(lease, "_SECONDS_BETWEEN_LOOKS", 0.02)


@pytest.fixture
def sleep_by(monkeypatch):
    """`function -> None`: a lease that waits calls this function instead."""

    def sleep_by(function):
        clock = types.SimpleNamespace(monotonic=time.monotonic, sleep=function)
        monkeypatch.setattr(lease, "time", clock)

    return sleep_by


def entries(folder):
    return sorted(file.name for file in folder.glob("lease-*"))


def write_entry(folder, number=1, **facts):
    """What an owner leaves that was killed: this process, unless the facts say more."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(lease._facts() | facts)
    (folder / f"lease-{number}.json").write_text(text)


def ended_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("seed", range(4))
def test_of_processes_that_want_one_folder_one_has_it(tmp_path, seed):
    log = tmp_path / "log"
    owners.check_round(f"{tmp_path}/run", log, seed, {})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("knows_conditions", [True, False])
def test_of_processes_that_want_one_folder_of_a_bucket_one_has_it(
    tmp_path, knows_conditions
):
    with bucket.serve(knows_conditions) as port, bucket.reached_by(port) as root:
        for seed in range(2):
            owners.check_round(
                f"{root}/run-{seed}",
                tmp_path / f"{seed}.log",
                seed,
                bucket.environment(port),
            )


def test_a_folder_is_owned_for_as_long_as_the_block_lasts(folder):
    with lease.hold(folder):
        assert entries(folder) == ["lease-1.json"]
        with lease.hold(folder):  # by the same process
            lease.check(folder / "phase")
        assert entries(folder) == ["lease-1.json"]
        lease.check(folder.parent / "another")
    assert not folder.parent.exists()  # nothing was written there
    with lease.hold(folder):
        (folder / "file").write_text("x")
    assert [file.name for file in folder.iterdir()] == ["file"]


def test_the_second_is_told_who_owns_the_folder_and_touches_nothing(folder, capsys):
    write_entry(folder, since="2026-01-01T00:00:00+00:00")
    before = (folder / "lease-1.json").read_text()
    with pytest.raises(InputError) as error, lease.hold(folder):
        pass
    host = os.uname().nodename
    assert str(error.value) == (
        f"{folder} (lease-1.json): process {os.getpid()} on {host} has owned this folder "
        "since 2026-01-01T00:00:00+00:00; wait for its end, or stop it, and run the same "
        "command again; or give another folder"
    )
    assert entries(folder) == ["lease-1.json"]
    assert (folder / "lease-1.json").read_text() == before


@pytest.mark.parametrize("facts", [{"pid": None}, {"start": "1"}], ids=str)
def test_an_owner_whose_process_is_gone_is_dead_at_once(folder, facts, sleep_by):
    """Its number is free, or another process has it by now."""
    if not facts.get("pid", True):
        facts = {"pid": ended_process()}
    write_entry(folder, 7, **facts)
    sleep_by(pytest.fail)
    with lease.hold(folder):
        assert entries(folder) == ["lease-8.json"]
    assert entries(folder) == []


def test_a_process_that_was_not_waited_for_is_gone(folder):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    write_entry(folder, pid=process.pid, start=lease._start_of(process.pid))
    with pytest.raises(InputError, match="has owned"), lease.hold(folder):
        pass
    process.kill()
    while lease._stat(process.pid)[0] != "Z":
        time.sleep(0.01)
    with lease.hold(folder):
        pass
    process.wait()
    process.stdin.close()


def test_an_owner_of_elsewhere_is_dead_after_a_while_without_a_change(folder, quick):
    write_entry(folder, place="another machine", host="far")
    began = time.monotonic()
    with lease.hold(folder):
        assert time.monotonic() - began >= lease.SECONDS_TO_DEATH


def test_an_owner_of_elsewhere_that_changes_its_entry_lives(folder, sleep_by):
    """Whatever its clock says."""
    write_entry(folder, place="another machine", host="far")

    def change_between_looks(_):
        os.utime(folder / "lease-1.json", (0, 0))
        write_entry(folder, place="another machine", host="far", beat=2)

    sleep_by(change_between_looks)
    with pytest.raises(InputError, match="on far has owned"), lease.hold(folder):
        pass
    assert entries(folder) == ["lease-1.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 5000, '{"pid": "x"}', "\0" * 99])
def test_an_entry_that_says_nothing_is_an_owner_of_elsewhere(folder, quick, text):
    folder.mkdir(parents=True)
    (folder / "lease-3.json").write_text(text)
    began = time.monotonic()
    with lease.hold(folder):
        assert time.monotonic() - began >= lease.SECONDS_TO_DEATH
        assert entries(folder) == ["lease-4.json"]


def test_the_owner_gives_signs_of_life(folder, quick):
    with lease.hold(folder):
        texts = set()
        deadline = time.monotonic() + 600
        while len(texts) < 3 and time.monotonic() < deadline:
            texts.add((folder / "lease-1.json").read_text())
            time.sleep(0.02)
        assert len(texts) >= 3
        assert {len(text) for text in texts} == {lease._BYTES}


def take_over(folder):
    write_entry(folder, 2, host="far", pid=12)
    (folder / "lease-1.json").unlink()


def rename(folder):
    folder.rename(folder.parent / "renamed")


def replace(folder):
    folder.rename(folder.parent / "renamed")
    folder.mkdir()


def delete(folder):
    (folder / "lease-1.json").unlink()


@pytest.mark.parametrize("wait", [0, 4])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (take_over, r"\(lease-2\.json\): process 12 on far has taken over this folder"),
        (rename, "was renamed or deleted"),
        (replace, r"its lease-1\.json was deleted"),
        (delete, r"its lease-1\.json was deleted"),
    ],
)
def test_who_has_lost_the_folder_writes_nothing_more(
    folder, quick, change, message, wait
):
    with lease.hold(folder):
        writer = metrics.Writer(folder, metrics_config(), -1, {})
        writer.write(1, {"loss": 1.0})
        change(folder)
        # The thread, too, makes nothing again.
        time.sleep(wait * lease.SECONDS_BETWEEN_BEATS)
        there = contents(folder.parent)
        for write in (
            lambda: writer.write(2, {"loss": 1.0}),
            lambda: writer.write_items(2, {"a/loss": [1.0]}),
            lambda: writer.write_samples(2, [[{"role": "u", "content": "x"}]], ["y"]),
            writer.save,
        ):
            with pytest.raises(InputError, match=message):
                write()
        writer.__exit__(InputError, None, None)  # as one that came from it would
    assert contents(folder.parent) == there
    assert "lease-1.json" not in entries(folder)


def metrics_config():
    from mixcpt_jax import config as config_lib

    config = config_lib.default().metrics
    config.tensorboard = False
    return config


def contents(folder):
    files = pathlib.Path(folder).rglob("*")
    return {
        file: "" if file.name == "lease-1.json" else file.read_text()
        for file in files
        if file.is_file()
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.unlink(),
        lambda file: file.write_text(""),
        lambda file: file.rename(f"{file}.old"),
        lambda file: file.write_text(file.read_text() * 2),
        lambda file: file.parent.rename(f"{file.parent}.old"),
    ],
)
def test_a_record_that_others_change_ends_the_run_at_its_next_line(folder, change):
    folder.mkdir(parents=True)
    writer = metrics.Writer(folder, metrics_config(), -1, {})
    writer.write(1, {"loss": 1.0})
    writer.write(2, {"loss": 1.0})
    change(folder / metrics.FILE)
    there = contents(folder.parent)
    with pytest.raises(InputError, match=r"^\S+/metrics\.jsonl: \S+ .*same command"):
        writer.write(3, {"loss": 1.0})
    writer.__exit__(InputError, None, None)
    assert contents(folder.parent) == there


def test_a_folder_in_that_of_a_living_owner_is_refused(folder, quick):
    write_entry(folder)
    for inner in (folder / "phase", folder / "phase" / "inner"):
        message = rf"^{inner}: lies in the folder of another run: .*{os.getpid()} on"
        with pytest.raises(InputError, match=message), lease.hold(inner):
            pass
    assert contents(folder).keys() == {pathlib.Path(folder / "lease-1.json")}
    write_entry(folder, pid=ended_process())
    with lease.hold(folder / "phase"):
        assert entries(folder / "phase") == ["lease-1.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"pid": 1}'])
def test_a_file_above_that_is_no_entry_is_not_waited_for(folder, text):
    folder.mkdir(parents=True)
    (folder / "lease-1.json").write_text(text)
    began = time.monotonic()
    with lease.hold(folder / "inner"):
        assert time.monotonic() - began < lease.SECONDS_TO_DEATH


def test_of_two_runs_one_inside_the_other_at_most_one_has_the_phase(folder):
    """Whichever begins first, of two processes."""
    phase = folder / "phase"
    with lease.hold(folder):
        with lease.hold(phase):
            assert entries(phase) == ["lease-1.json"]
            lease.check(phase)
        write_entry(phase)
        with pytest.raises(InputError, match="has owned"), lease.hold(phase):
            pass


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_an_entry_that_is_no_file_is_named(folder, make):
    folder.mkdir(parents=True)
    make(folder / "lease-1.json")
    with pytest.raises(InputError, match="no regular file"), lease.hold(folder):
        pass


def test_folders_that_cannot_be_owned(folder):
    folder.parent.mkdir(parents=True)
    folder.write_text("x")
    with pytest.raises(InputError, match="is a file"), lease.hold(folder):
        pass


# In a process without JAX, which warns of each fork once it has started its backend.
_FORK = """
import os, sys
from etils import epath
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.runtime import lease
folder = epath.Path(sys.argv[1])
with lease.hold(folder):
    child = os.fork()
    if not child:
        status = 1
        try:
            lease.check(folder)
            with lease.hold(folder):
                pass
        except InputError:
            status = 0
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    lease.check(folder)
"""


def test_a_child_of_the_owner_owns_nothing(folder):
    subprocess.run([sys.executable, "-c", _FORK, str(folder)], check=True)


@pytest.mark.slow
def test_a_second_run_on_a_workdir_is_refused_and_the_first_ends(
    launcher, tiny_config, write_config_file, tmp_path
):
    """And a third one, of two hosts, is told so on both."""
    tiny_config.train.num_steps = 40
    flags = f"--config={write_config_file(tiny_config)}", f"--workdir={tmp_path}/run"
    first = launcher.start(*flags, num_devices=2)
    wait_until((tmp_path / "run" / metrics.FILE).exists, [first])
    os.kill(first.process.pid, signal.SIGSTOP)  # so that it does not end before
    others = [launcher.start(*flags), *launcher.start_hosts(2, *flags)]
    for other in others:
        assert other.wait() == 1
        errors = [x for x in other.output.splitlines() if x.startswith("error: ")]
        assert len(errors) == 1, other.output
        owner = f"(lease-1.json): process {first.process.pid} on"
        assert owner in errors[0]
    os.kill(first.process.pid, signal.SIGCONT)
    finish([first])
    rows = metrics.read(epath.Path(tmp_path) / "run")
    steps = [row["step"] for row in rows if "learning_rate" in row]
    assert steps == sorted(set(steps))
    assert steps[-1] == 40
