"""The one reader of small files: JSON, JSON lines, arrays of NumPy, text.

A file is read only if it is a regular file below a size limit, and its content must have
the shape that the reader declares. Every fault raises an `InputError` with the file and the
place in it, what was found, and what to do.

A shape is one of:

    str, bool, int, float   a value of this type; an int is a float, a bool is neither
    None                    null
    object                  anything
    (A, B)                  one of several shapes
    [A]                     a list, each of whose values is an A
    {"key": A, "more?": B}  an object with `key` and perhaps `more`; others may be there
    {str: A}                an object, each of whose other values is an A
"""

import io
import json
import math
import os
import re
import stat
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from mixcpt_jax.core import paths
from mixcpt_jax.core.errors import InputError

# For a header, a record or a manifest; the largest config.json has a few KB.
MOST_BYTES = 2**26
# For a vocabulary; the largest have 40 MB.
MOST_BYTES_OF_VOCABULARY = 2**28
# For rows of metrics and samples, and for arrays with one number per document.
MOST_BYTES_OF_ROWS = 2**32
MOST_DEPTH = 64
RESTORE = "restore it from a copy"

# Maximum length of a found value in a message.
_SHOWN = 80
_HALF_OF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
_WORDS = {
    str: "a text",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    object: "a value",
}
_NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}

Shape = Any
OBJECT: Shape = {str: object}


def read_json(
    file: epath.Path,
    shape: Shape = OBJECT,
    remedy: str = RESTORE,
    most_bytes: int = MOST_BYTES,
    *,
    is_ours: bool = True,
) -> Any:
    """Reads a JSON file.

    Args:
      file: local or in a bucket.
      shape: of what it holds.
      remedy: what to do about a damaged file.
      most_bytes: that a file may have.
      is_ours: whether the project wrote it; such files contain no NaN and no infinity.

    Raises:
      InputError: see `read_bytes` and `parse`.
    """
    content = read_bytes(file, remedy, most_bytes)
    return parse(content, str(file), shape, remedy, is_ours=is_ours)


def read_lines(
    file: epath.Path, shape: Shape, remedy: str = RESTORE
) -> list[dict[str, Any]]:
    """Reads JSON lines that the project wrote; a missing file has none.

    A last line without a line end was left by a stopped process, and is dropped.

    Raises:
      InputError: as `read_json`; the place is `file:line`.
    """
    if not file.exists():
        return []
    lines = read_bytes(file, remedy, MOST_BYTES_OF_ROWS).split(b"\n")
    return [
        parse(line, f"{file}:{number}", shape, remedy)
        for number, line in enumerate(lines[:-1], 1)
    ]


def read_text(
    file: epath.Path, remedy: str = RESTORE, most_bytes: int = MOST_BYTES
) -> str:
    """Reads a text file.

    Raises:
      InputError: see `read_bytes`; or it is not UTF-8.
    """
    content = read_bytes(file, remedy, most_bytes)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file}: byte {error.start} is not UTF-8; {remedy}"
        ) from error


def read_bytes(
    file: epath.Path, remedy: str = RESTORE, most_bytes: int = MOST_BYTES
) -> bytes:
    """Reads a whole file.

    Raises:
      InputError: it is missing, not a regular file, too long or not readable.
    """
    require_regular(file, remedy, most_bytes)
    if paths.is_remote(file):
        return file.read_bytes()
    try:
        # The file may have been replaced by now, and reading a pipe would wait for its
        # writer.
        with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
            _require_regular(os.fstat(stream.fileno()), file, remedy)
            content = stream.read(most_bytes + 1)
    except OSError as error:
        raise _unreadable(file, error, remedy) from error
    _require_size(len(content), most_bytes, file, remedy)
    return content


def require_regular(
    file: epath.Path, remedy: str = RESTORE, most_bytes: float = math.inf
) -> None:
    """Checks that a file can be read, before anything opens it.

    Raises:
      InputError: it is missing, not a regular file or too long.
    """
    try:
        if paths.is_remote(file):
            size = file.stat().length
        else:
            status = os.stat(file)
            _require_regular(status, file, remedy)
            size = status.st_size
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        raise _unreadable(file, error, remedy) from error
    _require_size(size, most_bytes, file, remedy)


