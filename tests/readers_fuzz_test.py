"""Whatever a file holds: records, or a clear word. Never anything else, never silence.

`EXAMPLES=1000` looks longer.
"""

import contextlib
import faulthandler
import functools
import gzip
import json

import hypothesis
import numpy as np
import pyarrow as pa
import pytest
import tokenizers
from array_record.python import array_record_module
from hypothesis import strategies as st
from pyarrow import parquet as pq

from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import fields, formats, readers, sources
from mixcpt_jax.models import tokenizer as tokenizer_lib

pytestmark = pytest.mark.slow

FUZZ = hypothesis.settings(suppress_health_check=list(hypothesis.HealthCheck))
GROUP = 2
RECORDS = [
    {
        "text": f"dócument {i}\n" * i,
        "n": i,
        "score": None if i == 3 else i / 8,
        "messages": [{"role": "user", "content": "Why?"}] * (i % 3),
        "from": {"url": f"a/{i}", "tags": ["x"] * i},
    }
    for i in range(6)
]


@pytest.fixture(autouse=True)
def _no_hang():
    """A library that is caught in a loop of its own ends the process."""
    seconds = 8 * hypothesis.settings.default.max_examples
    faulthandler.dump_traceback_later(seconds, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def _lines(records):
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    return "".join(line + "\n" for line in lines).encode()


def _zstd(content):
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(content)
    return packed.getvalue().to_pybytes()


def _write_lines(file, records, pack=bytes):
    file.write_bytes(pack(_lines(records)))


def _write_parquet(file, records, **options):
    table = pa.Table.from_pylist(records)
    pq.write_table(table, file, row_group_size=GROUP, **options)


def _write_arrow(file, records, new=pa.ipc.new_stream, **options):
    table = pa.Table.from_pylist(records)
    options = pa.ipc.IpcWriteOptions(**options)
    with file.open("wb") as content, new(content, table.schema, options=options) as to:
        to.write_table(table, max_chunksize=GROUP)


def _write_array_record(file, records, options=f"group_size:{GROUP}"):
    writer = array_record_module.ArrayRecordWriter(str(file), options)
    for record in records:
        writer.write(json.dumps(record).encode())
    writer.close()


WRITERS = {
    "a.jsonl": _write_lines,
    "a.jsonl.gz": functools.partial(_write_lines, pack=gzip.compress),
    "a.jsonl.zst": functools.partial(_write_lines, pack=_zstd),
    "a.parquet": _write_parquet,
    "checked.parquet": functools.partial(
        _write_parquet, write_page_checksum=True, data_page_version="2.0"
    ),
    "plain.parquet": functools.partial(
        _write_parquet, compression="none", use_dictionary=False
    ),
    "stream.arrow": _write_arrow,
    "zstd.arrow": functools.partial(_write_arrow, compression="zstd"),
    "file.arrow": functools.partial(_write_arrow, new=pa.ipc.new_file),
    "a.array_record": _write_array_record,
    "single.array_record": functools.partial(
        _write_array_record, options="group_size:1,uncompressed"
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def good(folder):
    """Name -> what stands in an undamaged file."""
    contents = {}
    for name, write in WRITERS.items():
        write(folder / name, RECORDS)
        contents[name] = (folder / name).read_bytes()
    return contents


def _read_until_an_error(path, **settings):
    found = []
    try:
        for record in sources.read(str(path), **settings):
            found.append(record.fields)
    except InputError as error:
        return found, str(error)
    return found, None


def _read(path, **settings):
    """Records and notes, which agree with what is read until the first error."""
    notes = []
    found = sources.read(str(path), on_bad=notes.append, **settings)
    found = [record.fields for record in found]
    notes = [str(note) for note in notes]
    first, error = _read_until_an_error(path, **settings)
    assert repr(found[: len(first)]) == repr(first)
    assert notes[:1] == ([] if error is None else [error])
    assert len(found) == len(first) or notes
    assert not any("\n" in note for note in notes)
    json.dumps(found)
    return found, notes


@st.composite
def _damage(draw, content):
    """The content cut off, with bits or bytes changed, moved on, or another one."""
    content = bytearray(content)
    place = st.integers(0, max(0, len(content) - 1))
    # Most that a library believes stands at the ends.
    place |= st.integers(0, 60).map(lambda n: min(n, max(0, len(content) - 1)))
    place |= st.integers(1, 200).map(lambda n: max(0, len(content) - n))
    match draw(st.sampled_from(("cut", "flip", "bytes", "number", "prefix", "other"))):
        case "cut":
            del content[draw(place) :]
        case "flip":
            for at in draw(st.lists(place, min_size=1, max_size=3)):
                content[at] ^= 1 << draw(st.integers(0, 7))
        case "bytes":
            start, damage = draw(place), draw(st.binary(min_size=1, max_size=16))
            content[start : start + len(damage)] = damage
        case "number":
            start, size = draw(place), draw(st.sampled_from((1, 2, 4, 8)))
            number = draw(st.sampled_from((0, 1, -1, 1 << 31, 10**9, -(1 << 31))))
            damage = (number % (1 << 8 * size)).to_bytes(size, "little")
            content[start : start + size] = damage
        case "prefix":
            content[:0] = draw(st.binary(min_size=1, max_size=40))
        case "other":
            around = draw(st.sampled_from(((0, 0), (8, 0), (0, 8), (8, 8))))
            head, tail = bytes(content[: around[0]]), bytes(content[-around[1] :])
            content = head + draw(st.binary(max_size=200)) + tail * (around[1] > 0)
    return bytes(content)


@pytest.mark.parametrize("name", WRITERS)
@FUZZ
@hypothesis.given(data=st.data())
def test_damage_is_reported(folder, good, name, data):
    file = folder / name
    content = data.draw(_damage(good[name]))
    file.write_bytes(content)
    found, notes = _read(file)
    if name == "a.jsonl":
        # That its end is missing a text file does not tell.
        num_lines = sum(1 for line in content.split(b"\n") if line.strip(b" \t\r\f\v"))
        assert len(found) + len(notes) == max(1, num_lines)
    else:
        assert notes or len(found) >= len(RECORDS)


def _assert_reported(file, content, words):
    """All records or a note; at least one note has the words."""
    reported = []
    for damaged in content:
        file.write_bytes(damaged)
        found, notes = _read(file)
        assert notes or len(found) == len(RECORDS)
        reported += notes
    assert any(words in note for note in reported)


def test_a_page_that_parquet_misses_is_reported(folder, good):
    """The header of the first page, bit by bit."""
    content = good["plain.parquet"]
    header = range(len(b"PAR1"), 30)
    flipped = (
        content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
        for at in header
        for bit in range(8)
    )
    _assert_reported(folder / "flipped.parquet", flipped, "2 rows of this row group")


@pytest.mark.parametrize("name", ["stream.arrow", "zstd.arrow"])
def test_a_stream_with_a_mark_before_its_end_is_reported(folder, good, name):
    messages = good[name].split(b"\xff" * 4)
    ended = (
        (b"\xff" * 4).join(
            [*messages[:n], bytes(4) + messages[n][4:], *messages[n + 1 :]]
        )
        for n in range(2, len(messages) - 1)
    )
    _assert_reported(
        folder / "ended.arrow", ended, "the mark at the end of the batches"
    )


def test_an_arrow_file_with_a_shortened_list_of_batches_is_reported(folder, good):
    content = good["file.arrow"]
    footer = content.rindex(b"\xff\xff\xff\xff\0\0\0\0")
    count = (len(RECORDS) // GROUP).to_bytes(4, "little")
    shortened = (
        content[:at] + bytes([content[at] - 1]) + content[at + 1 :]
        for at in range(footer, len(content))
        if content[at:].startswith(count)
    )
    _assert_reported(
        folder / "short.arrow", shortened, "the mark at the end of the batches"
    )


@FUZZ
@hypothesis.given(data=st.data())
def test_damage_to_a_text_is_reported(folder, data):
    file = folder / "a.txt"
    content = data.draw(_damage("größer\n".encode() * 9))
    file.write_bytes(content)
    found, notes = _read(file)
    assert len(found) + len(notes) == 1
    with contextlib.suppress(UnicodeDecodeError):
        text = content.decode("utf-8-sig")
        assert [record["text"] for record in found] == [text] * bool(text.strip())


@pytest.fixture(scope="module")
def tfds_files(folder):
    """Name -> content of the files of a dataset."""
    import tensorflow_datasets as tfds

    text = tfds.features.Text()

    class Fuzzed(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "text": text,
                "n": tfds.features.Scalar(np.int64),
                "messages": tfds.features.Sequence({"role": text, "content": text}),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for record in RECORDS:
                kept = ("text", "n", "messages")
                yield record["n"], {name: record[name] for name in kept}

    builder = Fuzzed(data_dir=folder, file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(num_shards=2)
    )
    files = (folder / "fuzzed" / "1.0.0").iterdir()
    return {file.name: file.read_bytes() for file in sorted(files)}


@FUZZ
@hypothesis.given(data=st.data())
def test_damage_to_a_tfds_folder_is_reported(folder, tfds_files, data):
    where = folder / "damaged"
    where.mkdir(exist_ok=True)
    name = data.draw(st.sampled_from(list(tfds_files)))
    for each, content in tfds_files.items():
        if each == name:
            content = data.draw(_damage(content))
        (where / each).write_bytes(content)
    try:
        found, notes = _read(where)
    except InputError:
        # Without a marker or features there is no dataset to read on.
        assert name in ("dataset_info.json", "features.json")
        return
    assert notes or len(found) >= len(RECORDS)
    with contextlib.suppress(InputError):
        sources.hashes(str(where))


def test_a_tfds_shard_with_more_records_than_its_dataset_knows_is_reported(
    tmp_path, tfds_files
):
    for name, content in tfds_files.items():
        (tmp_path / name).write_bytes(content)
    info = tmp_path / "dataset_info.json"
    assert info.read_text().count('"3"') == 2
    info.write_text(info.read_text().replace('"3"', '"2"'))
    found, (note,) = _read(tmp_path)
    assert len(found) == 4
    assert "has 3 records, dataset_info.json says 2" in note
    found, (note,) = _read(tmp_path, split="train[:1]")
    assert len(found) == 1


def _or_none(values):
    return st.none() | values


# A column's values: of one type throughout, as Parquet and Arrow want them.
COLUMNS = st.recursive(
    st.sampled_from(
        (
            st.booleans(),
            st.integers(-(2**63), 2**63 - 1),
            st.floats(),
            st.text(),
        )
    ).map(_or_none),
    lambda columns: (
        columns.map(lambda values: _or_none(st.lists(values, max_size=3)))
        | st.dictionaries(st.text(), columns, min_size=1, max_size=3).map(
            lambda fields: _or_none(st.fixed_dictionaries(fields))
        )
    ),
    max_leaves=5,
)
TABLES = st.dictionaries(st.text(), COLUMNS, min_size=1, max_size=4).flatmap(
    lambda fields: st.lists(st.fixed_dictionaries(fields), min_size=1, max_size=5)
)


@FUZZ
@hypothesis.given(records=TABLES)
def test_records_of_any_shape_come_back(folder, records):
    # As text, since NaN is not equal to itself.
    expected = json.dumps(records, sort_keys=True)
    for name, write in WRITERS.items():
        write(folder / name, records)
        found, notes = _read(folder / name)
        assert notes == [], name
        assert json.dumps(found, sort_keys=True) == expected, name


@FUZZ
@hypothesis.given(
    values=st.lists(st.binary(max_size=40) | st.text().map(str.encode), min_size=1)
)
def test_any_bytes_in_a_column_are_text_or_a_note_each(folder, values):
    _write_parquet(folder / "bytes.parquet", [{"text": value} for value in values])
    _write_arrow(folder / "bytes.arrow", [{"text": value} for value in values])
    texts = []
    for value in values:
        with contextlib.suppress(UnicodeDecodeError):
            texts.append({"text": value.decode()})
    for suffix in ("parquet", "arrow"):
        found, notes = _read(folder / f"bytes.{suffix}")
        assert found == texts
        assert len(notes) == len(values) - len(texts)


@FUZZ
@hypothesis.given(values=st.lists(st.binary(max_size=40), min_size=1))
def test_any_bytes_in_an_array_record_are_a_record_or_a_note_each(folder, values):
    file = folder / "bytes.array_record"
    writer = array_record_module.ArrayRecordWriter(str(file), f"group_size:{GROUP}")
    for value in values:
        writer.write(value)
    writer.close()
    found, notes = _read(file)
    assert len(found) + len(notes) == len(values)


@pytest.fixture(scope="module")
def tokenizer(folder):
    """A token per byte, and those of ChatML."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator([], 256, special_tokens=special, show_progress=False)
    where = folder / "tokenizer"
    where.mkdir()
    bpe.save(str(where / "tokenizer.json"))
    settings = {"eos_token": special[2]}
    (where / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer_lib.load(str(where))


NAMES = sorted({name for names in formats.FIELDS.values() for name in names})
TEXTS = st.text(max_size=5) | st.sampled_from(
    ("Why?", " ", "\n", "\ud800", "<|im_end|>", "{{ x }}", "\ufdd00\ufdd1", "\0")
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(fields.ROLES), "content": TEXTS},
        optional={"name": TEXTS},
    ),
    min_size=1,
    max_size=4,
)
KEYS = st.sampled_from((*NAMES, "role", "content")) | TEXTS
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | TEXTS
    | st.sampled_from(fields.ROLES),
    lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner),
    max_leaves=6,
)
ASKED = {
    "document": [["text"]],
    "instruction": [["instruction", "output"], ["prompt", "response"]],
    "preference": [["prompt", "chosen", "rejected"]],
    "cloze": [["context", "target"]],
    "chat": [["messages"], ["instruction", "output"]],
    "chat_preference": [["prompt", "chosen", "rejected"]],
}


def _fields(name):
    """Any record, or one that is nearly right."""
    other = st.dictionaries(KEYS, JSON, max_size=3)
    parts = st.sampled_from(ASKED[name]).flatmap(
        lambda names: st.fixed_dictionaries(dict.fromkeys(names, TEXTS | MESSAGES))
    )
    return other | st.tuples(other, parts).map(lambda both: both[0] | both[1])


@pytest.mark.parametrize("name", formats.FIELDS)
@FUZZ
@hypothesis.given(data=st.data(), side=st.sampled_from(formats.PREFERENCE_SIDES))
def test_any_record_is_examples_or_an_error_of_its_place(tokenizer, name, data, side):
    record = readers.Record(data.draw(_fields(name)), "f:7")
    ours = st.sampled_from(formats.FIELDS[name])
    mapped = data.draw(st.just({}) | st.dictionaries(ours, KEYS, max_size=2))
    examples, complaint = [], ""
    try:
        examples = formats.encode([record], name, tokenizer, mapped, side)
    except InputError as error:
        complaint = str(error)
    if complaint:
        assert complaint.startswith("f:7: ")
        return
    if name == "chat_preference" and not len(examples):
        _, chosen, rejected = fields.pair(fields.Reading(record, mapped, name))
        assert not fields.prefers(chosen, rejected)
        return
    is_pair = name == "chat_preference" or (name == "preference" and side == "both")
    assert len(examples) == 1 + is_pair
    assert examples.tokens.min() >= 0
    assert examples.tokens.max() < tokenizer.vocab_size
    assert examples.num_loss_tokens > 0
    # Whoever cleans the text finds one, too.
    assert formats.plain_text(record, name, mapped, side).strip()
