"""Of a folder all is read that is data of the wanted split, and each file once."""

import contextlib
import gzip
import os
import pathlib
import re

import hypothesis
import pyarrow as pa
import pytest
from array_record.python import array_record_module
from hypothesis import strategies as st

from mixcpt_jax import config as config_lib
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import corpus, files, readers, sources


@pytest.fixture
def warned(monkeypatch):
    """What is logged."""
    lines = []
    monkeypatch.setattr(files.logging, "warning", lambda f, *a: lines.append(f % a))
    return lines


def make(root, *names):
    for name in names:
        file = pathlib.Path(root) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        table = file.suffix == ".jsonl" or ".jsonl" in file.name
        file.write_text(f'{{"text": "{name}"}}\n' if table else name)
    return str(root)


def texts(path, **settings):
    return [record.fields["text"] for record in sources.read(str(path), **settings)]


FOLDERS = ("a", "b", ".git", "__MACOSX", ".cache")
FILES = (
    "a.txt",
    "b.md",
    "._a.txt",
    ".DS_Store",
    ".b.jsonl",
    "c.jsonl",
    "50% [1]?,.txt",
)


@hypothesis.given(
    tree=st.sets(
        st.tuples(
            st.lists(st.sampled_from(FOLDERS), max_size=3), st.sampled_from(FILES)
        ).map(lambda found: "/".join((*found[0], found[1]))),
        min_size=1,
    ),
    links=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=4),
)
def test_hidden_files_are_not_read_and_others_once(tmp_path_factory, tree, links):
    """Links to folders above, below and beside, and to files, lead to nothing new."""
    root = tmp_path_factory.mktemp("tree")
    make(root, *tree)
    folders = sorted(path for path in (root, *root.rglob("*")) if path.is_dir())
    targets = sorted(root.rglob("*"))
    # What can be seen without links can be seen with them, under one name or another.
    for number, (where, what) in enumerate(links):
        folder, target = folders[where % len(folders)], targets[what % len(targets)]
        hidden = any(p.startswith((".", "__")) for p in target.relative_to(root).parts)
        if not hidden:
            os.symlink(target, folder / f"link{number}{target.suffix}")
        os.symlink(root, folder / f"up{number}")
    visible = {
        name
        for name in tree
        if not any(part.startswith((".", "__")) for part in name.split("/"))
    }
    try:
        found = texts(root)
    except InputError as error:
        assert "nothing is there but hidden" in str(error)  # noqa: PT017
        found = []
    assert sorted(found) == sorted(visible)


NAMES = st.text(st.sampled_from(",[]*? a%#é"), min_size=1, max_size=5)


@hypothesis.given(names=st.lists(NAMES, min_size=1, max_size=4, unique=True))
def test_lists_of_files_of_any_names(tmp_path_factory, names):
    root = tmp_path_factory.mktemp("list")
    names = [f"{number}{name}.txt" for number, name in enumerate(names)]
    paths = [f"{make(root, name)}/{name}" for name in names]
    assert texts(",".join(paths)) == names
    assert texts(", ".join(paths)) == names
    assert texts(f"{root}/*.txt") == sorted(names)


def test_a_glob_in_a_folder_with_brackets(tmp_path):
    make(tmp_path / "data [1]", "a.txt", "b.txt", "sub/c.txt")
    make(tmp_path / "data 1", "d.txt")
    assert texts(f"{tmp_path}/data [1]/*.txt") == ["a.txt", "b.txt"]
    assert texts(f"{tmp_path}/data ?/*.txt") == ["d.txt"]
    assert texts(f"{tmp_path}/data [1]/a.txt,{tmp_path}/data [1]/*.txt") == [
        "a.txt",
        "b.txt",
    ]


HUB = {
    "shards": ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl",
               "data/test-00000-of-00001.jsonl"),
    "files": ("train.jsonl", "test.jsonl", "validation.jsonl"),
    "folders": ("train/a/1.txt", "train/2.txt", "test/a/1.txt"),
    "words": ("my-train.jsonl", "my_eval.jsonl", "my.dev.2.jsonl"),
    "texts": ("wiki.train.txt", "wiki.valid.txt", "wiki.test.txt"),
    "tfds": ("toy-train.jsonl-00000-of-00001", "toy-test.jsonl-00000-of-00001"),
}  # fmt: skip


