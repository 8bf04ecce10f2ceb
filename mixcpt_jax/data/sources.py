"""Reads the records of a source from its path, hashes its files, chooses its holdout."""

import dataclasses
import functools
import hashlib
import heapq
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator

from etils import epath

from mixcpt_jax.config.defaults import MAX_EXPANSION
from mixcpt_jax.core import paths
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import documents, files, filters, hub, readers
from mixcpt_jax.data.files import Part
from mixcpt_jax.data.readers import OnBad, Record

READERS = files.READERS
_READ_FILE = {
    "text": documents.text,
    "html": documents.html,
    "pdf": documents.pdf,
    "docx": documents.docx,
    "csv": documents.table,
    "json": readers.json_array,
    "parquet": readers.parquet,
    "arrow": readers.arrow,
    "array_record": readers.array_record,
}
# Their libraries read only local disks, and only paths in UTF-8.
_LOCAL_ONLY = ("array_record", "tfds")
_KEY_BYTES = 64


def read(
    path: str,
    reader: str = "",
    split: str = "",
    on_bad: OnBad | None = None,
    max_expansion: float = MAX_EXPANSION,
) -> Iterator[Record]:
    """Reads the records of `path`, in a fixed order.

    The order is: the parts of a list as given; the files and folders in a folder or a glob
    by name; lines, rows and records as in their file; the shards of a saved dataset in the
    order that it records.

    Args:
      path: a file, a folder, a glob, or several of these separated by commas, each local,
        `gs://`, `package:NAME/FILE` or on the Hub, see `hub`; ArrayRecord and TFDS on
        `gs://` are copied while they are read. A local path that exists literally is taken
        as one name, whatever commas and wildcards it has. A folder is read recursively,
        each file once: files by their suffix; folders written by `datasets.save_to_disk`
        or TFDS (as ArrayRecord) as datasets. Skipped files are logged, see `files.Found`.
      reader: 'jsonl' (one object per line; .jsonl, .jsonl.gz, .jsonl.zst), 'text' (one
        record `{'id', 'text'}` per file; .txt, .md, .rst), 'html', 'pdf' and 'docx' (the
        same), 'csv' (one record per row; .csv, .tsv), 'json' (an array
        of objects; a .json that is named itself), 'parquet', 'arrow' (IPC streams and
        files, and saved datasets), 'array_record' (JSON objects or else texts
        `{'text'}`), 'tfds', or '' to go by the suffixes. With a reader, a named file may
        have any suffix, and in a folder only the files of that reader are read.
      split: of a folder whose files are named by the Hub's conventions, of a saved
        DatasetDict, or of a TFDS dataset, as TFDS writes it ('train', 'train[:10%]');
        'all' for every file; '' for 'train' if there are several, or for the only one.
      on_bad: called with the error of each record that cannot be read, and of each
        damaged file after the records before the damage; reading then continues. None
        raises the error, except that of a text without content.
      max_expansion: see `config.source`.

    Raises:
      InputError: at once if the reader or the split is unknown or nothing is found;
        while reading, unless there is `on_bad`, for a line or record that its reader
        cannot read, for a damaged file, for one that expands beyond bounds, and for one
        without records (of 'text' for a source without).
    """
    found = files.find(path, reader, split)
    documents.require_libraries(found.by_reader())
    found.warn(path)
    return read_parts(found.parts, on_bad, max_expansion)


def read_parts(
    parts: Iterable[Part], on_bad: OnBad | None, max_expansion: float
) -> Iterator[Record]:
    """Reads the records of files that `files.find` has found; see `read`."""
    of_part = functools.partial(_read_part, max_expansion=max_expansion)
    empty: list[InputError] = []
    on_bad = on_bad or readers.handler("refuse", empty.append)
    return _read_parts(parts, on_bad, of_part, empty)


def not_read(path: str, reader: str = "", split: str = "") -> dict[str, list[str]]:
    """Reason -> the files below `path` that `read` passes over, see `files.Found`."""
    return {} if reader else files.find(path, reader, split).not_read()


def hashes(path: str, reader: str = "", split: str = "") -> dict[str, str]:
    """The files that `read` reads -> their hashes, 16 hex digits each."""
    read = []
    for part in files.find(path, reader, split).parts:
        if part.reader == "tfds":
            try:
                read += readers.tfds_files(part.path, part.split)
            except Exception as error:
                raise _damaged(part, None, error) from error
        else:
            read.append(part.path)
        if part.reader == "arrow" and (part.path.parent / "state.json").exists():
            read.append(part.path.parent / "state.json")  # the order of the shards
    return {str(file): _file_hash(file) for file in read}


