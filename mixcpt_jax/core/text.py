"""Text that comes from data: made safe to show, and names that stay in their folder."""

import re
from typing import Any

# Maximum number of characters shown of a value, and of a line with several values.
MOST_OF_A_VALUE = 300
MOST_OF_A_LINE = 2000
# Maximum length of names in file systems.
_MOST_NAME_BYTES = 255

# Terminal control and text direction characters, and halves of surrogate pairs; not tab or
# line feed.
_CONTROLS = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    r"\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e0fff"
)
_IN_LINES = re.compile(f"[{_CONTROLS}]")
_IN_A_LINE = re.compile(rf"[\t\n{_CONTROLS}]")
_LONG_WORD = re.compile(rf"\S{{{MOST_OF_A_VALUE + 1},}}")


def escaped(text: str) -> str:
    """Escapes control characters as Python does, except tabs and line feeds."""
    return _IN_LINES.sub(_escape, text)


def value(text: str) -> str:
    """A value on one line, escaped and truncated."""
    return _cut(_IN_A_LINE.sub(_escape, text), MOST_OF_A_VALUE)


def lines(text: str) -> str:
    """Lines that hold values: escaped, with each word and each line truncated."""
    text = _LONG_WORD.sub(lambda word: _cut(word[0], MOST_OF_A_VALUE), escaped(text))
    return "\n".join(_cut(line, MOST_OF_A_LINE) for line in text.split("\n"))


def _escape(found: re.Match) -> str:
    return found[0].encode("unicode_escape").decode()


def _cut(text: str, most: int) -> str:
    """The text, or only its beginning and end if it is longer."""
    if len(text) <= most:
        return text
    end = (most - 3) // 3
    return f"{text[: most - 3 - end]}...{text[-end:]}"


def is_name(text: Any) -> bool:
    """Whether a text is the name of a file or folder, and not a path to elsewhere."""
    return (
        isinstance(text, str)
        and text not in ("", ".", "..")
        and text.isprintable()
        and not set(text) & {"/", "\\"}
        and len(text.encode()) <= _MOST_NAME_BYTES
    )