@pytest.mark.parametrize("layout", HUB)
def test_train_is_read_and_other_splits_are_named(tmp_path, layout, warned):
    make(tmp_path, *HUB[layout])
    (tmp_path / "README.md").write_text("# Card\n")
    expected = sorted(name for name in HUB[layout] if "train" in name)
    for split in ("", "train", "training"):
        assert texts(tmp_path, split=split) == expected
        assert "other splits are not read: test" in warned[-1]
        assert (
            f"cards, licences and their like are not read: {tmp_path}/README.md"
            in warned[-1]
        )
    for split in ("test", "eval"):
        assert not set(texts(tmp_path, split=split)) & set(expected)
    assert len(texts(tmp_path, split="all")) == len(HUB[layout])
    assert len(texts(tmp_path, split="train+test")) > len(expected)
    assert list(sources.hashes(str(tmp_path))) == [f"{tmp_path}/{n}" for n in expected]
    with pytest.raises(InputError, match="has the splits .*, not 'unheard'"):
        sources.read(str(tmp_path), split="unheard")


@pytest.mark.parametrize("layout", [*HUB, "imdb", "chats"])
def test_splits_are_those_of_datasets(tmp_path, layout):
    data_files = pytest.importorskip("datasets.data_files")
    shard = "data/{}-00000-of-00001.jsonl"
    names = {
        "imdb": [shard.format(name) for name in ("train", "test", "unsupervised")],
        "chats": [shard.format(n) for n in ("train_sft", "test_sft", "train_gen")],
    } | HUB
    make(tmp_path, *names[layout])
    for split, patterns in data_files.get_data_patterns(str(tmp_path)).items():
        theirs = set()
        for pattern in patterns:
            with contextlib.suppress(FileNotFoundError):  # one of several spellings
                theirs |= {*data_files.resolve_pattern(pattern, str(tmp_path))}
        theirs = {os.path.relpath(file, tmp_path) for file in theirs}
        assert set(texts(tmp_path, split=str(split))) == theirs
    if layout == "imdb":
        assert texts(tmp_path) == [shard.format("train")]
    if layout == "chats":
        with pytest.raises(InputError, match="has the splits test_sft .*train_gen"):
            sources.read(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "read"),
    [
        # The names tell no splits.
        (("a.jsonl", "b.jsonl"), 2),
        (("train.jsonl", "more.jsonl"), 2),
        (("test.txt", "dev.txt", "a.txt"), 3),
        (("testing.md", "training.md", "a.md"), 3),
        (("test.jsonl",), 1),
        # Beside data, texts of no split are no data.
        (("train.jsonl", "test.jsonl", "about.txt"), 1),
        (("train.jsonl", "about.txt", "words.md"), 1),
        (("train.txt", "about.txt", "words.md"), 3),
        (("train.jsonl", "holdout.jsonl"), 1),
        (("train/a.jsonl", "heldout/a.jsonl"), 1),
        # What is meant is not clear.
        (("train.jsonl", "test.jsonl", "more.jsonl"), None),
        (("test.jsonl", "more.jsonl"), None),
        (("dev.jsonl", "test.jsonl"), None),
        (("train.txt", "test.txt", "more.txt"), None),
    ],
)
def test_names_that_tell_no_split_for_certain(tmp_path, names, read):
    make(tmp_path, *names)
    if read is None:
        with pytest.raises(InputError, match="set the source's `split` to one of them"):
            sources.read(str(tmp_path))
    else:
        assert len(texts(tmp_path)) == read
    assert len(texts(tmp_path, split="all")) == len(names)


@pytest.mark.parametrize(
    ("names", "header", "is_card"),
    [
        (("a.jsonl",), "# Words", True),
        (("sub/a.txt",), "# Words", True),
        (("a.md",), "# Words", False),
        (("a.md",), "---\ntitle: Words\n---\n# Words", False),
        (("a.md",), "---\nlicense: mit\n---\n# Words", True),
    ],
)
def test_cards_of_data_sets(tmp_path, names, header, is_card):
    make(tmp_path, *names)
    (tmp_path / "README.md").write_text(header)
    assert (header in texts(tmp_path)) != is_card
    assert texts(tmp_path / "README.md") == [header]


@pytest.mark.parametrize(
    ("name", "beside", "is_read"),
    [
        ("LICENSE.txt", ("a.jsonl",), False),
        ("LICENSE-MIT.md", ("sub/a.jsonl",), False),
        ("README_zh-CN.md", ("a.jsonl",), False),
        ("readme.txt", ("a.txt",), False),
        ("requirements.txt", ("train.jsonl",), False),
        # Texts of like names, and texts alone.
        ("Notice of a hearing.txt", ("a.txt",), True),
        ("licensed.txt", ("a.jsonl",), True),
        ("LICENSE.md", ("a.md", "README.md"), True),
        ("LICENSE.txt", (), True),
    ],
)
def test_texts_about_others_are_named(tmp_path, warned, name, beside, is_read):
    make(tmp_path, name, *beside)
    assert (name in texts(tmp_path)) == is_read
    assert any(f"not read: {tmp_path}/{name}" in line for line in warned) != is_read
    assert texts(tmp_path / name) == [name]


