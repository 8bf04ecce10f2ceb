"""Text that comes from data: made safe to show, and names that stay in their folder."""

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator
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


def nearest(name: str, known: Iterable[str]) -> str:
    """Asks for the known name that is like an unknown one; empty if none is."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else ""


def advice(name: str, known: Iterable[str]) -> str:
    """The remedy for an unknown name: the nearest known one, else all of them."""
    known = list(known)
    return nearest(name, known) or f"known here: {', '.join(known) or 'none'}"


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


def folded(text: str, width: int) -> str:
    """Divides each Markdown table that is wider than `width` into narrower ones.

    Each part begins with the first column. A table of one other column stays as wide as it
    is, as do lines that are not of a table.
    """
    parts = itertools.groupby(text.split("\n"), lambda line: line.startswith("| "))
    return "\n".join(
        line
        for is_table, found in parts
        for line in (_narrower(list(found), width) if is_table else found)
    )


def _narrower(table: list[str], width: int) -> Iterator[str]:
    rows = [line[2:-2].split(" | ") for line in table]
    if len(table[0]) <= width or len({len(row) for row in rows}) > 1:
        yield from table
        return
    widths = [len(cell) + len(" | ") for cell in rows[0]]
    first = begin = 1
    while begin < len(widths):
        end, total = begin + 1, widths[0] + widths[begin] + 1
        while end < len(widths) and total + widths[end] <= width:
            total += widths[end]
            end += 1
        if begin > first:
            yield ""
        yield from (f"| {' | '.join([row[0], *row[begin:end]])} |" for row in rows)
        begin = end


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
