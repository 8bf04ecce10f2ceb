"""Output to the terminal: text for people, or JSON objects for a cluster's log.

All output passes through here. Text is escaped and truncated, so that no name, document or
library message can move the cursor, fake a line or fill the screen. Characters that the
terminal's encoding lacks are written as escapes.

A JSON object has `time` (RFC 3339), `severity` and `message`, which Cloud Logging (GKE)
understands, and further fields, such as the loss of a step.
"""

import codecs
import contextlib
import datetime
import errno
import io
import json
import logging
import math
import os
import shutil
import signal
import sys
import traceback
import warnings
from typing import Any, TextIO

from absl import logging as absl_logging

from mixcpt_jax.core import paths, system
from mixcpt_jax.core import text as text_lib


def say(message: str, severity: str = "INFO", **fields: Any) -> None:
    """Prints a message on stderr.

    Args:
      message: one or more lines; words of more than 300 characters are cut.
      severity: INFO, WARNING, ERROR or CRITICAL.
      fields: for the log of a cluster; people see only the message.
    """
    if is_json():
        sys.stderr.say(message, severity, fields)
        return
    kind = "" if severity == "INFO" else f"{severity.lower()}: "
    _write(sys.stderr, f"{kind}{_folded(sys.stderr, message)}\n")


def show(text: str = "", end: str = "\n") -> None:
    """Writes requested output, such as a table, to stdout."""
    _write(sys.stdout, _folded(sys.stdout, text) + end)


def show_generated(text: str, end: str = "") -> None:
    """Writes generated text to stdout; unescaped if stdout is not a terminal."""
    text = text_lib.escaped(text) if sys.stdout.isatty() else text
    _write(sys.stdout, text + end)


def show_json(value: Any) -> None:
    """Writes JSON on one line to stdout; in ASCII unless to a pipe that takes UTF-8."""
    is_utf8 = codecs.lookup(_encoding(sys.stdout)).name == "utf-8"
    text = json.dumps(value, ensure_ascii=sys.stdout.isatty() or not is_utf8)
    _write(sys.stdout, text.replace("\x7f", r"\u007f") + "\n")


def _folded(stream: TextIO, text: str) -> str:
    """Escaped lines, in which tables are no wider than the terminal."""
    text = text_lib.lines(text)
    if not stream.isatty():
        return text
    return text_lib.folded(text, shutil.get_terminal_size().columns)


def _write(stream: TextIO, text: str) -> None:
    encoding = _encoding(stream)
    _put(stream, text.encode(encoding, "backslashreplace").decode(encoding))


def _put(stream: TextIO, text: str) -> None:
    """Writes text. A run whose messages nobody reads any more ends as by SIGTERM.

    Further messages are dropped. Raises if the stream is standard output, which holds
    what was asked for.
    """
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        is_gone = isinstance(error, BrokenPipeError) or error.errno == errno.EIO
        if not is_gone or stream.fileno() != sys.__stderr__.fileno():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        os.kill(os.getpid(), signal.SIGTERM)


def _encoding(stream: TextIO) -> str:
    return getattr(stream, "encoding", None) or "utf-8"


def _open_closed_streams() -> None:
    """Opens standard streams that are closed, as a daemon's may be, on the null device.

    Otherwise files that the process opens get their descriptors and the text.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def take_any_text() -> None:
    """Lets other code, such as a flag parser, print any character without an error."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # A stream whose file was exchanged for a pipe cannot tell where it is.
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):
                stream.reconfigure(errors="backslashreplace")


def is_json() -> bool:
    """Whether `use_json` was called."""
    return isinstance(sys.stderr, _JsonLines)


def use_json() -> None:
    """Makes all output of Python to the terminal JSON objects."""
    if is_json():
        return
    sys.stdout = _JsonLines(sys.stdout, "INFO")
    sys.stderr = _JsonLines(sys.stderr, "WARNING")


def take_logs() -> None:
    """Prints libraries' warnings and a final traceback like our own messages."""
    root = logging.getLogger()
    root.setLevel(logging.WARNING)  # absl sets INFO, as long as its handler is there
    others = (absl_logging.ABSLHandler, _Handler)
    root.handlers = [h for h in root.handlers if not isinstance(h, others)]
    root.addHandler(_Handler())
    warnings.showwarning = _say_warning
    sys.excepthook = _say_end


def begin_worker(is_json: bool) -> None:
    """Lets this process, which works for another one, print as that one does.

    Args:
      is_json: what `is_json` returns in the other process.
    """
    take_any_text()
    if is_json:
        use_json()
    logging.getLogger().handlers = []  # of libraries that the process has imported
    take_logs()


class _Handler(logging.Handler):
    """Prints log records; each warning once, because phases read the same text again."""

    def __init__(self):
        super().__init__()
        self._warned: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno <= logging.WARNING:
            if text in self._warned:
                return
            self._warned.add(text)
        error = record.exc_info and record.exc_info[1]
        # What the system or a bucket refused is no bug, so one line is enough.
        if error and not (system.problem(error) or paths.is_bucket_error(error)):
            text += "\n" + "".join(traceback.format_exception(error))
        severity = {"WARN": "WARNING", "FATAL": "CRITICAL"}.get(
            record.levelname, record.levelname
        )
        # Indent further lines: only text at the beginning of a line is a message.
        say(text.rstrip("\n").replace("\n", "\n  "), severity)


def _say_warning(message, category, filename, lineno, file=None, line=None) -> None:
    # What a save or a read that failed, and said so, left undone.
    if str(message).endswith("was never awaited"):
        return
    text = f"{filename}:{lineno}: {category.__name__}: {message}"
    say(text.replace("\n", "\n  "), "WARNING")


def _say_end(*error: Any) -> None:
    severity = "CRITICAL" if is_json() else "INFO"
    say("".join(traceback.format_exception(*error)).rstrip("\n"), severity)


class _JsonLines(io.TextIOBase):
    """Writes each message as one object on one line; a message ends with a newline."""

    def __init__(self, stream: TextIO, severity: str):
        self._stream, self._severity = stream, severity
        self._begun = ""

    def say(self, message: str, severity: str, fields: dict[str, Any]) -> None:
        # JSON has only finite numbers.
        fields = {
            text_lib.value(key): text_lib.value(value)
            if isinstance(value, str)
            else value
            for key, value in fields.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        entry = {
            "time": now,
            "severity": severity,
            "message": text_lib.lines(message),
        }
        _put(self._stream, json.dumps(entry | fields, default=_shown) + "\n")

    def write(self, text: str) -> int:
        self._begun += text
        if self._begun.endswith("\n"):
            message, self._begun = self._begun.strip("\n"), ""
            if message:
                self.say(message, self._severity, {})
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:
        return self._stream.encoding


def _shown(value: Any) -> str:
    return text_lib.value(str(value))
