import dataclasses
import functools
import gzip
import json
import os
import random
import re
import shutil
import sys
import tracemalloc

import bucket as bucket_lib
import hypothesis
import pyarrow as pa
import pytest
from array_record.python import array_record_module
from hypothesis import strategies as st
from pyarrow import parquet as pq

from mixcpt_jax import config as config_lib
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import corpus, files, readers, sources

RECORDS = [
    {
        "text": f"dócument {i}",
        "n": i,
        "score": i / 8,
        "messages": [
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": f"Because {i}."},
        ],
        "tags": ["a"] * (i % 3),
    }
    for i in range(300)
]


def _write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def _texts(path, reader=""):
    return [record.fields["text"] for record in sources.read(str(path), reader)]


def test_jsonl_keeps_order_and_place(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one\\u2028"}\n\n{"text": "two", "n": 1}\n')
    first, second = sources.read(str(file))
    assert first.fields == {"text": "one\u2028"}
    assert second.fields == {"text": "two", "n": 1}
    assert second.place == f"{file}:3"


def test_lists_globs_and_folders(tmp_path):
    a = _write(tmp_path / "a.jsonl", {"text": "a"})
    b = _write(tmp_path / "b.jsonl", {"text": "b"})
    assert _texts(f"{b}, {a}") == ["b", "a"]
    assert _texts(tmp_path / "*.jsonl") == ["a", "b"]
    assert _texts(tmp_path, "jsonl") == ["a", "b"]


def test_text_reads_a_tree(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.md").write_text("b")
    (tmp_path / "c.txt").write_text("\ufeffc")
    (tmp_path / "blank.txt").write_text("\n")
    (tmp_path / "code.py").write_text("x")
    assert sorted(_texts(tmp_path)) == ["b", "c"]
    (record,) = sources.read(str(tmp_path / "c.txt"))
    assert record.fields["id"] == record.place == str(tmp_path / "c.txt")


def test_a_byte_order_mark_makes_no_line(tmp_path):
    file = tmp_path / "a.jsonl"
    for content in ('\ufeff\n{"text": "a"}\n', '\ufeff{"text": "a"}\n\ufeff'):
        file.write_text(content)
        assert _texts(file) == ["a"]


def test_a_relative_glob_is_of_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    assert _texts("*.txt") == ["a"]


def test_a_name_with_brackets_is_a_name(tmp_path):
    assert _texts(_write(tmp_path / "a[1].jsonl", {"text": "a"})) == ["a"]


def test_package_files_are_found():
    assert next(sources.read("package:etils/__init__.py", "text")).fields["text"]


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (b'{"text": "a"}\n{"text": \n', 2, "not JSON"),
        (b'{"text": "a"}\n\n["a"]\n', 3, "a JSON list"),
        (b'{"text": "\xff"}\n', 1, "not UTF-8 (byte 10 of the line)"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, line, words):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(InputError) as error:
        list(sources.read(str(file)))
    assert str(error.value).startswith(f"{file}:{line}: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bad_text_file_is_named(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"good\nb\xe9d\x00\n")
    with pytest.raises(InputError, match=r"a.txt:2: holds no text; name other files"):
        list(sources.read(str(file)))


def test_sources_without_records_are_named(tmp_path):
    for name in ("empty.jsonl", "empty.txt"):
        (tmp_path / name).write_text("\n")
        with pytest.raises(InputError, match=name):
            list(sources.read(str(tmp_path / name)))


@pytest.mark.parametrize(
    ("path", "reader", "words"),
    [
        ("no_such.jsonl", "", "no_such.jsonl: no file matches"),
        ("no_such_*.txt", "", "no file matches"),
        ("docs/**/*.txt", "", r"\*\* is not supported; name the folder"),
        ("a.csv", "", "no file matches"),
        ("gs:", "tfds", "gs:: names no bucket"),
        (
            "a.jsonl",
            "xml",
            "unknown reader 'xml'; use one of text, html, pdf, docx, jsonl",
        ),
        (" , ", "text", "is empty"),
        ("package:no_such_package/a.txt", "", "pip install no_such_package"),
    ],
)
def test_a_bad_setting_is_named_before_reading(path, reader, words):
    with pytest.raises(InputError, match=words):
        sources.read(path, reader)


def _jsonl_bytes(records):
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def _zstd(content):
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(content)
    return packed.getvalue().to_pybytes()


def _write_jsonl(file, records, pack=bytes):
    file.write_bytes(pack(_jsonl_bytes(records)))


def _write_parquet(file, records, **options):
    options = {"row_group_size": 100} | options
    pq.write_table(pa.Table.from_pylist(records), file, **options)


def _write_arrow(file, records, new=pa.ipc.new_stream):
    table = pa.Table.from_pylist(records)
    with file.open("wb") as content, new(content, table.schema) as writer:
        writer.write_table(table, max_chunksize=40)


def _write_array_record(file, records, group_size=1):
    writer = array_record_module.ArrayRecordWriter(
        str(file), f"group_size:{group_size}"
    )
    for record in records:
        is_raw = isinstance(record, bytes)
        writer.write(record if is_raw else json.dumps(record).encode())
    writer.close()


def _write_saved(folder, records):
    """As `datasets.save_to_disk` does, the shards not in the order of their names."""
    folder.mkdir()
    half = len(records) // 2
    _write_arrow(folder / "data-2.arrow", records[:half])
    _write_arrow(folder / "data-1.arrow", records[half:])
    shards = [{"filename": "data-2.arrow"}, {"filename": "data-1.arrow"}]
    (folder / "state.json").write_text(json.dumps({"_data_files": shards}))
    (folder / "dataset_info.json").write_text("{}")


WRITERS = {
    "a.jsonl": _write_jsonl,
    "a.jsonl.gz": functools.partial(_write_jsonl, pack=gzip.compress),
    "a.jsonl.zst": functools.partial(_write_jsonl, pack=_zstd),
    "a.JSONL.gz-00000-of-00001": functools.partial(_write_jsonl, pack=gzip.compress),
    "a.parquet": _write_parquet,
    "a.arrow": _write_arrow,
    "b.arrow": functools.partial(_write_arrow, new=pa.ipc.new_file),
    "a.array_record": _write_array_record,
    "a.array_record-00000-of-00001": functools.partial(
        _write_array_record, group_size=50
    ),
    "saved": _write_saved,
}
SUFFIXES = sorted({*readers.READER_OF_SUFFIX})
DAMAGED = [name for name in WRITERS if name not in ("saved", "a.jsonl")]
PLACES = {
    "a.jsonl": ":{0}",
    "a.parquet": ":row group {1}, row {2}",
    "a.arrow": "#{3}",
    "a.array_record": "#{3}",
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_records(tmp_path, name):
    WRITERS[name](tmp_path / name, RECORDS)
    records = list(sources.read(str(tmp_path / name)))
    assert [record.fields for record in records] == RECORDS
    assert records == list(sources.read(str(tmp_path)))
    if name in PLACES:
        place = PLACES[name].format(213, 2, 12, 212)
        assert records[212].place == str(tmp_path / name) + place


@pytest.mark.parametrize("name", WRITERS)
def test_hashes_cover_what_is_read(tmp_path, name):
    WRITERS[name](tmp_path / name, RECORDS)
    hashes = sources.hashes(str(tmp_path))
    files = {f for f in tmp_path.rglob("*") if f.is_file()}
    assert set(hashes) == {str(f) for f in files if f.name != "dataset_info.json"}
    for file in hashes:
        with open(file, "a") as content:
            content.write(" ")  # which a marker file may have at its end
        assert sources.hashes(str(tmp_path))[file] != hashes[file]


@pytest.fixture(scope="module")
def bucket():
    """An empty bucket of a server on this machine."""
    with bucket_lib.serve() as port, bucket_lib.reached_by(port) as root:
        yield root


NAMES = ("a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrow", "a.array_record", "saved")


@pytest.mark.filterwarnings("ignore")  # gcsfs has no credentials, and says so
def test_a_bucket_is_read_as_a_disk_is(tmp_path, bucket, tfds_folder):
    for name in NAMES:
        WRITERS[name](tmp_path / name, RECORDS)
    shutil.copytree(tfds_folder, tmp_path / "tfds")
    for file in tmp_path.rglob("*"):
        if file.is_file():
            (bucket / file.relative_to(tmp_path)).write_bytes(file.read_bytes())
    for path in (*NAMES, "tfds", "a.*", ""):
        split = "test+train[:10%]" if path in ("", "tfds") else ""
        local = list(sources.read(f"{tmp_path}/{path}", "", split))
        remote = list(sources.read(f"gs://bucket/{path}", "", split))
        assert remote == [
            dataclasses.replace(r, place=r.place.replace(f"{tmp_path}", "gs://bucket"))
            for r in local
        ]
        hashes = sources.hashes(f"{tmp_path}/{path}", "", split)
        there = sources.hashes(f"gs://bucket/{path}", "", split)
        assert list(there.values()) == list(hashes.values())
    (bucket / "a.array_record").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="^gs://bucket/a.array_record: cannot be read"):
        list(sources.read("gs://bucket/a.array_record"))


def test_a_folder_is_read_by_what_lies_in_it(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(files.logging, "warning", lambda *args: warnings.append(args))
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        _write_jsonl(tmp_path / name / "one.jsonl", [{"text": f"{name} one"}])
        _write_parquet(tmp_path / name / "two.parquet", [{"text": f"{name} two"}])
        (tmp_path / name / "zero.md").write_text(f"{name} zero")
        (tmp_path / name / "x.log").write_text("x")
    (tmp_path / "LICENSE").write_text("x")
    _write_saved(tmp_path / "b" / "dataset", [{"text": "first"}, {"text": "second"}])
    in_a = ["a one", "a two", "a zero"]
    in_b = ["first", "second", "b one", "b two", "b zero"]
    assert _texts(tmp_path) == in_a + in_b
    ((_, place, message),) = warnings
    assert place == str(tmp_path)
    words = (
        "passed over 3 files that no reader goes with (2 .log, 1 no suffix), such as "
    )
    assert message == f"{words}{tmp_path}/LICENSE"
    assert _texts(tmp_path / "*") == in_a + in_b
    assert _texts(tmp_path, "jsonl") == ["a one", "b one"]
    assert _texts(tmp_path, "arrow") == ["first", "second"]
    assert _texts(tmp_path / "a" / "x.log", "text") == ["x"]
    assert len(warnings) == 2
    with pytest.raises(InputError, match=r"'tfds' goes with what is there \(.*2 .log"):
        sources.read(str(tmp_path), "tfds")


def test_what_cannot_be_read_is_listed(tmp_path):
    with pytest.raises(InputError, match="an empty folder; put the texts there"):
        sources.read(str(tmp_path))
    for name in ("a.log", "b.log", "c.png"):
        (tmp_path / name).write_text("x")
    words = r"no reader .*\(2 .log, 1 .png\); known are .jsonl, .jsonl.gz, .jsonl.zst, "
    with pytest.raises(InputError, match=words):
        sources.read(str(tmp_path))
    with pytest.raises(InputError, match=r"a.log: no reader .*\(1 .log\)"):
        sources.read(str(tmp_path / "a.log"))


def _read_on(path, **settings):
    """Texts and problems."""
    problems = []
    records = list(sources.read(str(path), on_bad=problems.append, **settings))
    messages = [str(problem) for problem in problems]
    assert not any("\n" in message for message in messages)
    return [record.fields for record in records], messages


def _assert_damage(path, least):
    """At least so many records before the damage; one problem, which is raised else."""
    fields, (problem,) = _read_on(path)
    assert least <= len(fields) < len(RECORDS)
    assert fields == RECORDS[: len(fields)]
    place = f"{path}:" if len(fields) == 0 else str(path)
    assert problem.startswith(place)
    with pytest.raises(InputError) as error:
        list(sources.read(str(path)))
    assert str(error.value) == problem
    return problem


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path, name, kept):
    file = tmp_path / name
    WRITERS[name](file, RECORDS)
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    problem = _assert_damage(file, 0)
    if kept == 0 and name.endswith((".gz", "00001")) and "JSONL" in name.upper():
        assert "has no records" in problem  # no members, which gzip allows


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.arrow"])
def test_what_stands_before_the_damage_is_read(tmp_path, name):
    records = [{"text": os.urandom(500).hex()} for _ in range(2000)]
    WRITERS[name](tmp_path / name, records)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    fields, (problem,) = _read_on(tmp_path / name)
    assert 700 < len(fields) <= 1000  # zstd's blocks are of 128 KiB
    assert fields == records[: len(fields)]
    number = len(fields) - 1 if name == "a.arrow" else len(fields)
    place = f"{tmp_path / name}{'#' if name == 'a.arrow' else ':'}{number}"
    assert problem.startswith(f"{place}: after this record the file is damaged (")


def test_a_stream_cut_between_two_batches_is_named(tmp_path):
    file = tmp_path / "a.arrow"
    _write_arrow(file, RECORDS)
    content = file.read_bytes()
    assert content.endswith(b"\xff\xff\xff\xff\0\0\0\0")
    file.write_bytes(content[:-8])
    fields, (problem,) = _read_on(file)
    assert fields == RECORDS
    assert problem.startswith(f"{file}#299: after this record the file is damaged")


@pytest.mark.parametrize("name", DAMAGED)
def test_flipped_bits_never_escape(tmp_path, name):
    file = tmp_path / name
    WRITERS[name](file, RECORDS)
    content = file.read_bytes()
    for place in range(0, len(content), max(1, len(content) // 60)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        file.write_bytes(flipped)
        _read_on(file)


def test_a_flipped_bit_in_a_page_is_found_by_its_checksum(tmp_path):
    file = tmp_path / "a.parquet"
    options = {"compression": "none", "use_dictionary": False}
    _write_parquet(file, RECORDS, write_page_checksum=True, **options)
    content = bytearray(file.read_bytes())
    content[content.index("dócument 150".encode()) + 9] ^= 1
    file.write_bytes(content)
    problem = _assert_damage(file, 100)
    assert problem.startswith(f"{file}:row group 0, row 99: after this record")
    assert "CRC" in problem


def test_a_flipped_bit_in_an_array_record_is_found(tmp_path):
    file = tmp_path / "a.array_record"
    _write_array_record(file, RECORDS, group_size=50)
    content = bytearray(file.read_bytes())
    content[300] ^= 1
    file.write_bytes(content)
    _assert_damage(file, 0)


def test_a_shard_that_was_not_closed_is_named(tmp_path):
    file = tmp_path / "a.array_record"
    writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
    writer.write(b"x" * 100)
    _assert_damage(file, 0)
    writer.close()
    assert _texts(file) == ["x" * 100]
    file.write_bytes(file.read_bytes()[: 1 << 16])
    assert "no ArrayRecord index at its end" in _assert_damage(file, 0)


def test_a_missing_shard_is_named(tmp_path):
    _write_saved(tmp_path / "saved", RECORDS)
    (tmp_path / "saved" / "data-2.arrow").unlink()
    fields, (problem,) = _read_on(tmp_path / "saved")
    assert fields == RECORDS[150:]
    assert problem.startswith(f"{tmp_path}/saved/data-2.arrow: cannot be read as arrow")
    assert "No such file" in problem
    hashes = sources.hashes(str(tmp_path / "saved"))
    assert hashes[f"{tmp_path}/saved/data-2.arrow"] == "missing"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"_data_files": [3]}', "\udcff"])
def test_a_bad_marker_is_named(tmp_path, content):
    _write_saved(tmp_path / "saved", RECORDS)
    file = tmp_path / "saved" / "state.json"
    file.write_text(content, errors="surrogateescape")
    with pytest.raises(InputError, match="state.json: .*; save the dataset again"):
        sources.read(str(tmp_path))


def test_splits_of_a_dataset_dict(tmp_path):
    file = tmp_path / "dataset_dict.json"
    file.write_text(json.dumps({"splits": ["train", "test"]}))
    _write_saved(tmp_path / "train", RECORDS)
    _write_saved(tmp_path / "test", RECORDS[:9])
    assert len(list(sources.read(str(tmp_path), split="test"))) == 9
    assert len(sources.hashes(str(tmp_path), split="test")) == 3
    words = "has the splits train, test; set the source's `split` to one of them"
    assert len(list(sources.read(str(tmp_path)))) == len(RECORDS)
    file.write_text(json.dumps({"splits": ["dev", "test"]}))
    with pytest.raises(InputError, match="has the splits dev, test; set the source's"):
        sources.read(str(tmp_path))
    file.write_text(json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(InputError, match=f"{words}, not 'dev'"):
        sources.read(str(tmp_path), split="dev")
    with pytest.raises(InputError, match=r"split='test\[:1\]'; of these only one"):
        sources.read(str(tmp_path), split="test[:1]")
    with pytest.raises(InputError, match="split='test', but nothing there has splits"):
        sources.read(str(tmp_path / "test"), split="test")
    file.write_text(json.dumps({"splits": ["test"]}))
    assert len(list(sources.read(str(tmp_path)))) == 9


@pytest.mark.parametrize("name", ["../other", "..", "/etc", "", 3, "a\0b"])
def test_a_saved_dataset_names_no_file_outside_of_its_folder(tmp_path, name):
    saved = tmp_path / "saved"
    _write_saved(tmp_path / "other", RECORDS)
    _write_saved(saved, RECORDS)
    state = json.loads((saved / "state.json").read_text())
    state["_data_files"][0]["filename"] = name
    (saved / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=r"state.json: .*filename.*: .* must be "):
        sources.read(str(saved))
    (saved / "dataset_dict.json").write_text(json.dumps({"splits": [name]}))
    with pytest.raises(InputError, match=r"dataset_dict.json: .*splits.*: .* must be "):
        sources.read(str(saved))


def test_what_datasets_saves_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(RECORDS)
    dataset.shuffle(seed=0).save_to_disk(tmp_path / "one", num_shards=3)
    fields = [record.fields for record in sources.read(str(tmp_path / "one"))]
    assert fields == list(datasets.load_from_disk(tmp_path / "one"))
    splits = datasets.DatasetDict({"train": dataset, "test": dataset.select([7, 3])})
    splits.save_to_disk(tmp_path / "both")
    test = sources.read(str(tmp_path / "both"), split="test")
    assert [record.fields["n"] for record in test] == [7, 3]


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    import numpy as np
    import tensorflow_datasets as tfds

    # A worker that comes back to this module makes the folder again.
    class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Text()
            features = {
                "text": text,
                "n": tfds.features.Scalar(np.int64),
                "score": tfds.features.Scalar(np.float64),
                "messages": tfds.features.Sequence({"role": text, "content": text}),
                "tags": tfds.features.Sequence(text),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            return {
                "train": self._examples(RECORDS),
                "test": self._examples(RECORDS[:9]),
            }

        def _examples(self, records):
            return ((record["n"], record) for record in records)

        _generate_examples = _examples

    folder = tmp_path_factory.mktemp("tfds")
    builder = Toy(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return folder / "toy" / "1.0.0"


def test_tfds(tfds_folder):
    records = list(sources.read(str(tfds_folder), split="train"))
    fields = [record.fields for record in records]
    assert sorted(fields, key=lambda record: record["n"]) == RECORDS
    assert records[3].place == f"{tfds_folder}:train#3"
    ten = sources.read(str(tfds_folder), split="train[:10%]")
    assert [record.fields for record in ten] == fields[:30]
    assert len(list(sources.read(str(tfds_folder), split="all"))) == 309
    assert list(sources.read(str(tfds_folder))) == records
    hashes = sources.hashes(str(tfds_folder), split="test")
    assert {os.path.basename(file) for file in hashes} == {
        "dataset_info.json", "features.json", "toy-test.array_record-00000-of-00001",
    }  # fmt: skip
    # As one of the folders below another.
    assert len(list(sources.read(str(tfds_folder.parent), split="test"))) == 9


@pytest.mark.parametrize("split", ["dev", "train[:", "train+dev"])
def test_a_split_that_tfds_does_not_have(tfds_folder, split):
    words = r"splits train, test; set" if split != "train[:" else "parsing split"
    with pytest.raises(InputError, match=words):
        list(sources.read(str(tfds_folder), split=split))
    if split != "train[:":
        with pytest.raises(InputError, match=words):
            sources.read(str(tfds_folder), split=split)


@pytest.fixture
def tfds_copy(tfds_folder, tmp_path):
    for file in tfds_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_tfds_of_another_file_format(tfds_copy):
    file = tfds_copy / "dataset_info.json"
    file.write_text(file.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(InputError, match="TFDS dataset as tfrecord; build it with"):
        sources.read(str(tfds_copy), split="train")


@pytest.mark.parametrize(
    "damage", ["missing", "truncated", "empty", "features", "info"]
)
def test_a_damaged_tfds_folder(tfds_copy, damage):
    shard = tfds_copy / "toy-train.array_record-00000-of-00001"
    content = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    elif damage == "features":
        (tfds_copy / "features.json").write_text("{}")
    elif damage == "info":
        info = tfds_copy / "dataset_info.json"
        info.write_text(info.read_text().replace('"300"', '"x"'))
    else:
        shard.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
    fields, (problem,) = _read_on(tfds_copy, split="train")
    assert fields == []
    assert problem.startswith(f"{tfds_copy}: cannot be read as tfds")


@pytest.mark.parametrize("name", ["hostile.Text", "hostile", "os.path.Text", "", 3])
def test_tfds_imports_no_module_that_a_file_names(tfds_copy, monkeypatch, name):
    (tfds_copy.parent / "hostile.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tfds_copy.parent)
    file = tfds_copy / "features.json"
    found = re.search(
        r'"tensorflow_datasets[.]core[.]features[.][\w.]*Text"', file.read_text()
    )
    file.write_text(file.read_text().replace(found[0], json.dumps(name)))
    with pytest.raises(InputError, match=r"features.json: pythonClassName is"):
        list(sources.read(str(tfds_copy), split="train"))
    assert "hostile" not in sys.modules


@pytest.mark.parametrize("name", ["../toy", "/toy", "a/b"])
def test_tfds_reads_no_file_outside_of_its_folder(tfds_copy, name):
    file = tfds_copy / "dataset_info.json"
    file.write_text(file.read_text().replace('"name": "toy"', f'"name": "{name}"'))
    with pytest.raises(
        InputError, match=r"dataset_info.json: its split .* must lie in"
    ):
        list(sources.read(str(tfds_copy), split="train"))


def test_a_shard_of_tfds_is_no_text(tfds_folder):
    shard = tfds_folder / "toy-test.array_record-00000-of-00001"
    fields, problems = _read_on(shard)
    assert fields == []
    assert len(problems) == 9
    assert all("for serialized tf.Examples name the TFDS folder" in p for p in problems)


def test_reading_goes_on_after_a_bad_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "a"}\n{"text": \n{"text": "\xff"}\n3\n{"text": "b"}\n')
    fields, problems = _read_on(file)
    assert fields == [{"text": "a"}, {"text": "b"}]
    assert [p.split(": ")[0] for p in problems] == [f"{file}:{n}" for n in (2, 3, 4)]


def test_reading_goes_on_after_a_bad_record(tmp_path):
    file = tmp_path / "a.array_record"
    contents = [b'{"text": "a"}', b"\xff", "plain tÿxt".encode(), b"\0\1", b"[3]"]
    _write_array_record(file, contents)
    fields, problems = _read_on(file)
    assert fields == [{"text": t} for t in ("a", "plain tÿxt", "[3]")]
    assert [p.split(": ")[0] for p in problems] == [f"{file}#1", f"{file}#3"]
    with pytest.raises(InputError, match=r"a.array_record#1: neither JSON nor UTF-8"):
        list(sources.read(str(file)))


def test_values_become_what_json_has(tmp_path):
    import datetime
    import decimal

    row = {
        "text": b"caf\xc3\xa9",
        "when": datetime.date(2026, 11, 3),
        "price": decimal.Decimal("1.50"),
        "parts": {"a": [b"x", None]},
    }
    _write_parquet(tmp_path / "a.parquet", [row, row | {"text": b"\xff\xd8"}, row])
    fields, (problem,) = _read_on(tmp_path / "a.parquet")
    text = {"text": "café", "when": "2026-11-03", "price": "1.50"}
    assert fields == [text | {"parts": {"a": ["x", None]}}] * 2
    assert problem.startswith(
        f"{tmp_path}/a.parquet:row group 0, row 1: a value is not"
    )
    assert json.loads(json.dumps(fields)) == fields


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "content",
    [b"", b"\n", random.Random(0).randbytes(5000), b"PAR1" * 40, b"ARROW1\0\0" * 40],
    ids=["empty", "blank", "random", "parquet", "arrow"],
)
def test_garbage_is_named(tmp_path, suffix, content):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(content)
    is_text = readers.READER_OF_SUFFIX[suffix] in ("text", "html")
    if is_text and content.isascii() and content.strip():
        return
    with pytest.raises(InputError) as error:
        list(sources.read(str(file)))
    assert str(error.value).startswith(str(file))


def _peak(path, **settings):
    """The number of records, and bytes that Python and pyarrow had at most."""
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    count = most = 0
    for _ in sources.read(str(path), **settings):
        count += 1
        most = max(most, pa.total_allocated_bytes() - before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return count, most + peak


@pytest.mark.parametrize("pack", [bytes, _zstd])
def test_a_line_of_50_megabytes_is_read(tmp_path, pack):
    file = tmp_path / ("a.jsonl" if pack is bytes else "a.jsonl.zst")
    _write_jsonl(file, [{"text": "x" * 50_000_000}, {"text": "b"}], pack)
    count, peak = _peak(file)
    assert count == 2
    assert peak < 5 * 50_000_000


def test_a_line_without_end_is_refused_in_bounded_memory(tmp_path):
    file = tmp_path / "a.jsonl.zst"
    line = b'{"text": "' + b"x" * (3 * readers.MAX_LINE_BYTES) + b'"}\n{"text": "b"}\n'
    file.write_bytes(_zstd(line))
    problems = []
    count, peak = _peak(file, on_bad=problems.append)
    assert (count, len(problems)) == (1, 1)
    assert f"{file}:1: the line is longer than 64 MiB" in str(problems[0])
    assert peak < 2.5 * readers.MAX_LINE_BYTES


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "b.arrow"]
)
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    file = tmp_path / name
    records = [{"text": os.urandom(2000).hex()} for _ in range(10_000)]
    if name == "a.parquet":  # all of it one row group
        _write_parquet(file, records, row_group_size=10_000, use_dictionary=False)
    else:
        WRITERS[name](file, records)
    assert file.stat().st_size > 20e6  # of which 40e6 are unpacked
    count, peak = _peak(file)
    assert count == 10_000
    assert peak < 10e6


def test_skipping_counts_files_lines_and_records_together(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(
        corpus.logging, "warning", lambda text, *args: warnings.append(text % args)
    )
    lines = b'{"text": "a"}\n3\n{"text": 3}\n{"text": " "}\n{"text": "b"}\n'
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(_jsonl_bytes(RECORDS))[:-9])
    config = config_lib.default()
    source = config_lib.source(path=str(tmp_path), on_bad_record="skip")
    source_corpus = corpus.Corpus(config, source)
    train_split = list(source_corpus.train_split())
    assert [record.fields["text"] for record in train_split[:2]] == ["a", "b"]
    assert 200 < len(train_split) < 302
    assert source_corpus.holdout == []
    assert source_corpus.left_out == {"bad_record": 4}
    words = "skipped 4 bad records or ends of damaged files, such as"
    assert warnings == [
        f"{tmp_path}: {words} {tmp_path}/a.jsonl:2: a JSON int, must be an object "
        'such as {"text": "..."}'
    ]
    source.on_bad_record = "refuse"
    with pytest.raises(InputError, match="a.jsonl:2"):
        list(corpus.Corpus(config, source).train_split())
    (tmp_path / "a.jsonl").write_bytes(b"3\n4\n")
    source = config_lib.source(path=f"{tmp_path}/a.jsonl", on_bad_record="skip")
    with pytest.raises(
        InputError, match="no record is left; left out are 2 bad_record"
    ):
        list(corpus.Corpus(config, source).train_split())


def test_a_missing_field_is_reported_before_too_few_records_to_hold_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"words": "a"}\n')
    source = config_lib.source(path=f"{tmp_path}/a.jsonl", holdout=16)
    read = corpus.Corpus(config_lib.default(), source)
    with pytest.raises(InputError, match="a.jsonl:1: .*'text'"):
        list(read.train_split())
    source.fields = {"text": "words"}
    read = corpus.Corpus(config_lib.default(), source)
    with pytest.raises(InputError, match="cannot hold out 16 of the 1 .*NAME.holdout"):
        list(read.train_split())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def _outcome(path):
    """Records or an error, twice the same."""
    outcomes = []
    for _ in range(2):
        try:
            outcomes.append(repr(list(sources.read(str(path)))))
        except InputError as error:
            outcomes.append(f"error: {error}")
    assert outcomes[0] == outcomes[1]
    assert "\n" not in outcomes[0]
    return outcomes[0]


@pytest.mark.parametrize("suffix", SUFFIXES)
@hypothesis.given(content=st.binary(max_size=200))
def test_any_bytes_are_records_or_an_error(tmp_path, suffix, content):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(content)
    _outcome(file)
    _read_on(file)


@hypothesis.given(values=st.lists(JSON, min_size=1))
def test_any_json_is_records_or_an_error(tmp_path, values):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, values)))
    outcome = _outcome(tmp_path / "a.jsonl")
    assert outcome.startswith("error: ") != all(isinstance(v, dict) for v in values)
    _write_array_record(tmp_path / "a.array_record", values)
    _outcome(tmp_path / "a.array_record")


@pytest.mark.parametrize("name", DAMAGED)
@hypothesis.given(data=st.data())
def test_any_damage_is_records_or_an_error(tmp_path, name, data):
    file = tmp_path / name
    WRITERS[name](file, RECORDS[:9])
    content = bytearray(file.read_bytes())
    start = data.draw(st.integers(0, len(content) - 1))
    damage = data.draw(st.binary(min_size=1, max_size=16))
    content[start : start + len(damage)] = damage
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    _outcome(file)
    _read_on(file)


def _records(count):
    return [sources.Record({"text": f"document {i}"}, f"f:{i}") for i in range(count)]


def _text(record):
    return record.fields["text"]


def _holdout(records, num_records=10, seed=0):
    return set(
        map(_text, sources.choose_holdout(records, _text, num_records, seed).values())
    )


def test_holdout_is_seeded_and_knows_no_order():
    records = _records(100)
    assert len(_holdout(records)) == 10
    assert _holdout(records) == _holdout(records[::-1])
    assert _holdout(records) != _holdout(records, seed=1)
    assert not _holdout(records, 0)


def test_holdout_is_the_records_of_the_least_keys():
    records = _records(100)
    keys = sorted(sources.content_key(_text(record), 0) for record in records)
    chosen = sources.choose_holdout(iter(records * 2), _text, 10, 0)
    assert chosen.keys() == set(keys[:10])


def test_holdout_grows_with_the_source_only_a_little():
    both = _holdout(_records(100)) & _holdout(_records(110))
    assert len(both) >= 7


def test_holding_out_everything_is_an_error():
    with pytest.raises(InputError, match="cannot hold out 5 of the 5 distinct records"):
        sources.choose_holdout(_records(5), _text, 5, seed=0)
