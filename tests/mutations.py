"""Files that were damaged or forged: random changes of bytes, of JSON, of the file itself.

A test tries as many as a property test does, see `conftest.py`.
"""

import json
import os
import random
import shutil

import hypothesis

EXAMPLES = hypothesis.settings.default.max_examples

# As they stand in JSON.
_VALUES = [
    "null", "true", "false", "-1", "0", "1", "2147483648", "9223372036854775808",
    "-9223372036854775809", "1" + "0" * 400, "1" + "0" * 5000, "1e308", "-1e308", "1e999",
    "5e-324", "0.5", "NaN", "Infinity", "-Infinity", '""', '"0"', '"/etc/passwd"',
    '"../x"', '"a\\u0000b"', '"\\u001b[2J"', '"\\r\\n"', '"\\u202e"', '"\\ud800"',
    '"' + "x" * 5000 + '"', "[]", "{}", "[[]]", '[{"step": 1}]', '{"": {}}',
    "[" * 100_000 + "]" * 100_000, '{"a":' * 1000 + "1" + "}" * 1000,
]  # fmt: skip


class _Raw(float):
    """A number that is written as it is given."""

    def __new__(cls, text: str):
        self = super().__new__(cls, 0)
        self.text = text
        return self

    def __repr__(self):
        return self.text


def _write(value) -> str:
    match value:
        case _Raw():
            return value.text
        case dict():
            pairs = (f"{json.dumps(key)}: {_write(v)}" for key, v in value.items())
            return f"{{{', '.join(pairs)}}}"
        case list():
            return f"[{', '.join(map(_write, value))}]"
    return json.dumps(value)


def _nodes(value):
    """(container, key) of every value within one."""
    entries = ()
    if isinstance(value, dict):
        entries = value.items()
    elif isinstance(value, list):
        entries = enumerate(value)
    for key, entry in list(entries):
        yield value, key
        yield from _nodes(entry)


def change_json(text: str, rng: random.Random) -> str:
    """Changes one value, key or number of values within JSON."""
    root = [json.loads(text)]
    container, key = rng.choice(list(_nodes(root)))
    value = container[key]
    match rng.randrange(6):
        case 0 if isinstance(container, dict):
            del container[key]
        case 1 if isinstance(container, dict):
            container[rng.choice(["", "step", key.upper(), "a\0", "é" * 300])] = value
            del container[key]
        case 2 if isinstance(value, (list, str)) and value:
            container[key] = value[: rng.randrange(len(value))]
        case 3 if isinstance(value, (list, str)):
            container[key] = value * 3
        case 4 if isinstance(container, dict):
            twin = f"{json.dumps(key)}: {rng.choice(_VALUES[:10])}, "
            return "{" + twin + _write(root[0])[1:]
        case _:
            container[key] = _Raw(rng.choice(_VALUES))
    return _write(root[0]) if root else ""


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """Changes some bytes, or cuts some out, or puts some in."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        begin = rng.randrange(len(changed) + 1)
        end = min(len(changed), begin + rng.choice([0, 1, 1, 1, 4, 8, 100]))
        new = rng.choice(
            [
                b"", b"\0", b"\xff", b"\x1b[2J", b"\r", b"\n", b'"', b"{", b"]", b"-",
                rng.randbytes(1), rng.randbytes(8), bytes(8), b"\xff" * 8,
            ]
        )  # fmt: skip
        changed[begin:end] = new
    if rng.random() < 0.1:
        del changed[rng.randrange(len(changed) + 1) :]
    return bytes(changed)


def change_lines(text: str, rng: random.Random) -> str:
    """Changes JSON lines: one line, their order or their number."""
    lines = text.splitlines()
    number = rng.randrange(len(lines))
    match rng.randrange(6):
        case 0:
            del lines[number]
        case 1:
            lines.insert(number, rng.choice(lines))
        case 2:
            rng.shuffle(lines)
        case _:
            lines[number] = change_json(lines[number], rng)
    return "\n".join(lines) + rng.choice(["\n", ""])


def replace(file, others, rng: random.Random) -> None:
    """Puts something else in a file's place."""
    file.unlink()
    match rng.randrange(7):
        case 0:
            file.mkdir()
        case 1:
            os.mkfifo(file)
        case 2:
            file.symlink_to("/dev/zero")
        case 3:
            file.symlink_to(file.name)
        case 4:
            shutil.copy(rng.choice(others), file)
        case 5:
            file.touch()


def change(file, others, rng: random.Random) -> None:
    """Changes a file of JSON, JSON lines or anything else in one way.

    Args:
      file: a `pathlib.Path`.
      others: files that it may be mistaken for.
      rng: which way.
    """
    how, content = rng.random(), file.read_bytes()
    if how < 0.1:
        replace(file, others, rng)
    elif how < 0.4 or file.suffix not in (".json", ".jsonl"):
        file.write_bytes(change_bytes(content, rng))
    else:
        change_text = change_json if file.suffix == ".json" else change_lines
        file.write_text(change_text(content.decode(), rng))
