"""Whatever the system refuses is one line with path, problem and remedy."""

import errno
import os
import subprocess
import sys

import aiohttp
import pytest

from mixcpt_jax.cli import command
from mixcpt_jax.core import paths, system
from mixcpt_jax.core.errors import InputError

# The others end a command otherwise: a pipe that is closed, a signal.
NUMBERS = [
    number
    for number in sorted(errno.errorcode)
    if not isinstance(OSError(number, ""), BrokenPipeError | InterruptedError)
]


def one_line(capsys, raising):
    def run():
        raise raising

    with pytest.raises(SystemExit) as caught:
        command.run(run)
    assert caught.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("number", NUMBERS)
def test_every_error_of_the_system_is_a_line(number, capsys):
    line = one_line(
        capsys, OSError(number, os.strerror(number), "/a/folder", None, "b")
    )
    assert "/a/folder" in line
    assert os.strerror(number) in line
    assert line.count("; ") >= 1


@pytest.mark.parametrize(
    ("raised", "part"),
    [
        (MemoryError(), "data.batch_size"),
        (MemoryError("Unable to allocate 9 GiB"), "Unable to allocate 9 GiB"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (RuntimeError("Could not determine home directory."), "HOME"),
        (ValueError("embedded null byte"), "NUL"),
        (OSError("raised by a library, without a number"), "by a library"),
        (
            FileNotFoundError(errno.ENOENT, "No usable temporary directory found"),
            "TMPDIR",
        ),
    ],
)
def test_what_is_not_an_oserror_is_a_line_too(raised, part, capsys):
    assert part in one_line(capsys, raised)


def test_a_fault_of_the_program_keeps_its_traceback():
    def run():
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        command.run(run)
    assert system.problem(RuntimeError("a fault")) is None


def test_a_deleted_current_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(FileNotFoundError) as caught:
        os.getcwd()
    assert "current folder was deleted" in system.problem(caught.value)


@pytest.mark.parametrize(
    "scheme", ["s3", "http", "https", "file", "hdfs", "memory", "C"]
)
@pytest.mark.parametrize("turn", [paths.resolve, paths.absolute])
def test_schemes_that_are_not_supported_are_named(scheme, turn):
    with pytest.raises(InputError, match=f"{scheme}:// is not supported; .* gs://"):
        turn(f"{scheme}://bucket/folder")


@pytest.mark.parametrize("path", ["gs:", "gs:/", "gs://", "gs:///a", "gs:/bucket/a"])
@pytest.mark.parametrize("turn", [paths.resolve, paths.absolute])
def test_a_path_without_a_bucket_is_a_line(path, turn):
    with pytest.raises(InputError, match=f"{path}: names no bucket; write gs://BUCKET"):
        turn(path)


def test_a_bucket_that_cannot_be_reached_is_named(capsys):
    """aiohttp raises errors that are the system's, too."""
    line = one_line(capsys, aiohttp.ClientConnectionResetError("no connection"))
    assert "the bucket cannot be read or written" in line
    assert "no connection" in line


@pytest.mark.parametrize("turn", [paths.resolve, paths.absolute])
def test_a_home_that_is_not_known_is_no_folder(turn):
    with pytest.raises(InputError, match="give the whole path"):
        turn("~nobody-of-this-name/folder")


@pytest.mark.parametrize("turn", [paths.resolve, paths.absolute])
def test_a_nul_in_a_path_is_a_line(turn):
    with pytest.raises(InputError, match="NUL"):
        turn("a\0b")


def last_line(project, script, *args, **variables):
    """What a process says that is refused something."""
    process = subprocess.run(
        [sys.executable, "-c", script, *args],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {"PYTHONPATH": str(project), "PYTHONSAFEPATH": "1"}
        | variables,
    )
    assert process.returncode == 1, process.stderr
    assert "Traceback" not in process.stderr
    return process.stderr.splitlines()[-1]


def test_commands_in_a_deleted_folder_end_in_a_line(tmp_path, project):
    (tmp_path / "gone").mkdir()
    script = (
        "import os, sys; os.chdir(sys.argv[1]); os.rmdir(sys.argv[1]);"
        "sys.argv = ['main', '--config=mixcpt.py:tiny'];"
        "from mixcpt_jax import main; main.start()"
    )
    line = last_line(project, script, str(tmp_path / "gone"))
    assert "current folder was deleted" in line


@pytest.mark.parametrize("platform", ["cuda", "nothing"])
def test_a_backend_that_is_not_installed_is_a_line(platform, project):
    """For the first jax asserts, for the second it raises."""
    script = (
        "import jax; from mixcpt_jax.cli import command; command.run(jax.device_count)"
    )
    line = last_line(project, script, JAX_PLATFORMS=platform)
    assert line.startswith("error: jax finds no device to compute on (")
    assert f"'{platform}'" in line
    assert "JAX_PLATFORMS" in line


_TALKS = """
import pathlib, sys, time
from mixcpt_jax.cli import command
from mixcpt_jax.runtime import preemption, terminal

def run():
    if "json" in sys.argv:
        terminal.use_json()
    try:
        while True:
            terminal.say("step")
            time.sleep(0.01)
    except preemption.Preempted:
        pathlib.Path(sys.argv[1]).write_text("saved")
        terminal.say("nobody reads this")
        raise

command.run(run)
"""


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_run_whose_messages_nobody_reads_saves_and_ends(tmp_path, project, form):
    file = tmp_path / "saved"
    with subprocess.Popen(
        [sys.executable, "-c", _TALKS, str(file), form],
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(project)},
    ) as process:
        assert b"step" in process.stderr.readline()
        process.stderr.close()
        assert process.wait(600) == 0
    assert file.read_text() == "saved"


def test_output_that_nobody_reads_ends_a_command_in_silence(project):
    script = (
        "from mixcpt_jax.cli import command\n"
        "from mixcpt_jax.runtime import terminal\n"
        "command.run(lambda: [terminal.show('row') for _ in range(10**5)])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(project)},
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(600) == 0
        assert process.stderr.read() == b""
