"""Reads the records of one file or folder of a data set; one generator per format.

Each is a function `(file, on_bad)`. The error of one record goes to `on_bad`, which raises
or counts it, and reading continues. If a library raises an exception on a damaged file, the
generator ends; `sources.read` adds the place. No file is loaded whole. `documents` reads
what is not a data set.
"""

import codecs
import contextlib
import dataclasses
import io
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from array_record.python import array_record_module
from etils import epath
from pyarrow import parquet as pq

from mixcpt_jax.config.defaults import MAX_EXPANSION
from mixcpt_jax.core import small_files
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.runtime import terminal

OnBad = Callable[[InputError], None]

READER_OF_SUFFIX = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".txt": "text",
    ".md": "text",
    ".markdown": "text",
    ".rst": "text",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".pdf": "pdf",
    ".docx": "docx",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".array_record": "array_record",
}
# Readers of whole files, each one text; readers of records with fields; and readers of
# what people write as documents.
TEXTS = ("text", "html", "pdf", "docx")
RECORDS = ("jsonl", "json", "csv", "parquet", "arrow", "array_record", "tfds")
DOCUMENTS = (*TEXTS, "csv")
MAX_LINE_BYTES = 64 << 20
MAX_TEXT_BYTES = MAX_GROUP_BYTES = 1 << 30
# The text in a compressed file may always have this size.
MAX_EXPANDED_BYTES = 256 << 20
_SECONDS_BETWEEN_REPORTS = 20.0
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_SHARD = re.compile(r"-\d+-of-\d+$")  # NAME.jsonl-00000-of-00008
_BUFFER_BYTES = 1 << 20
_FEATURES = "tensorflow_datasets.core.features."
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_BETWEEN_VALUES = re.compile(r"[\s,]*")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f]")


@dataclasses.dataclass(frozen=True)
class Record:
    """One document or sample of a source.

    Attributes:
      fields: field name -> value, of JSON's types.
      place: where it is: `file:line`, `file:row group 0, row 5`, `file#record` or a file;
        error messages begin with it.
      kind: the reader of its file, see `files.READERS`.
      encoding: of its file, where it was detected.
    """

    fields: dict
    place: str
    kind: str = ""
    encoding: str = ""


# Why a document is left out, see `documents`.
REASONS = (
    "no_text", "binary", "unknown_encoding", "encrypted", "too_large", "damaged",
    "no_header", "bad_row",
)  # fmt: skip


class DocumentError(InputError):
    """What is wrong with a document or a row of one.

    Attributes:
      reason: one of `REASONS`, or "bad_record", to count it by.
    """

    def __init__(self, problem: str, reason: str = "bad_record"):
        super().__init__(problem)
        self.reason = reason


def of_record(error: InputError, record: Record) -> InputError:
    """The error of a record, as a `DocumentError` if it is of a document."""
    if record.kind in DOCUMENTS and not isinstance(error, DocumentError):
        return DocumentError(str(error))
    return error


def handler(on_bad_record: str, leave_out: OnBad) -> OnBad:
    """Raises errors or passes them to `leave_out`, see `config.source`."""

    def on_bad(error: InputError) -> None:
        is_document = isinstance(error, DocumentError)
        is_left_out = {
            "by_kind": is_document,
            "skip": True,
            "refuse": is_document and error.reason == "no_text",
        }
        if not is_left_out[on_bad_record]:
            raise error
        leave_out(error)

    return on_bad


def suffix(name: str) -> str:
    """The part of a file's name that determines its format, in lower case, or ''."""
    endings = re.findall(r"\.[^.]*", _SHARD.sub("", name).lower())
    last_two = "".join(endings[-2:])
    return last_two if last_two in READER_OF_SUFFIX else "".join(endings[-1:])


def jsonl(
    file: epath.Path, on_bad: OnBad, max_expansion: float = MAX_EXPANSION
) -> Iterator[Record]:
    """One object per line, also in .gz and .zst; skips blank lines."""
    found = 0
    with _open(file, max_expansion) as content:
        for number, line in enumerate(_lines(content), 1):
            if not line.removeprefix(codecs.BOM_UTF8).strip():
                continue
            found += 1
            place = f"{file}:{number}"
            try:
                fields = parse_line(line, place)
            except InputError as error:
                on_bad(error)
            else:
                yield Record(fields, place)
    _require(found, file, on_bad)