def _require_regular(status: os.stat_result, file: epath.Path, remedy: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{file}: is no regular file; {remedy}")


def _require_size(size: int, most: float, file: epath.Path, remedy: str) -> None:
    if size > most:
        raise InputError(
            f"{file}: has {size:,} bytes, at most {most:,} are read; {remedy}"
        )


def _unreadable(file: epath.Path, error: Exception, remedy: str) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{file}: no such file; {remedy}")
    reason = getattr(error, "strerror", None) or error
    return InputError(f"{file}: cannot be read ({reason}); {remedy}")


def parse(
    content: str | bytes,
    place: str,
    shape: Shape = object,
    remedy: str = RESTORE,
    *,
    is_ours: bool = True,
) -> Any:
    """Parses JSON.

    Args:
      content: of a file, or of a part of one.
      place: of the content; error messages begin with it.
      shape: of the value.
      remedy: what to do about an error.
      is_ours: as for `read_json`.

    Raises:
      InputError: it is not JSON in UTF-8, is nested deeper than `MOST_DEPTH`, has a
        duplicate key or has another shape. For files that others wrote, also half of a
        surrogate pair.
    """
    try:
        value = _loads(content, is_ours)
    except RecursionError as error:
        raise InputError(f"{place}: {_TOO_DEEP}; {remedy}") from error
    except ValueError as error:
        raise InputError(f"{place}: not JSON ({error}); {remedy}") from error
    check(value, shape, place, remedy)
    return value


_TOO_DEEP = f"is nested deeper than {MOST_DEPTH} levels"


def _loads(content: str | bytes, is_ours: bool) -> Any:
    text = content if isinstance(content, str) else content.decode()
    numbers = {}
    if is_ours:
        numbers = {"parse_float": _finite, "parse_int": _int64, "parse_constant": _none}
    value = json.loads(text, object_pairs_hook=_without_twins, **numbers)
    require_shallow(value)
    # We write file names that are not UTF-8 this way.
    if not is_ours and _HALF_OF_A_PAIR.search(text):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def require_shallow(value: Any) -> None:
    """Checks how deep lists and objects are nested.

    Raises:
      RecursionError: deeper than `MOST_DEPTH`.
    """
    depth, level = 0, [value]
    while level := [entry for container in level for entry in containers(container)]:
        depth += 1
        if depth >= MOST_DEPTH:
            raise RecursionError


def containers(value: Any) -> list[Any]:
    """The lists and objects directly within a value of JSON."""
    match value:
        case dict():
            value = value.values()
        case list():
            pass
        case _:
            return []
    return [entry for entry in value if isinstance(entry, (dict, list))]


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"its key {_shown(key)} is there twice")
            seen.add(key)
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"its number {text[:_SHOWN]} is not finite")
    return value


def _int64(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"its number {text[:_SHOWN]} has more than 64 bits")
    return int(text)


def _none(text: str) -> None:
    raise ValueError(f"it has {text}, which is no number of JSON")


def check(value: Any, shape: Shape, place: str, remedy: str = RESTORE) -> None:
    """Checks a value of JSON against a shape.

    Args:
      value: any.
      shape: see this module's docstring.
      place: of the value; error messages begin with it.
      remedy: error messages end with it.

    Raises:
      InputError: names the first part that has another shape.
    """
    for keys, fault in _faults(value, shape, ()):
        raise InputError(
            f"{place}: {''.join(f'{key}: ' for key in keys)}{fault}; {remedy}"
        )


