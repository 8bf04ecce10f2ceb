"""Whatever a small file is and holds, it is read or refused in one line."""

import contextlib
import io
import json
import os
import re
import socket
import zipfile

import hypothesis
import numpy as np
import pytest
from etils import epath
from hypothesis import strategies as st

from mixcpt_jax.core import small_files
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.core.small_files import OBJECT

READERS = {
    "json": small_files.read_json,
    "lines": lambda file: small_files.read_lines(file, object),
    "text": small_files.read_text,
    "bytes": small_files.read_bytes,
    "npz": lambda file: small_files.read_npz(file, {"x": ("f", 1)}),
    "npy": lambda file: small_files.read_npy(file, "f", 1),
    "stat": small_files.require_regular,
}


def refused(read, *args, **kwargs):
    """The message, which is one line that any terminal can print."""
    with pytest.raises(InputError) as error:
        read(*args, **kwargs)
    message = str(error.value)
    assert message.isascii(), message
    assert message.isprintable(), message
    assert len(message) < 1000
    return message


def fifo(file):
    os.mkfifo(file)


def listening(file):
    with socket.socket(socket.AF_UNIX) as server:
        # The path of a socket may be no longer than a hundred characters.
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            server.bind(f"/proc/self/fd/{folder}/{file.name}")
        finally:
            os.close(folder)


def link_to_fifo(file):
    os.mkfifo(file.with_name("fifo"))
    file.symlink_to("fifo")


NOT_REGULAR = {
    "fifo": fifo,
    "folder": os.mkdir,
    "socket": listening,
    "link to fifo": link_to_fifo,
    "link to device": lambda file: file.symlink_to("/dev/zero"),
    "link to terminal": lambda file: file.symlink_to("/dev/tty"),
    "link to folder": lambda file: file.symlink_to("/"),
    "link to itself": lambda file: file.symlink_to(file),
}


@pytest.mark.parametrize("make", NOT_REGULAR.values(), ids=NOT_REGULAR)
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_nothing_but_regular_files_is_opened(tmp_path, read, make):
    """A pipe would hang, a device never end."""
    make(tmp_path / "file")
    if read is READERS["lines"] and not (tmp_path / "file").exists():
        assert read(epath.Path(tmp_path / "file")) == []
        return
    message = refused(read, epath.Path(tmp_path / "file"))
    assert re.match(rf"{tmp_path}/file: (is no regular file|cannot be read)", message)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_missing_file(tmp_path, read):
    if read is READERS["lines"]:
        assert read(epath.Path(tmp_path / "none")) == []
    else:
        message = refused(read, epath.Path(tmp_path / "none"))
        assert "none: no such file; restore it from a copy" in message


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_file_above_the_bound_is_not_read(tmp_path, read):
    with open(tmp_path / "file", "wb") as file:
        file.truncate(2**40)
    if read is READERS["stat"]:
        return
    message = refused(read, epath.Path(tmp_path / "file"))
    assert "has 1,099,511,627,776 bytes, at most" in message


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"a":', "[[0],"])
@pytest.mark.parametrize("depth", [65, 1000, 100_000])
@pytest.mark.parametrize("is_closed", [False, True])
def test_nesting_has_a_bound(opening, depth, is_closed):
    text = opening * depth
    if is_closed:
        closing = {"[": "]", "{": "}"}
        unclosed = "[" if opening == "[[0]," else opening
        text += "0" + "".join(closing.get(c, "") for c in unclosed[::-1]) * depth
    message = refused(small_files.parse, text, "a.json", is_ours=False)
    if is_closed or depth == 100_000:
        assert message.startswith("a.json: is nested deeper than 64 levels; ")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("NaN", "it has NaN, which is no number of JSON"),
        ('{"a": -Infinity}', "it has -Infinity, which is no number of JSON"),
        ("[1e999]", "its number 1e999 is not finite"),
        ("1" + "0" * 30, "its number 1000.* has more than 64 bits"),
        ("1" + "0" * 5000, "its number 1000.* has more than 64 bits"),
    ],
)
def test_our_own_files_hold_numbers_of_json(text, found):
    message = refused(small_files.parse, text, "metrics.jsonl:3")
    assert re.match(rf"metrics.jsonl:3: not JSON \({found}\); restore it", message)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 1}}', r"its key 'c' is there twice"),
        (r'{"a\u202e": 1, "a\u202e": 2}', r"its key 'a\\u202e' is there twice"),
        (b"\xff{}", "invalid start byte"),
        ("{}".encode("utf-16"), "invalid start byte"),
        ("{} {}", "Extra data"),
        ("", "Expecting value"),
    ],
)
@pytest.mark.parametrize("is_ours", [False, True])
def test_what_is_no_json_is_refused(text, found, is_ours):
    message = refused(small_files.parse, text, "a.json", is_ours=is_ours)
    assert re.search(rf"a.json: not JSON \(.*{found}", message)


@pytest.mark.parametrize("text", [r'["\ud800"]', r'{"\uDFFF": 1}'])
def test_others_write_text(text):
    """We ourselves write names of files that are not UTF-8 so."""
    message = refused(small_files.parse, text, "a.json", is_ours=False)
    assert "surrogates not allowed" in message
    small_files.parse(text, "provenance.json")


def test_others_may_write_nan_and_pairs_of_surrogates():
    parsed = small_files.parse('[NaN, "\\ud83d\\ude00"]', "a.json", is_ours=False)
    assert np.isnan(parsed[0])
    assert parsed[1] == "😀"


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@hypothesis.given(value=VALUES, is_ascii=st.booleans())
def test_what_json_writes_is_read_back(value, is_ascii):
    text = json.dumps(value, ensure_ascii=is_ascii)
    hypothesis.assume(is_ascii or text.isprintable())
    assert small_files.parse(text.encode(), "a.json") == value