def parse_line(line: bytes, place: str) -> dict:
    """Parses one line of JSON lines.

    Raises:
      InputError: it is not UTF-8, not JSON, not an object or longer than
        `MAX_LINE_BYTES`.
    """
    if len(line) > MAX_LINE_BYTES:
        raise InputError(
            f"{place}: the line is longer than {MAX_LINE_BYTES >> 20} MiB; write one JSON "
            "object per line, and split the document"
        )
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place}: not UTF-8 (byte {error.start} of the line); convert the file"
        ) from error
    except RecursionError as error:
        raise _too_deep(place) from error
    except ValueError as error:
        raise InputError(
            f"{place}: not JSON ({error}); write one object per line"
        ) from error
    return _object(value, place)


def _object(value: Any, place: str) -> dict:
    """The fields of a record, checked."""
    try:
        small_files.require_shallow(value)
    except RecursionError as error:
        raise _too_deep(place) from error
    if not isinstance(value, dict):
        raise InputError(
            f"{place}: a JSON {type(value).__name__}, must be an object such as "
            '{"text": "..."}'
        )
    return value


def _too_deep(place: str) -> InputError:
    return InputError(
        f"{place}: is nested deeper than {small_files.MOST_DEPTH} levels; flatten it"
    )


def json_array(file: epath.Path, on_bad: OnBad) -> Iterator[Record]:
    """The objects of one array, in bounded memory; JSON lines are read as such."""
    found = 0
    with _open(file, MAX_EXPANSION) as content:
        stream = io.TextIOWrapper(content, "utf-8-sig")
        text = stream.read(_BUFFER_BYTES).lstrip()
        if not text.startswith("["):
            yield from jsonl(file, on_bad)
            return
        decode, at = json.JSONDecoder().raw_decode, 1
        while True:
            at = _BETWEEN_VALUES.match(text, at).end()
            if text.startswith("]", at):
                break
            try:
                value, at = decode(text, at)
            except (ValueError, RecursionError) as error:
                # The value may be cut. Reading as much again each time bounds the work.
                rest = text[at:]
                more = stream.read(max(len(rest), _BUFFER_BYTES))
                if not more or len(rest) > MAX_LINE_BYTES:
                    raise EOFError(f"value {found + 1} is not JSON: {error}") from error
                text, at = rest + more, 0
                continue
            found += 1
            place = f"{file}: value {found}"
            try:
                yield Record(_object(value, place), place)
            except InputError as error:
                on_bad(error)
    _require(found, file, on_bad)


@contextlib.contextmanager
def _open(file: epath.Path, max_expansion: float) -> Iterator[io.BufferedReader]:
    codec = _CODECS.get(epath.Path(_SHARD.sub("", file.name)).suffix.lower())
    most = math.inf
    with file.open("rb") as stream:
        if codec:
            most = max(MAX_EXPANDED_BYTES, max_expansion * file.stat().length)
            # Unlike the zstandard package, pyarrow refuses truncated streams.
            stream = pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), codec)
        # Files on gs:// have no `readline` with a limit. The buffer is small because its
        # content is lost if the file is damaged.
        with io.BufferedReader(_Counted(stream, file, most)) as content:
            yield content


class _Counted(io.RawIOBase):
    """A stream that reports its position, and ends if it expands beyond a bound."""

    def __init__(self, stream: Any, file: epath.Path, most: float):
        self._stream, self._file, self._most = stream, file, most
        self._read = 0
        self._reported = time.monotonic()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        self._read += len(content)
        if self._read > self._most:
            raise InputError(
                f"{self._file}: expands to more than {self._most >> 20:,} MiB, so it may "
                "be made to fill memory; if you trust it, raise "
                "--config.sources.NAME.max_expansion, or decompress it"
            )
        if time.monotonic() - self._reported > _SECONDS_BETWEEN_REPORTS:
            self._reported = time.monotonic()
            terminal.say(f"{self._file}: read {self._read >> 20:,} MiB so far")
        return len(content)


def _lines(content: io.BufferedIOBase) -> Iterator[bytes]:
    """The lines; a line longer than `MAX_LINE_BYTES` is truncated."""
    while line := content.readline(MAX_LINE_BYTES + 1):
        rest = line
        while len(line) > MAX_LINE_BYTES and rest and not rest.endswith(b"\n"):
            rest = content.readline(_BUFFER_BYTES)
        yield line


