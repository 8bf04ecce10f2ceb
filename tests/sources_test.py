import json

import pytest

from mixcpt_jax.data import sources
from mixcpt_jax.errors import InputError


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
    file.write_bytes(b"good\nb\xe9d\n")
    with pytest.raises(InputError, match=r"a.txt:2: not UTF-8 \(byte 6 of the file\)"):
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
        ("a.csv", "", "no reader goes with the suffix '.csv'"),
        ("a.jsonl", "csv", "unknown reader 'csv'"),
        (" , ", "text", "is empty"),
        ("package:no_such_package/a.txt", "", "pip install no_such_package"),
    ],
)
def test_a_bad_setting_is_named_before_reading(path, reader, words):
    with pytest.raises(InputError, match=words):
        sources.read(path, reader)


def _records(count):
    return [sources.Record({"text": f"document {i}"}, f"f:{i}") for i in range(count)]


def _held_out(records, num_records=10, seed=0):
    return {
        r.fields["text"] for r in sources.split_holdout(records, num_records, seed)[1]
    }


def test_holdout_is_disjoint_complete_and_seeded():
    records = _records(100)
    held_in, held_out = sources.split_holdout(records, 10, seed=0)
    assert len(held_out) == 10
    assert sorted(r.place for r in held_in + held_out) == sorted(
        r.place for r in records
    )
    assert _held_out(records) == _held_out(records[::-1])
    assert _held_out(records) != _held_out(records, seed=1)
    assert sources.split_holdout(records, 0, seed=0) == (records, [])


def test_holdout_grows_with_the_source_only_a_little():
    both = _held_out(_records(100)) & _held_out(_records(110))
    assert len(both) >= 7


def test_copies_of_held_out_records_are_not_trained_on():
    records = _records(30)
    held_in, held_out = sources.split_holdout(records * 2, 10, seed=0)
    assert len(held_out) == 10
    assert len(held_in) == 40
    assert not {r.fields["text"] for r in held_in} & {
        r.fields["text"] for r in held_out
    }


def test_holding_out_everything_is_an_error():
    with pytest.raises(InputError, match="cannot hold out 5 of 5 distinct records"):
        sources.split_holdout(_records(5), 5, seed=0)
