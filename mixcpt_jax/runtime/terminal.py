"""Output to the terminal: text for people, or JSON objects for a cluster's log.

An object has `time` (RFC 3339), `severity` and `message`, which Cloud Logging (GKE)
understands, and further fields, such as the loss of a step.
"""

import datetime
import io
import json
import logging
import math
import sys
import traceback
from typing import Any, TextIO

from absl import logging as absl_logging


def say(message: str, severity: str = "INFO", **fields: Any) -> None:
    """Prints a message on stderr.

    Args:
      message: one or more lines.
      severity: INFO, WARNING, ERROR or CRITICAL.
      fields: for the log of a cluster; people see the message alone.
    """
    if is_json():
        sys.stderr.say(message, severity, fields)
        return
    kind = "" if severity == "INFO" else f"{severity.lower()}: "
    print(f"{kind}{message}", file=sys.stderr)


def is_json() -> bool:
    """Whether `use_json` was called."""
    return isinstance(sys.stderr, _JsonLines)


def use_json() -> None:
    """From now on all output of Python to the terminal is JSON objects."""
    if is_json():
        return
    sys.stdout = _JsonLines(sys.stdout, "INFO")
    sys.stderr = _JsonLines(sys.stderr, "WARNING")
    sys.excepthook = _tell_end


def take_logs() -> None:
    """Prints libraries' logs like our own messages, without place, thread and date."""
    root = logging.getLogger()
    others = (absl_logging.ABSLHandler, _Handler)
    root.handlers = [h for h in root.handlers if not isinstance(h, others)]
    root.addHandler(_Handler())


class _Handler(logging.Handler):
    """Prints log records; a warning only once, since phases read the same text again."""

    def __init__(self):
        super().__init__()
        self._warned: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno <= logging.WARNING:
            if text in self._warned:
                return
            self._warned.add(text)
        if record.exc_info:
            text += "\n" + "".join(traceback.format_exception(*record.exc_info))
        severity = {"WARN": "WARNING", "FATAL": "CRITICAL"}.get(
            record.levelname, record.levelname
        )
        say(text.rstrip("\n"), severity)


class _JsonLines(io.TextIOBase):
    """Writes each message as one object on one line; a message ends with a newline."""

    def __init__(self, stream: TextIO, severity: str):
        self._stream, self._severity = stream, severity
        self._begun = ""

    def say(self, message: str, severity: str, fields: dict[str, Any]) -> None:
        # JSON has no numbers that are not finite.
        fields = {
            key: value
            for key, value in fields.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        entry = {"time": now, "severity": severity, "message": message}
        self._stream.write(json.dumps(entry | fields, default=str) + "\n")
        self._stream.flush()

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


def _tell_end(*error: Any) -> None:
    say("".join(traceback.format_exception(*error)).rstrip("\n"), "CRITICAL")
