import ast
import contextlib
import io
import json
import logging as std_logging
import multiprocessing
import os
import subprocess
import sys
import unicodedata
import warnings

import aiohttp
import hypothesis
import mixture_test
import pytest
from _pytest.logging import LogCaptureHandler
from absl import logging
from hypothesis import strategies as st

from mixcpt_jax.cli import chat, command
from mixcpt_jax.core import text
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import mixture, token_cache_writer
from mixcpt_jax.runtime import metrics, terminal

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


HOSTILE = st.text(
    st.sampled_from(
        "ab é日😀\u200d\t\n\r\0\x1b[2J\x07\x08\x7f\x9b\u202e\u2066\ud800\ufeff"
    )
)


def is_safe(shown):
    """Whether a terminal shows it, and does nothing else."""
    kinds = {unicodedata.category(c) for c in shown if c not in "\n\t\u200d"}
    return not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}


@hypothesis.given(content=HOSTILE)
def test_what_is_shown_is_printable_and_says_what_was_there(content):
    for shown in (text.value(content), text.lines(content), text.escaped(content)):
        assert is_safe(shown)
    assert "\n" not in text.value(content)
    assert text.escaped(content).count("\n") == content.count("\n")
    harmless = content.translate(
        dict.fromkeys(map(ord, "\t\n\r\0\x1b\x07\x08\x7f\x9b"))
    )
    if is_safe(harmless):
        assert text.value(harmless) == text.lines(harmless) == harmless
    back = text.value(content).encode("latin-1", "backslashreplace")
    assert back.decode("unicode_escape") == content


@hypothesis.given(content=st.text(st.sampled_from("ab \n\x1b"), max_size=50))
def test_long_values_keep_their_ends(content):
    long = f"begin{content * 1000}{'x' * 5000} and the end"
    for line in text.lines(long).split("\n"):
        assert len(line) <= 2000
        assert max(map(len, line.split()), default=0) <= 300
    assert text.lines(long).startswith("begin")
    assert text.lines(long).endswith("and the end")


@hypothesis.given(content=HOSTILE)
def test_an_error_is_one_line_whatever_it_quotes(content):
    message = str(InputError(f"a.jsonl:3: {content}; remove it"))
    assert is_safe(message)
    assert "\n" not in message
    assert message.startswith("a.jsonl:3: ")
    assert str(InputError(message)) == message


def test_an_error_has_a_length_whatever_it_quotes():
    assert len(str(InputError("x" * 4_000_000))) == 300
    assert len(str(InputError("x " * 2_000_000))) == 2000


PATHS = {
    "error": lambda bad: command.fail(InputError(bad)),
    "say": lambda bad: terminal.say(f"{bad}: is damaged"),
    "field": lambda bad: terminal.say("a step", **{bad: bad}),
    "log": lambda bad: logging.warning("%s: %s", bad, bad),
    "exception": lambda bad: logging.exception("it fails", exc_info=ValueError(bad)),
    "warning": lambda bad: warnings.warn(bad, stacklevel=1),
    "traceback": lambda bad: sys.excepthook(ValueError, ValueError(bad), None),
    "table": lambda bad: terminal.show(metrics.table([bad, "b"], [[bad, "1"]])),
    "progress": lambda bad: metrics.Progress(bad, 0, 9, True).say(bad),
    "steps": lambda bad: metrics.Progress(bad, 0, 1, True).update(1, {bad: 1.0}, 1.0),
    "library": lambda bad: print(bad),
}


@pytest.fixture
def streams(monkeypatch):
    """`encoding -> (stdout, stderr)` that the terminal writes to from now on."""

    def streams(encoding, is_terminal=False):
        made = []
        for name in ("stdout", "stderr"):
            stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
            stream.isatty = lambda: is_terminal
            monkeypatch.setattr(sys, name, stream)
            made.append(stream)
        return made

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield streams


def written(stream):
    stream.flush()
    return stream.buffer.getvalue().decode(stream.encoding)


BAD = "a\x1b[2J\rerror: fake\x00\u202e\ud800é" + "x" * 10_000


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
@pytest.mark.parametrize("is_json", [False, True])
def test_every_path_to_the_terminal_escapes_and_cuts(streams, path, encoding, is_json):
    if path is PATHS["library"] and not is_json:
        return
    out, err = streams(encoding)
    terminal.take_logs()
    # Workers cannot send what pytest captures, as it is not UTF-8.
    root = logging.logging.getLogger()
    root.handlers = [h for h in root.handlers if not isinstance(h, LogCaptureHandler)]
    if is_json:
        terminal.use_json()
    with contextlib.suppress(SystemExit):
        path(BAD)
    texts = [written(stream) for stream in (out, err)]
    assert any(texts)
    if is_json:
        rows = [json.loads(line) for t in texts for line in t.splitlines()]
        texts = [str(part) for row in rows for pair in row.items() for part in pair]
    for shown in texts:
        assert is_safe(shown)
        assert len(shown) < 5000
        assert not any(line.startswith("error: fake") for line in shown.splitlines())


def log_bad(value):
    if multiprocessing.parent_process():
        logging.warning("%s", BAD)
    return value


class _Rows:
    """The rows of a source, each of which logs a warning."""

    def __init__(self, rows):
        self._rows = rows

    def __getattr__(self, name):
        return getattr(self.__dict__["_rows"], name)

    def __getitem__(self, number):
        return log_bad(self._rows[number])

    def __len__(self):
        return len(self._rows)

    def __getstate__(self):
        return self._rows

    def __setstate__(self, rows):
        self._rows = rows