def parquet(file: epath.Path, on_bad: OnBad) -> Iterator[Record]:
    """The rows, row group by row group."""
    # Without a buffer, pyarrow reads a whole column of a row group at once.
    with (
        file.open("rb") as content,
        pq.ParquetFile(
            content,
            buffer_size=_BUFFER_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        ) as table,
    ):
        found = expected = 0
        for group in range(table.num_row_groups):
            batches = table.iter_batches(64, row_groups=[group], use_threads=False)
            for number, row in enumerate(_rows(batches)):
                found += 1
                place = f"{file}:row group {group}, row {number}"
                yield from _record(_read_row, row, place, on_bad)
            # If a page is missing, pyarrow ends the group silently.
            expected += table.metadata.row_group(group).num_rows
            if found != expected:
                raise EOFError(f"{expected - found} rows of this row group are missing")
        if found != table.metadata.num_rows:
            raise EOFError(f"{found} rows, the footer says {table.metadata.num_rows}")
        _require(found, file, on_bad)


def arrow(file: epath.Path, on_bad: OnBad) -> Iterator[Record]:
    """The rows of an Arrow IPC stream, as `datasets` saves it, or IPC file."""
    found = 0
    with file.open("rb") as content:
        for found, row in enumerate(_rows(_arrow_batches(content)), 1):
            yield from _record(_read_row, row, f"{file}#{found - 1}", on_bad)
    _require(found, file, on_bad)


def _arrow_batches(content) -> Iterator[pa.RecordBatch]:
    is_file = content.read(6) == b"ARROW1"
    content.seek(0)
    if is_file:
        table = pa.ipc.open_file(content)
        batches = map(table.get_batch, range(table.num_record_batches))
    else:
        batches = pa.ipc.open_stream(content)
    batch = None
    for batch in batches:
        batch.validate(full=True)  # otherwise wrong offsets would be followed
        yield batch
    if is_file and batch is None:
        return
    # A stream that was cut between two batches is valid, but a writer that is closed writes
    # an end mark. In a file, the mark precedes the list of batches, which may lack one.
    size = len(_END_OF_STREAM)
    if not is_file:
        content.seek(-size, io.SEEK_CUR)
    if content.read(size if is_file else size + 1) != _END_OF_STREAM:
        raise EOFError("the mark at the end of the batches is missing")