def _file_hash(file: epath.Path) -> str:
    if isinstance(file, hub.HubPath):
        return file.digest
    if not file.exists():
        return "missing"  # a shard of a dataset; `read` raises the error
    return paths.hash_of(file)


def choose_holdout(
    records: Iterable[Record],
    text_of: Callable[[Record], str],
    num_records: int,
    seed: int,
    where: str = "source",
) -> dict[bytes, Record]:
    """Chooses the records that are measured and not trained on; `content_key` -> record.

    The choice depends on a hash of the text, so it does not depend on the order of the
    records, and hardly on the other records in the source. Records without text are never
    chosen, and only one of several records with the same text is.

    Args:
      records: read once; at most `num_records` are kept in memory.
      text_of: the text of a record.
      num_records: how many to choose; 0: none.
      seed: of the choice.
      where: the origin of the records, for the error.

    Raises:
      InputError: there are not more than `num_records` distinct records.
    """
    if not num_records:
        return {}
    chosen: dict[bytes, Record] = {}
    largest: list[int] = []  # a heap of the chosen keys as negative numbers
    are_more = False
    for record in records:
        text = text_of(record)
        if not text:
            continue
        key = content_key(text, seed)
        if key in chosen:
            chosen[key] = min(chosen[key], record, key=_spelling)
            continue
        chosen[key] = record
        heapq.heappush(largest, -int.from_bytes(key))
        if len(chosen) > num_records:
            are_more = True
            del chosen[(-heapq.heappop(largest)).to_bytes(_KEY_BYTES)]
    if not are_more:
        raise InputError(
            f"{where}: cannot hold out {num_records} of the {len(chosen)} distinct "
            "records there are; give more of them (one text file, or one line of JSON "
            "lines, is one record), or hold out fewer by --config.sources.NAME.holdout"
        )
    return chosen


def content_key(text: str, seed: int) -> bytes:
    """A hash of a text, the same for texts with the same `filters.digest`."""
    content = f"{seed} ".encode() + filters.digest(text)
    return hashlib.blake2b(content, digest_size=_KEY_BYTES).digest()


def _spelling(record: Record) -> str:
    return json.dumps(record.fields, sort_keys=True, default=str)


def _read_parts(
    parts: list[Part],
    on_bad: OnBad,
    read_part: Callable[[Part, OnBad], Iterator[Record]],
    empty: list[InputError],
) -> Iterator[Record]:
    """The records of all parts; raises the first of `empty` if there are none."""
    num_records = 0
    for part in parts:
        place = None
        try:
            for record in read_part(part, on_bad):
                num_records += 1
                place = record.place
                yield dataclasses.replace(record, kind=part.reader)
        except InputError:
            raise
        except Exception as error:  # libraries share no class for damage
            on_bad(_damaged(part, place, error))
    if not num_records and empty:
        raise empty[0]


def _read_part(
    part: Part, on_bad: OnBad, max_expansion: float = MAX_EXPANSION
) -> Iterator[Record]:
    is_plain = paths.is_utf8(part.path) and not paths.is_remote(part.path)
    if part.reader in _LOCAL_ONLY and not is_plain:
        return _read_copy(part, on_bad)
    if part.reader == "tfds":
        return readers.tfds(part.path, part.split, on_bad)
    if part.reader == "jsonl":
        return readers.jsonl(part.path, on_bad, max_expansion)
    return _READ_FILE[part.reader](part.path, on_bad)


def _read_copy(part: Part, on_bad: OnBad) -> Iterator[Record]:
    """Reads a copy on the local disk, which is deleted after reading."""
    with tempfile.TemporaryDirectory(prefix="mixcpt-source-") as folder:
        copy = epath.Path(folder) / paths.shown(part.path.name)

        def here(text: str) -> str:
            return text.replace(str(copy), str(part.path))

        originals = [part.path]
        if part.reader == "tfds":
            copy.mkdir()
            originals = readers.tfds_files(part.path, part.split)
        for file in originals:
            target = copy / file.name if copy.is_dir() else copy
            paths.copy_file(file, target)
        try:
            for record in _read_part(
                part._replace(path=copy), lambda e: on_bad(InputError(here(str(e))))
            ):
                yield dataclasses.replace(record, place=here(record.place))
        except InputError as error:
            raise InputError(here(str(error))) from error


def _damaged(part: Part, place: str | None, error: Exception) -> InputError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(":")
    if place:
        return InputError(
            f"{place}: after this record the file is damaged ({reason}); write or download "
            "it again"
        )
    return InputError(
        f"{part.path}: cannot be read as {part.reader} ({reason}); write or download it "
        "again"
    )