def pool():
    with token_cache_writer._pool(1) as in_order:
        list(in_order(log_bad, [0]))


def loader():
    rows = _Rows(mixture_test._rows([30] * 4, 16))
    next(iter(mixture.mixture([rows], 1, 0, num_workers=1)))


@pytest.mark.slow
@pytest.mark.parametrize("begin", [pool, loader])
@pytest.mark.parametrize("is_json", [False, True])
def test_logs_of_worker_processes_are_escaped_and_cut(
    capfd, monkeypatch, begin, is_json
):
    monkeypatch.setattr(terminal, "is_json", lambda: is_json)
    begin()
    found = [line for line in capfd.readouterr().err.splitlines() if "fake" in line]
    assert found
    for line in found:
        assert is_safe(line)
        assert len(line) < 1000
        if is_json:
            assert json.loads(line)["severity"] == "WARNING"
        else:
            assert line.startswith("warning: a\\x1b[2J\\rerror: fake")


@pytest.mark.parametrize("is_terminal", [False, True])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_generated_text_is_raw_in_a_pipe_alone(streams, encoding, is_terminal):
    answer = "one\n\ttwo \x1b[31mred\r\x9b é"
    out, _ = streams(encoding, is_terminal)
    chat.print_pieces(iter(answer))
    expected = text.escaped(answer) if is_terminal else answer
    if encoding == "ascii":
        expected = expected.encode("ascii", "backslashreplace").decode()
    assert written(out) == expected + "\n"
    out, _ = streams(encoding, is_terminal)
    terminal.show_json({"answer": answer})
    line = written(out)
    assert json.loads(line) == {"answer": answer}
    assert is_safe(line) or not is_terminal


def test_an_ascii_terminal_takes_what_others_print(project):
    code = "from mixcpt_jax.cli import command; command.run(print, 'é日\\ud800')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        check=True,
    )
    assert done.stdout == b"\\xe9\\u65e5\\ud800\n"


def test_nothing_else_writes_to_the_terminal(project):
    """Neither by print nor by a stream's own methods."""
    found = []
    for file in (project / "mixcpt_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called in ("print", "sys.stdout.write", "sys.stderr.write"):
                found.append(f"{file.name}: {ast.unparse(node)}")
    assert not found


@hypothesis.given(
    st.integers(1, 5),
    st.lists(st.integers(1, 30), min_size=2, max_size=12),
    st.integers(20, 200),
)
def test_folded_tables_fit_and_hold_every_column(num_rows, widths, width):
    rows = [[f"{n},{i}".ljust(w, "x") for i, w in enumerate(widths)]
            for n in range(num_rows)]  # fmt: skip
    table = metrics.table(rows[0], rows[1:])
    folded = text.folded(f"above\n\n{table}\nbelow", width)
    assert folded.startswith("above\n\n| ")
    assert folded.endswith(" |\nbelow")
    parts = folded[len("above\n\n") : -len("\nbelow")].split("\n\n")
    cells = [[line[2:-2].split(" | ") for line in part.split("\n")] for part in parts]
    whole = [line[2:-2].split(" | ") for line in table.split("\n")]
    assert all(part.partition("\n")[0][:8] == table[:8] for part in parts)
    assert whole == [
        [row[0], *(cell for part in cells for cell in part[n][1:])]
        for n, row in enumerate(whole)
    ]
    for part, held in zip(parts, cells):
        assert len(part.partition("\n")[0]) <= width or len(held[0]) == 2
    if len(table.partition("\n")[0]) <= width:
        assert len(parts) == 1


def test_a_table_is_folded_on_a_terminal_alone(streams, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    table = metrics.table(["", *"abcdefgh"], [["name", *["1.0000"] * 8]])
    for is_terminal in (False, True):
        out, err = streams("utf-8", is_terminal)
        terminal.show(table)
        terminal.say(table)
        for stream in (out, err):
            widths = [len(line) for line in written(stream).splitlines()]
            assert (max(widths) <= 40) == is_terminal


def test_what_libraries_report_below_a_warning_is_not_printed(capsys):
    """jax tries each backend and logs those that the machine lacks."""
    logging.use_absl_handler()
    std_logging.getLogger().setLevel(std_logging.INFO)  # as absl's `app.run` does
    terminal.take_logs()
    logger = std_logging.getLogger("jax._src.xla_bridge")
    logger.info("Unable to initialize backend 'tpu'")
    logger.warning("heard")
    assert capsys.readouterr().err == "warning: heard\n"


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_no_file_gets_the_text_of_a_closed_stream(closed, tmp_path):
    script = (
        "import pathlib, sys; from mixcpt_jax.cli import command\n"
        "from mixcpt_jax.runtime import terminal\n"
        "def work():\n"
        "    with open(sys.argv[1], 'w') as file:\n"
        "        terminal.show('shown'); terminal.say('said'); print('printed')\n"
        "        file.write('written')\n"
        "command.run(work)"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a")],
        check=False,
        preexec_fn=lambda: [os.close(number) for number in closed],
    )
    assert process.returncode == 0
    assert (tmp_path / "a").read_text() == "written"


@pytest.mark.parametrize(
    ("error", "is_one_line"),
    [
        (OSError("no route to host"), True),
        (aiohttp.ClientError("no route to host"), True),
        (ValueError("a fault"), False),
    ],
)
def test_a_library_logs_the_trace_of_a_fault_only(error, is_one_line, capsys):
    terminal.take_logs()
    std_logging.getLogger("gcsfs").error("gives up: %s", error, exc_info=error)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"error: gives up: {error}"
    assert (len(lines) == 1) == is_one_line