def _rows(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Batches of one row, so that invalid UTF-8 in one row does not affect other rows."""
    for batch in batches:
        for row in range(batch.num_rows):
            yield batch.slice(row, 1)


def _read_row(row: pa.RecordBatch) -> dict:
    return row.to_pylist()[0]


def array_record(file: epath.Path, on_bad: OnBad) -> Iterator[Record]:
    """The records: JSON objects, or else texts `{'text'}`."""
    reader = array_record_reader(file)
    num_records = reader.num_records()
    # A file without its index looks like one without records.
    if not reader.ok():
        raise EOFError(
            "has no ArrayRecord index at its end: its writer did not close it, or it has "
            "another format"
        )
    _require_small_groups(reader, file, num_records)
    for number in range(num_records):
        content, place = reader.read(), f"{file}#{number}"
        try:
            yield Record(_parse_record(content, place), place)
        except InputError as error:
            on_bad(error)
    _require(num_records, file, on_bad)


def _require_small_groups(
    reader: array_record_module.ArrayRecordReader, file: epath.Path, num_records: int
) -> None:
    """The library decompresses whole groups of records, and crashes on a large one."""
    found = re.search(r"group_size:(\d+)", reader.writer_options_string())
    per_group = min(int(found[1]) if found else num_records, num_records)
    size = file.stat().length * per_group // max(num_records, 1)
    if size > MAX_GROUP_BYTES:
        raise InputError(
            f"{file}: groups of {per_group} records have about "
            f"{size >> 20:,} MiB, at most "
            f"{MAX_GROUP_BYTES >> 20:,} are supported; write it with group_size:1"
        )


def array_record_reader(
    file: epath.Path | str,
) -> array_record_module.ArrayRecordReader:
    """Opens a file; one without an index has no records and is not `ok()`."""
    # With the default options a reader takes 100 MB or more and is no faster. It is not
    # closed, because closing a damaged file raises again, without a message.
    return array_record_module.ArrayRecordReader(
        str(file), "readahead_buffer_size:0,max_parallelism:0"
    )


def _parse_record(content: bytes, place: str) -> dict:
    try:
        document = content.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place}: neither JSON nor UTF-8 text (byte {error.start} of the record); "
            "for serialized tf.Examples name the TFDS folder"
        ) from error
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(fields := json.loads(document), dict):
            small_files.require_shallow(fields)
            return fields
    # A tf.Example of ASCII text is also valid UTF-8, with control characters between its
    # parts.
    if control := _CONTROL.search(document):
        raise InputError(
            f"{place}: neither JSON nor text (byte {control[0].encode()[0]:#04x} in it); "
            "for serialized tf.Examples name the TFDS folder"
        )
    return {"text": document}


def tfds(folder: epath.Path, split: str, on_bad: OnBad) -> Iterator[Record]:
    """The examples of a split, in the order of its shards; bytes become str."""
    builder = _tfds_builder(folder)
    sequences = _sequences(builder.info.features)
    source = builder.as_data_source(split)

    def read_example(number: int) -> dict:
        example = dict(source[number])
        for name in sequences:
            columns = example[name]
            example[name] = [
                dict(zip(columns, row, strict=True))
                for row in zip(*columns.values(), strict=True)
            ]
        return example

    for number in range(len(source)):
        place = f"{folder}:{split}#{number}"
        yield from _record(read_example, number, place, on_bad)
    # len(source) comes from dataset_info.json, not from the shards.
    for shard in builder.info.splits[split].file_instructions:
        found = array_record_reader(shard.filename).num_records()
        if found != shard.examples_in_shard:
            raise EOFError(
                f"{shard.filename} has {found} records, dataset_info.json says "
                f"{shard.examples_in_shard}"
            )
    _require(len(source), f"{folder}:{split}", on_bad)


def tfds_files(folder: epath.Path, split: str) -> list[epath.Path]:
    """The files that the reader `tfds` reads."""
    shards = _tfds_builder(folder).info.splits[split].filepaths
    markers = [folder / "dataset_info.json", folder / "features.json"]
    return [*markers, *map(epath.Path, shards)]


def _tfds_builder(folder: epath.Path):
    import tensorflow_datasets  # takes half a second; few sources need it

    _check_features(folder / "features.json")
    builder = tensorflow_datasets.builder_from_directory(folder)
    for split in builder.info.splits.values():
        for file in map(epath.Path, split.filepaths):
            if file.parent != folder:
                raise InputError(
                    f"{folder / 'dataset_info.json'}: its split {split.name} has the file "
                    f"{file}, which must lie in {folder}"
                )
    return builder


def _check_features(file: epath.Path) -> None:
    """Checks the named feature classes; TFDS imports any module that is named."""
    level = [small_files.read_json(file, remedy="build it anew", is_ours=False)]
    while level:
        for entry in level:
            name = entry.get("pythonClassName") if isinstance(entry, dict) else None
            if name is not None and not str(name).startswith(_FEATURES):
                raise InputError(
                    f"{file}: pythonClassName is {name!a:.80}; supported are the features "
                    f"of {_FEATURES}"
                )
        level = [part for entry in level for part in small_files.containers(entry)]


def _sequences(features) -> list[str]:
    """Fields that are lists of objects, which TFDS returns as objects of lists."""
    from tensorflow_datasets import features as kinds

    return [
        name
        for name, feature in features.items()
        if isinstance(feature, kinds.Sequence)
        and isinstance(feature.feature, kinds.FeaturesDict)
    ]


def _record(
    read: Callable[[Any], dict], key: Any, place: str, on_bad: OnBad
) -> Iterator[Record]:
    """The record that `read(key)` returns, or none if it is not UTF-8."""
    try:
        fields = _json_value(read(key))
    except UnicodeDecodeError as error:
        found = bytes(error.object[error.start : error.start + 1])
        on_bad(
            InputError(
                f"{place}: a value is not UTF-8 (byte {found[0]:#04x} at {error.start}); "
                "convert it, or leave out the column if it holds no text"
            )
        )
    else:
        yield Record(fields, place)


def _json_value(value: Any) -> Any:
    """A value in JSON's types: bytes as text, arrays as lists, dates as strings."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {str(key): _json_value(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(entry) for entry in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _json_value(value.tolist())
    return str(value)


def _require(found: int, file: epath.Path | str, on_bad: OnBad) -> None:
    if not found:
        on_bad(InputError(f"{file}: has no records; remove it, or write it again"))