SHAPES = st.recursive(
    st.sampled_from([str, int, float, bool, None, object]),
    lambda inner: (
        inner.map(lambda shape: [shape])
        | st.tuples(inner, inner)
        | st.dictionaries(st.sampled_from(["a", "b?", str]), inner)
    ),
    max_leaves=5,
)


def fits(value, shape):
    """Whether a value has a shape, written anew."""
    if isinstance(shape, tuple):
        return any(fits(value, one) for one in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(v, shape[0]) for v in value)
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return False
        for key, entry in value.items():
            wanted = next((s for k, s in shape.items() if k in (key, f"{key}?")), None)
            named = key in shape or f"{key}?" in shape
            if not named and str not in shape:
                continue
            if not fits(entry, wanted if named else shape[str]):
                return False
        return "a" not in shape or "a" in value
    if shape in (None, object):
        return shape is object or value is None
    kinds = {float: (int, float)}.get(shape, (shape,))
    return type(value) in kinds


@hypothesis.given(
    value=st.recursive(
        st.sampled_from([None, True, 1, 1.5, "x\x1b[1m", 10**40]),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from(["a", "b", "\n"]), inner)
        ),
        max_leaves=6,
    ),
    shape=SHAPES,
)
def test_a_value_has_its_shape_or_is_refused(value, shape):
    is_union = "(" in repr(shape)  # of two objects the first one counts
    if is_union or fits(value, shape):
        try:
            small_files.check(value, shape, "a.json")
        except InputError:
            assert is_union
    else:
        assert refused(small_files.check, value, shape, "a.json")[:6] == "a.json"


def test_a_fault_has_a_place():
    shape = {"rows": [{"step": int, "more?": (str, None), str: float}]}
    for value, fault in (
        ([], "is a list, must be an object"),
        ({}, "key 'rows' is missing"),
        ({"rows": [{"step": 1}, {}]}, "'rows': [1]: key 'step' is missing"),
        (
            {"rows": [{"step": True}]},
            "'rows': [0]: 'step': is true, must be an integer",
        ),
        (
            {"rows": [{"step": 1, "more": 2}]},
            "'rows': [0]: 'more': is 2, must be a text or null",
        ),
        (
            {"rows": [{"step": 1, "a\nb": "x"}]},
            r"'rows': [0]: 'a\nb': is 'x', must be a number",
        ),
    ):
        message = refused(small_files.check, value, shape, "a.json", "remove it")
        assert message == f"a.json: {fault}; remove it"


def test_lines_have_numbers_and_a_cut_one_is_left_out(tmp_path):
    file = epath.Path(tmp_path / "metrics.jsonl")
    file.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert small_files.read_lines(file, OBJECT) == [{"step": 1}, {"step": 2}]
    file.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    message = refused(small_files.read_lines, file, OBJECT)
    assert message.startswith(f"{file}:2: not JSON (Unterminated string")
    file.write_text('{"step": 1}\n[]\n')
    message = refused(small_files.read_lines, file, OBJECT)
    assert message.startswith(f"{file}:2: is a list, must be an object")


ARRAYS = {"x": ("f", 2), "n": ("iu", 0), "key": ("U", 0)}


def saved():
    buffer = io.BytesIO()
    np.savez(buffer, x=np.ones((2, 3)), n=3, key="abc", other=[1])
    return buffer.getvalue()


def test_arrays_are_read_back(tmp_path):
    file = epath.Path(tmp_path / "a.npz")
    file.write_bytes(saved())
    found = small_files.read_npz(file, ARRAYS)
    assert found.keys() == ARRAYS.keys()
    others = small_files.read_npz(file, {"n": ("i", 0), str: ("i", 1)} | ARRAYS)
    assert others.keys() == {*ARRAYS, "other"}
    np.testing.assert_array_equal(found["x"], np.ones((2, 3)))
    assert (int(found["n"]), str(found["key"])) == (3, "abc")
    found["x"][0] = 2  # it may be written to
    np.save(tmp_path / "a.npy", np.asfortranarray(np.arange(6).reshape(2, 3)))
    found = small_files.read_npy(epath.Path(tmp_path / "a.npy"), "i", 2)
    np.testing.assert_array_equal(found, np.arange(6).reshape(2, 3))


@hypothesis.given(data=st.data())
def test_damaged_arrays_are_refused_or_whole(tmp_path, data):
    content, file = bytearray(saved()), epath.Path(tmp_path / "a.npz")
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    file.write_bytes(bytes(content[: data.draw(st.integers(1, len(content)))]))
    with contextlib.suppress(InputError):
        found = small_files.read_npz(file, ARRAYS)
        assert found["x"].shape == (2, 3)


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (10**12,), }",
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }",
        b"(" * 5000,
    ],
)
def test_an_array_is_as_long_as_its_file(tmp_path, header):
    """Its header alone would make NumPy reserve any memory, or unpickle."""
    start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
    (tmp_path / "a.npy").write_bytes(start + header + bytes(8))
    refused(small_files.read_npy, epath.Path(tmp_path / "a.npy"), "fO", 1)


def test_a_compressed_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", bytes(2**20))
    read = small_files.read_npz, epath.Path(tmp_path / "a.npz"), {"x": ("f", 1)}
    assert "array 'x' is compressed" in refused(*read)
