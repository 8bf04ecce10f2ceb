"""Folders and files of any name work, or are refused before they are used."""

import contextlib
import os
import sys

import hypothesis
import jax.numpy as jnp
import pytest
from etils import epath
from hypothesis import strategies as st

from mixcpt_jax.core import paths
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import sources, token_cache
from mixcpt_jax.training import checkpoint
from mixcpt_jax.training.steps import TrainState

# Weighted towards special characters of shells, patterns and URLs.
NAMES = st.text(st.sampled_from("[]*?!-%#&=:;,~ '\"{}$.aé日\n"), min_size=1).filter(
    lambda name: name not in (".", "..") and len(name.encode()) < 200
)


@hypothesis.given(name=NAMES, other=NAMES)
def test_a_folder_of_any_name_lists_its_own_files(tmp_path_factory, name, other):
    root = tmp_path_factory.mktemp("names")
    for folder in {name, other}:
        (root / folder).mkdir()
        (root / folder / "a.txt").touch()
    folder = paths.absolute(f"{root}/{name}")
    assert [str(file) for file in folder.glob("*.txt")] == [f"{root}/{name}/a.txt"]
    assert list((folder / "x").parent.glob("b*")) == []


@hypothesis.given(name=NAMES)
def test_a_file_of_any_name_is_read(tmp_path_factory, name):
    file = tmp_path_factory.mktemp("names") / f"{name}.txt"
    file.write_text("content")
    [record] = sources.read(str(file))
    assert record.fields == {"id": str(file), "text": "content"}
    assert list(sources.hashes(str(file))) == [str(file)]


@pytest.mark.parametrize("name", ["run [1]", "a*b**?", "50% #1?x=ü", "checkpoints"])
def test_checkpoints_in_a_folder_of_any_name_are_read_back(tmp_path, name):
    folder = paths.absolute(f"{tmp_path}/{name}")
    checkpoint.check_folder(folder / "phase")
    assert list(tmp_path.iterdir()) == []
    tree = {"x": jnp.arange(3.0)}
    state = TrainState(jnp.zeros((), jnp.int32), tree, tree)
    provenance = {"start": {}}
    with checkpoint.Checkpoints(folder, keep_last=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(state, step, step, {}, {}, provenance)
    restored = checkpoint.restore(folder, state, {}, provenance)
    assert restored.step == 2
    for path in (folder, folder / checkpoint.FOLDER):
        loaded = checkpoint.load_params(str(path), tree)
        assert (loaded["x"] == tree["x"]).all()
    assert checkpoint.newest_step(folder) == 2
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.filterwarnings("ignore")  # Orbax leaves coroutines behind
def test_a_folder_whose_checkpoints_cannot_be_read_is_refused(tmp_path):
    # With the library's own paths, which read the name as a pattern.
    folder = epath.Path(tmp_path) / "run [1]"
    with pytest.raises(InputError, match="cannot be written there and read back"):
        checkpoint.check_folder(folder)
    with pytest.raises(InputError, match=r"No such file .*give another --workdir"):
        checkpoint.check_folder(paths.absolute("/proc/no/such/folder"))


@pytest.mark.parametrize("name", [b"caf\xe9", b"a\\b"])
def test_a_folder_to_write_to_that_cannot_be_read_again_is_refused(name):
    with pytest.raises(InputError, match="not supported; give it another name") as e:
        paths.absolute(os.fsdecode(name))
    assert str(e.value).encode()


def test_where_a_result_cannot_be_written_is_known_before_the_work(tmp_path):
    """Its folder is made first, so hours of work cannot end in a missing folder."""
    file = paths.output_file(str(tmp_path / "new" / "er" / "result.json"))
    paths.replace(file, "{}")
    assert file.read_text() == "{}"
    with pytest.raises(InputError, match="is a folder"):
        paths.output_file(str(tmp_path))
    with pytest.raises(InputError, match="its folder cannot be made"):
        paths.output_file(str(file / "below.json"))


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "array_record"])
def test_a_name_that_is_not_utf8_is_read_and_written(tmp_path, suffix):
    file = os.path.join(tmp_path, os.fsdecode(b"caf\xe9." + suffix.encode()))
    if suffix == "array_record":
        entry = token_cache.write_shard(epath.Path(tmp_path), 0, [b'{"text": "x"}'], {})
        os.rename(tmp_path / entry["file"], file)
    else:
        with open(file, "w") as content:
            content.write('{"text": "x"}\n')
    [record] = sources.read(file)
    assert record.place.startswith(file)
    paths.replace(epath.Path(tmp_path / "report"), f"# {record.place}\n")
    assert r"caf\udce9." in (tmp_path / "report").read_text()


def test_shards_of_other_folders_stay(tmp_path):
    """Even if the folder's name is a pattern."""
    for name in ("[ab]", "*", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "00001.array_record").touch()
    for name in ("[ab]", "*"):
        token_cache.write_manifest(
            token_cache.folder_of(str(tmp_path), name), {}, [], {}
        )
        assert [f.name for f in (tmp_path / name).iterdir()] == ["manifest.json"]
    assert (tmp_path / "a" / "00001.array_record").exists()


PACKAGES = (
    "plain",
    "dotted.inner",
    ".plain",
    "plain.",
    "__main__",
    "no such",
    "a\0b",
    "",
)


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("file", ["a.txt", "../a.txt", "x/../../a.txt", "/etc/passwd"])
def test_a_package_is_found_and_not_imported(tmp_path, monkeypatch, name, file):
    """Neither its own code runs, nor that of a package above it."""
    for package in ("plain", "dotted", "dotted/inner"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "a.txt").touch()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    if (name, file) == ("plain", "a.txt"):
        assert str(paths.resolve(f"package:{name}/{file}")) == f"{tmp_path}/plain/a.txt"
    else:
        with pytest.raises(InputError, match="package"):
            paths.resolve(f"package:{name}/{file}")
    assert not {"plain", "dotted"} & sys.modules.keys()


@hypothesis.given(
    name=st.text(st.sampled_from("./\\a\0\n\ud800~:*")) | st.integers() | st.none()
)
def test_a_name_from_data_stays_in_its_folder(name):
    place = epath.Path("/run"), name, "report.json: phase"
    if isinstance(name, str) and name and not name.strip("a~:*"):
        assert str(paths.child(*place)) == f"/run/{name}"
        return
    with contextlib.suppress(InputError):
        child = paths.child(*place)
        assert os.path.dirname(os.path.normpath(child)) == "/run"
        assert str(child).isprintable()


def test_sizes_are_of_regular_files_at_any_depth(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("123")
    (tmp_path / "link").symlink_to("a/b/file")
    (tmp_path / "nowhere").symlink_to("gone")
    (tmp_path / "itself").symlink_to("itself")
    (tmp_path / "folder").symlink_to("a")
    os.mkfifo(tmp_path / "pipe")
    assert paths.sizes(epath.Path(tmp_path)) == {"a/b/file": 3, "link": 3}
    assert paths.sizes(epath.Path(tmp_path / "none")) == {}
