"""Files to records: JSON lines, plain text and the docstrings of installed packages."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator

from etils import epath

from mixcpt_jax import paths
from mixcpt_jax.data import docstrings
from mixcpt_jax.errors import InputError

_READER_OF_SUFFIX = {".jsonl": "jsonl", ".txt": "text", ".md": "text"}
_TEXT_SUFFIXES = (".txt", ".md")
_WILDCARD = re.compile(r"[*?\[]")


@dataclasses.dataclass(frozen=True)
class Record:
    """One document or sample as it stands in its source.

    Attributes:
      fields: field name -> value, as read.
      place: where it was found, `file:line` or a file or a dotted name; error
        messages begin with it.
    """

    fields: dict
    place: str


def read(path: str, reader: str = "") -> Iterator[Record]:
    """Reads the records of `path`, in a fixed order.

    Args:
      path: for 'jsonl' and 'text' a file, a folder ('text': the tree of its .txt and
        .md files; 'jsonl': the tree of its .jsonl files), a glob, or several of these
        separated by commas, each local, `gs://` or `package:NAME/FILE`. For
        'docstrings' the names of installed packages, separated by commas.
      reader: 'jsonl' (one object a line), 'text' (one record `{'id', 'text'}` a
        file), 'docstrings' (see `docstrings.records`), or '' to go by the suffix.

    Raises:
      InputError: at once if the reader is unknown or no file matches; while reading,
        for a line that is not UTF-8, not JSON or not an object, and for a file or a
        source without records.
    """
    reader = reader or _guess_reader(path)
    if reader == "docstrings":
        return _read_docstrings(path)
    if reader == "text":
        return _read_text(_find(path, _TEXT_SUFFIXES), path)
    if reader == "jsonl":
        return _read_jsonl(_find(path, (".jsonl",)))
    raise InputError(
        f"{path}: unknown reader {reader!r}; use 'jsonl', 'text' or 'docstrings'"
    )


def hashes(path: str, reader: str = "") -> dict[str, str]:
    """What `read` reads: file -> 16 hex digits of its hash, or package -> version."""
    reader = reader or _guess_reader(path)
    if reader == "docstrings":
        names = [name.strip() for name in path.split(",")]
        return {name: docstrings.version(name) for name in names}
    suffixes = _TEXT_SUFFIXES if reader == "text" else (".jsonl",)
    return {str(file): _file_hash(file) for file in _find(path, suffixes)}


def _file_hash(file: epath.Path) -> str:
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=8))
    return digest.hexdigest()


def split_holdout(
    records: Iterable[Record], num_records: int, seed: int
) -> tuple[list[Record], list[Record]]:
    """Splits off `num_records` records for evaluation: `(held_in, held_out)`.

    The choice goes by a hash of the content, so it does not depend on the order of
    the records and hardly on what else is in the source. Exact copies of a held-out
    record are dropped from both sides, lest the model is trained on them.

    Raises:
      InputError: there are not more than `num_records` distinct records.
    """
    records = list(records)
    keys = [_content_key(record, seed) for record in records]
    chosen = set(sorted(set(keys))[:num_records])
    if num_records and len(set(keys)) <= num_records:
        place = records[0].place if records else "source"
        raise InputError(
            f"{place}: cannot hold out {num_records} of {len(set(keys))} distinct "
            "records; hold out fewer"
        )
    held_in, held_out = [], {}
    for key, record in zip(keys, records, strict=True):
        if key in chosen:
            held_out.setdefault(key, record)
        else:
            held_in.append(record)
    return held_in, list(held_out.values())


def _content_key(record: Record, seed: int) -> bytes:
    # An id says where a text came from, which is no part of what it says.
    fields = {name: value for name, value in record.fields.items() if name != "id"}
    content = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.blake2b(f"{seed} {content}".encode()).digest()


def _guess_reader(path: str) -> str:
    suffix = epath.Path(path.split(",")[-1].strip()).suffix
    if suffix in _READER_OF_SUFFIX:
        return _READER_OF_SUFFIX[suffix]
    if paths.resolve(path.split(",")[0].strip()).is_dir():
        return "text"
    raise InputError(
        f"{path}: no such folder, and no reader goes with the suffix {suffix!r}; check "
        "the path or set the source's `reader` to 'jsonl', 'text' or 'docstrings'"
    )


def _find(path: str, suffixes: tuple[str, ...]) -> list[epath.Path]:
    """The files that a path setting stands for, each part's in sorted order."""
    files = []
    for part in filter(None, (part.strip() for part in path.split(","))):
        found = _find_one(part, suffixes)
        if not found:
            raise InputError(f"{part}: no file matches; check the path")
        files += found
    if not files:
        raise InputError("the path of a source is empty; name a file")
    return files


def _find_one(part: str, suffixes: tuple[str, ...]) -> list[epath.Path]:
    resolved = paths.resolve(part)
    if resolved.is_dir():
        return list(_tree(resolved, suffixes))
    if resolved.exists():
        return [resolved]
    if "**" in part:
        raise InputError(f"{part}: ** is not supported; name the folder instead")
    wildcard = _WILDCARD.search(str(resolved))
    if not wildcard:
        return []
    # The folder above the first wildcard; a glob is relative to it.
    root, slash, _ = str(resolved)[: wildcard.start()].rpartition("/")
    pattern = str(resolved)[len(root + slash) :]
    matches = epath.Path(root + slash or ".").glob(pattern)
    return sorted(file for file in matches if file.is_file())


def _tree(folder: epath.Path, suffixes: tuple[str, ...]) -> Iterator[epath.Path]:
    # `Path.walk` drops the `gs://` of its folders.
    for child in sorted(folder.iterdir()):
        if child.is_dir():
            yield from _tree(child, suffixes)
        elif child.name.endswith(suffixes):
            yield child


def _read_jsonl(files: list[epath.Path]) -> Iterator[Record]:
    for file in files:
        found = 0
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    place = f"{file}:{number}"
                    yield Record(parse_line(line, place), place)
                    found += 1
        if not found:
            raise InputError(
                f"{file}: has no records; one JSON object a line is wanted"
            )


def parse_line(line: bytes, place: str) -> dict:
    """Parses one line of JSON lines.

    Raises:
      InputError: it is not UTF-8, not JSON or not an object.
    """
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place}: not UTF-8 (byte {error.start} of the line); convert the file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{place}: not JSON ({error}); one object a line is wanted"
        ) from error
    if not isinstance(fields, dict):
        raise InputError(
            f"{place}: a JSON {type(fields).__name__}, an object such as "
            '{"text": "..."} is wanted'
        )
    return fields


def _read_text(files: list[epath.Path], path: str) -> Iterator[Record]:
    found = 0
    for file in files:
        content = file.read_bytes()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise InputError(
                f"{file}:{line}: not UTF-8 (byte {error.start} of the file); convert it"
            ) from error
        if text.strip():
            yield Record({"id": str(file), "text": text}, str(file))
            found += 1
    if not found:
        raise InputError(f"{path}: has no text; every file found is empty")


def _read_docstrings(packages: str) -> Iterator[Record]:
    for fields in _docstrings(tuple(name.strip() for name in packages.split(","))):
        yield Record(fields, fields["id"])


@functools.lru_cache(maxsize=1)
def _docstrings(packages: tuple[str, ...]) -> list[dict]:
    # Parsing takes seconds, and every phase of a run asks for the same.
    return docstrings.records(packages)