@pytest.mark.parametrize(
    ("names", "path", "line"),
    [
        (("test.jsonl",), "", "there is only the split: test"),
        (("data/validation-00000-of-00001.jsonl",), "", "only the split: validation"),
        (
            ("a.jsonl", "a.txt"),
            "",
            "files with the name of another in another format are read too: .*a.txt",
        ),
        (
            ("train.jsonl", "test.jsonl"),
            "*.jsonl",
            r"several splits are read, as they are named: test \(1 files\), train",
        ),
        (("train-1.jsonl", "train-2.jsonl"), "*.jsonl", None),
        (("a.jsonl", "b.txt"), "", None),
    ],
)
def test_what_may_not_be_meant_is_reported(tmp_path, warned, names, path, line):
    make(tmp_path, *names)
    assert len(texts(tmp_path / path)) == len(names)
    assert (
        [bool(re.search(line, text)) for text in warned] == [True]
        if line
        else not warned
    )


@pytest.mark.parametrize("above", ["", "repository/", "a/snapshots/1f/"])
def test_shards_have_their_splits_at_any_depth(tmp_path, above):
    shard = above + "data/{}-00000-of-00001.jsonl"
    names = [shard.format(name) for name in ("train_sft", "test_sft", "train_gen")]
    make(tmp_path, *names)
    assert texts(tmp_path, split="train_sft") == names[:1]
    with pytest.raises(InputError, match="has the splits test_sft .*train_gen"):
        sources.read(str(tmp_path))


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    make(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "b.txt")
    found = files.find(str(tmp_path), "", "")
    assert found.passed_over == [found.parts[0].path.parent / "b.txt"]
    with pytest.raises(InputError, match="b.txt: is no regular file"):
        sources.read(str(tmp_path / "b.txt"))


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_file_that_expands_beyond_measure_is_refused(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(readers, "MAX_EXPANDED_BYTES", 1 << 20)
    path = tmp_path / f"bomb.jsonl.{suffix}"
    codec = {"gz": "gzip", "zst": "zstd"}[suffix]
    with (
        pa.OSFile(str(path), "wb") as raw,
        pa.CompressedOutputStream(raw, codec) as out,
    ):
        for _ in range(8):
            out.write(b"\n" * (1 << 20))
    with pytest.raises(
        InputError,
        match=r"bomb.jsonl.*: expands to more than 1 MiB.*sources.NAME.max_expansion",
    ):
        texts(path)
    source = config_lib.source(path=str(path), max_expansion=10**9)
    config = config_lib.default()
    config.sources.bomb = source
    with pytest.raises(InputError, match=r"has no text|is blank|no records"):
        list(corpus.Corpus(config, source, corpus.measure(config)).train_split())


def test_ordinary_compressed_text_is_within_the_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_EXPANDED_BYTES", 1000)
    path = tmp_path / "a.jsonl.gz"
    lines = [f'{{"text": "number {n} of some"}}\n' for n in range(5000)]
    path.write_bytes(gzip.compress("".join(lines).encode()))
    assert len(texts(path)) == 5000


def test_a_text_file_has_a_greatest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_TEXT_BYTES", 2 << 20)
    (tmp_path / "a.txt").write_text("word " * (1 << 19))
    with pytest.raises(InputError, match=r"a.txt: has 2 MiB, at most 2 are supported"):
        texts(tmp_path / "a.txt")


def test_groups_of_an_array_record_have_a_greatest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_GROUP_BYTES", 1 << 20)
    for group in (1, 64):
        file = str(tmp_path / f"{group}.array_record")
        writer = array_record_module.ArrayRecordWriter(file, f"group_size:{group}")
        for _ in range(64):
            writer.write(os.urandom(20_000).hex().encode())
        writer.close()
    assert len(texts(tmp_path / "1.array_record")) == 64
    with pytest.raises(InputError, match="write it with group_size:1"):
        texts(tmp_path / "64.array_record")


def test_reading_reports_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(readers, "_SECONDS_BETWEEN_REPORTS", -1.0)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 200_000)
    assert len(texts(tmp_path / "a.jsonl")) == 200_000
    assert "a.jsonl: read 1 MiB so far" in capsys.readouterr().err