def _faults(
    value: Any, shape: Shape, keys: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """The keys that lead to each fault, and a description of the fault."""
    if not _is_of_kind(value, shape):
        yield keys, f"is {_shown(value)}, must be {_in_words(shape)}"
    elif isinstance(shape, tuple):
        yield from _faults(value, next(s for s in shape if _is_of_kind(value, s)), keys)
    elif isinstance(shape, list):
        for number, entry in enumerate(value):
            yield from _faults(entry, shape[0], (*keys, f"[{number}]"))
    elif isinstance(shape, dict):
        others = shape.get(str, object)
        named = {name.rstrip("?"): s for name, s in shape.items() if name is not str}
        for name, entry in value.items():
            yield from _faults(entry, named.get(name, others), (*keys, _shown(name)))
        # Optional keys are spelled differently in the shape.
        for name in sorted((named.keys() - value.keys()) & shape.keys()):
            yield keys, f"key {name!r} is missing"


def _is_of_kind(value: Any, shape: Shape) -> bool:
    match shape:
        case None:
            return value is None
        case tuple():
            return any(_is_of_kind(value, one) for one in shape)
        case list() | dict():
            return isinstance(value, type(shape))
    if isinstance(value, bool):
        return shape in (bool, object)
    return isinstance(value, (int, float) if shape is float else shape)


def _in_words(shape: Shape) -> str:
    match shape:
        case None:
            return "null"
        case tuple():
            return " or ".join(map(_in_words, shape))
        case list():
            return "a list"
        case dict():
            return "an object"
    return _WORDS[shape]


def _shown(value: Any) -> str:
    """A short description of a JSON value."""
    match value:
        case dict():
            return "an object"
        case list():
            return "a list"
        case str():
            return ascii(value[:_SHOWN])
        case int() if value.bit_length() > 64:
            return "an integer of more than 64 bits"
    return json.dumps(value)


def read_npz(
    file: epath.Path,
    arrays: Mapping[str | type[str], tuple[str, int]],
    remedy: str = RESTORE,
    most_bytes: int = MOST_BYTES_OF_ROWS,
) -> dict[str, np.ndarray]:
    """Reads arrays that the project wrote by `np.savez`.

    Args:
      file: local or in a bucket.
      arrays: name -> kinds of the dtype, such as "iu", and number of dimensions; the name
        `str` stands for all other arrays, which are otherwise not read.
      remedy: what to do about a damaged file.
      most_bytes: that a file may have.

    Raises:
      InputError: see `read_bytes`; or the file is damaged or lacks one of these arrays.
    """
    content = read_bytes(file, remedy, most_bytes)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            found = {info.filename: info for info in archive.infolist()}
            names = {name for name in arrays if name is not str}
            if str in arrays:
                names |= {name.removesuffix(".npy") for name in found}
            parts = {}
            for name in sorted(names):
                info = found[f"{name}.npy"]
                # A compressed array could have any size.
                if info.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"array {name!a} is compressed")
                parts[name] = archive.read(info)
    except Exception as error:  # a damaged archive can raise anything
        raise InputError(f"{file}: is damaged ({error!r:.200}); {remedy}") from error
    return {
        name: _array(
            part, f"{file}: array {name!a}", *arrays.get(name, arrays.get(str)), remedy
        )
        for name, part in parts.items()
    }


def read_npy(
    file: epath.Path,
    kinds: str,
    num_dims: int,
    remedy: str = RESTORE,
    most_bytes: int = MOST_BYTES_OF_ROWS,
) -> np.ndarray:
    """Reads an array that the project wrote by `np.save`; see `read_npz`."""
    content = read_bytes(file, remedy, most_bytes)
    return _array(content, str(file), kinds, num_dims, remedy)


def _array(
    content: bytes, place: str, kinds: str, num_dims: int, remedy: str
) -> np.ndarray:
    """Reads the array of a `.npy` file, after checking its header against its size."""
    stream = io.BytesIO(content)
    try:
        read_header = _NPY_HEADERS[np.lib.format.read_magic(stream)]
        with warnings.catch_warnings(action="error"):  # such as of Python 2's headers
            shape, is_fortran, dtype = read_header(stream)
        size, rest = math.prod(shape) * dtype.itemsize, len(content) - stream.tell()
        is_right = dtype.kind in kinds and len(shape) == num_dims
        if not is_right or size != rest or dtype.hasobject:
            raise ValueError(f"it has {rest:,} bytes of {dtype} {shape}")
    except Exception as error:  # a damaged header can raise anything
        raise InputError(f"{place}: is damaged ({error!r:.200}); {remedy}") from error
    flat = np.frombuffer(content, dtype, offset=stream.tell())
    return flat.reshape(shape, order="F" if is_fortran else "C").copy()
