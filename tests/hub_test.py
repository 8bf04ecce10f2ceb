"""Models and data sets by their names on the Hub, through the Hub's own client.

`hub_server` speaks the Hub's API on this machine.
"""

import errno
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import hub_server
import huggingface_hub
import jax
import ml_collections
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from huggingface_hub import _tree_cache, constants, file_download

from mixcpt_jax import config as config_lib
from mixcpt_jax import main
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import exams, hub, sources, tasks
from mixcpt_jax.evaluation import load_model
from mixcpt_jax.models import huggingface_export, pretrained, tokenizer, transformer
from mixcpt_jax.training import phase

ID = "org/tiny"
# The client's own way to send bytes.
uploads = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def forget() -> None:
    """What a new process would not know."""
    hub._commit.cache_clear()
    hub._files.cache_clear()
    hub._folders.cache_clear()


@pytest.fixture
def server(monkeypatch, tmp_path):
    with hub_server.serving() as server:
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        forget()
        yield server
        huggingface_hub.close_session()
    forget()


@pytest.fixture
def served(server, tiny_model):
    """The server, with the tiny model and files that nobody needs."""
    server.commit("models", ID, contents(tiny_model))
    server.commit("models", ID, {"pytorch_model.bin": b"-", "onnx/model.onnx": b"-"})
    return server


def contents(folder):
    return {f.name: f.read_bytes() for f in pathlib.Path(folder).iterdir()}


def load(path):
    config = pretrained.read_model_config(path)
    template = transformer.abstract_params(config)
    return pretrained.load_params(path, template)


def test_a_model_by_its_id_is_the_model_of_its_files(served, tiny_model):
    expected, found = load(tiny_model), load(ID)
    jax.tree.map(np.testing.assert_array_equal, expected, found)
    assert pretrained.identity(ID) == pretrained.identity(tiny_model)
    mine, theirs = tokenizer.load(ID), tokenizer.load(tiny_model)
    assert mine.fingerprint == theirs.fingerprint


def test_only_what_is_read_is_downloaded_once(served):
    load(ID)
    tokenizer.load(ID)
    forget()
    load(f"hf://{ID}")
    found = served.downloads()
    assert len(found) == len({*found})
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {*found}
    assert not {"pytorch_model.bin", "onnx/model.onnx"} & {*found}


def test_a_config_is_read_without_the_weights(served):
    pretrained.read_model_config(ID)
    assert "model.safetensors" not in served.downloads()


@pytest.mark.slow
def test_of_several_formats_the_shards_in_the_index_are_downloaded(
    server, tiny_model, tmp_path
):
    config = pretrained.read_model_config(tiny_model)
    folder = str(tmp_path / "sharded")
    params = load(tiny_model)
    huggingface_export.save_pretrained(
        folder, params, config, dtype="float32", max_shard_bytes=2**15
    )
    server.commit("models", ID, contents(folder) | {"consolidated.safetensors": b"-"})
    jax.tree.map(np.testing.assert_array_equal, params, load(ID))
    names = [n for n in server.downloads() if n.endswith(".safetensors")]
    assert len(names) > 1
    assert "consolidated.safetensors" not in names


def test_a_folder_and_a_file_in_a_repository(server, tiny_model):
    below = {f"base/{name}": c for name, c in contents(tiny_model).items()}
    server.commit("models", ID, below)
    load(f"hf://{ID}/base")
    expected = tokenizer.load(tiny_model).fingerprint
    assert tokenizer.load(f"hf://{ID}/base/tokenizer.json").fingerprint == expected


def test_a_local_folder_wins(served, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / ID).symlink_to(tiny_model)
    pretrained.identity(ID)
    assert not served.requests


@pytest.mark.slow
def test_a_broken_transfer_resumes_where_it_broke(server, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    content = os.urandom(3000)
    server.commit("models", ID, {"config.json": b"{}", "model.safetensors": content})
    server.cut["model.safetensors"] = 2000
    folder = hub.local_model(ID, "model.safetensors")
    assert pathlib.Path(folder, "model.safetensors").read_bytes() == content
    (again,) = [request.range for request in server.requests if request.range]
    assert again == "bytes=2000-"


def test_a_download_says_how_far_it_is(served, monkeypatch, capsys):
    monkeypatch.setattr(hub, "_SECONDS_BETWEEN_REPORTS", 0)
    size = 3 * 2**20
    served.commit("models", ID, {"model.safetensors": os.urandom(size)})
    hub.local_model(ID, "model.safetensors")
    said = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"{ID}: downloads 4 files of commit \w+, 3.0 MiB", said[0])
    assert "downloaded 3 of 3 MiB" in said


@pytest.mark.slow
def test_a_killed_process_leaves_its_whole_files(server, tmp_path, project):
    names = ["model-1.safetensors", "model-2.safetensors"]
    files = {name: name.encode() for name in ("config.json", *names)}
    server.commit("models", ID, files)
    held = server.hold(names[1])
    code = f"from mixcpt_jax.data import hub; hub.local_model({ID!r}, *{names})"
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HUB_CACHE": constants.HF_HUB_CACHE,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(project),
    }
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
        try:
            assert held.wait(120)
            deadline = time.monotonic() + 120
            while not any(pathlib.Path(constants.HF_HUB_CACHE).rglob(names[0])):
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            process.kill()
    server.release()
    hub.local_model(ID, *names)
    assert server.downloads().count(names[0]) == 1
    assert server.downloads().count(names[1]) == 2


def test_a_process_reads_one_commit(served):
    first = hub.local_model(ID)
    served.commit("models", ID, {"config.json": b"{}"})
    assert hub.local_model(ID) == first


def test_a_run_keeps_its_commits(served, tmp_path):
    """On resume, and in phases that start from its phases."""
    config = ml_collections.ConfigDict(
        {"init_from": "", "model": {"path": ID, "tokenizer": f"hf://{ID}@main"}}
    )
    folder = epath.Path(tmp_path)
    now, commits = phase.resolve(config, folder)
    commit = commits[f"hf://{ID}"]
    assert now.model.path == now.model.tokenizer == f"hf://{ID}@{commit}"
    for name in ("provenance.json", "cpt/provenance.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps({"commits": commits}))
    newer = served.commit("models", ID, {"config.json": b"{}"})
    forget()
    assert phase.resolve(config, folder) == (now, commits)
    config.init_from = "phase:cpt"
    assert phase.resolve(config, folder / "sft")[1] == commits
    config.init_from = ""
    assert {*phase.resolve(config, folder / "sft")[1].values()} == {newer}


def test_a_pinned_config_names_what_the_config_named(served):
    config = config_lib.default()
    config.model.path = f"{ID}@main"
    config.eval.prompts = f"data.jsonl, hf://{ID}/config.json,hf://{ID}"
    commits = hub.commits(config, {})
    pinned = hub.pin(config, commits)
    (commit,) = {*commits.values()}
    at = f"hf://{ID}@{commit}"
    assert pinned.model.path == at
    assert pinned.eval.prompts == f"data.jsonl, {at}/config.json,{at}"
    assert hub.pin(pinned, hub.commits(pinned, {})).to_dict() == pinned.to_dict()


def problem(path, *names) -> str:
    with pytest.raises(InputError) as error:
        hub.local_model(path, *names)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{path}: ")
    return line


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("org/none", ["no such file or folder", "the Hub shows no such model", "HF_TOKEN"]),
        ("hf://org/none", ["the Hub shows no such model"]),
        ("hf://datasets/org/none", ["the Hub shows no such data set"]),
        ("org/tiny@v3", ["no revision 'v3'", "name a branch"]),
        ("org/gated", ["restricted", "accept the terms at http", "/org/gated ", "HF_"]),
        ("hf://tiny", ["write hf://ORG/NAME"]),
        ("hf://spaces/org/tiny", ["names a space"]),
        ("hf://org/tiny/gguf", ["has no gguf", "config.json"]),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_one_line(served, path, told):
    served.commit("models", "org/gated", {})
    served.gated.add("org/gated")
    line = problem(path)
    assert all(part in line for part in told), line


def test_folders_with_the_names_of_kinds_on_the_hub_are_local():
    """The Hub's addresses are hf://models/ORG/NAME, so models/mine is no model there."""
    assert hub.is_model_id("org/mine")
    for path in ("models/mine", "datasets/mine"):
        assert not hub.is_model_id(path)
        with pytest.raises(InputError, match=f"{path}/config.json: no such file"):
            pretrained.read_model_config(path)


def test_a_token_opens_what_is_gated(served, monkeypatch):
    served.gated.add(ID)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pretrained.read_model_config(ID)


def test_a_repository_without_safetensors(server):
    server.commit("models", ID, {"config.json": b"{}", "pytorch_model.bin": b"-"})
    line = problem(ID, "model.safetensors")
    assert "has no model.safetensors" in line
    assert "pytorch_model.bin" in line


def test_without_network_the_cache_serves(served, monkeypatch):
    load(ID)
    forget()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    load(ID)
    line = problem("org/other")
    assert "the Hub cannot be reached at http://127.0.0.1:9" in line
    assert "check the network and HF_ENDPOINT" in line


def test_offline_the_cache_serves(served, monkeypatch):
    pretrained.read_model_config(ID)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget()
    asked = len(served.requests)
    pretrained.read_model_config(ID)
    assert "HF_HUB_OFFLINE is set" in problem(ID, "model.safetensors")
    assert "HF_HUB_OFFLINE is set" in problem("hf://org/other")
    assert len(served.requests) == asked


def test_offline_the_files_of_other_programs_serve(served, monkeypatch):
    """An older version of the library keeps no list of a repository's files."""
    expected = load(ID)
    for lists in pathlib.Path(constants.HF_HUB_CACHE).rglob("trees"):
        shutil.rmtree(lists)
    monkeypatch.setattr(_tree_cache, "_IN_MEMORY_TREE_CACHE", {})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget()
    jax.tree.map(np.testing.assert_array_equal, expected, load(ID))


def test_commands_load_a_model_of_the_hub(served, tiny_model):
    assert load_model.context(ID) == load_model.context(tiny_model)
    with pytest.raises(InputError, match="org/none: .* the Hub shows no such model"):
        load_model.context("org/none")


def test_a_template_exam_and_task_on_the_hub(served):
    served.commit("models", ID, {"mine.jinja": tokenizer.CHATML.encode()})
    loaded = tokenizer.load(ID, f"hf://{ID}/mine.jinja")
    assert loaded.template == tokenizer.CHATML
    question = {"question": "one?", "choices": ["a", "b"], "answer": 1}
    exam = {"exam.jsonl": json.dumps(question).encode()}
    served.commit("datasets", "org/facts", exam)
    assert exams.read(f"{SET}/exam.jsonl") == [question]
    assert tasks.read(f"quiz={SET}").kind == "choice"


def test_a_full_disk(served, monkeypatch):
    def write(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(file_download, "http_get", write)
    assert "make room on the disk" in problem(ID)


SET = "hf://datasets/org/facts"


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def rows(*texts):
    pq.write_table(pa.table({"text": texts}), sink := io.BytesIO())
    return sink.getvalue()


def texts(**settings):
    """What a source with these settings reads."""
    config = config_lib.default()
    config.sources.facts = config_lib.source(**settings)
    source = hub.pin(config, hub.commits(config, {})).sources.facts
    read = sources.read(source.path, source.reader, source.split)
    return [record.fields["text"] for record in read]


SHARDS = {
    "README.md": b"# Facts",
    "data/train-00000-of-00002.parquet": rows("a", "b"),
    "data/train-00001-of-00002.parquet": rows("c"),
    "data/test-00000-of-00001.parquet": rows("d"),
    "de/train.jsonl": lines("e"),
}
CARD = b"""---
configs:
- config_name: en
  data_files:
  - {split: first, path: "data/train-*"}
  - {split: second, path: ["data/**/test-*"]}
- config_name: de
  data_files: de/train.jsonl
---
"""


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"path": f"{SET}/data"}, "abc"),
        ({"path": f"{SET}/data", "split": "test"}, "d"),
        ({"path": f"{SET}/data", "split": "all"}, "dabc"),
        ({"path": f"{SET}/data/train-*.parquet"}, "abc"),
        ({"path": SET, "data_files": "data/test*, de/*"}, "de"),
        ({"path": SET, "subset": "de"}, "e"),
        ({"path": f"{SET}/de/train.jsonl,{SET}@main/data"}, "eabc"),
    ],
    ids=str,
)
def test_files_of_a_data_set_by_their_names(server, settings, expected):
    server.commit("datasets", "org/facts", SHARDS)
    assert texts(**settings) == list(expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"subset": "en", "split": "first"}, "abc"),
        ({"subset": "en", "split": "second"}, "d"),
        ({"subset": "en", "split": "all"}, "abcd"),
        ({"subset": "de"}, "e"),
        ({"subset": "de", "split": "train"}, "e"),
        ({"data_files": "data/train-00001*"}, "c"),
    ],
    ids=str,
)
def test_files_of_a_data_set_by_its_card(server, settings, expected):
    server.commit("datasets", "org/facts", SHARDS | {"README.md": CARD})
    assert texts(path=SET, **settings) == list(expected)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "facts.subset='': must be one of de, en"),
        ({"subset": "fr"}, "facts.subset='fr': must be one of de, en"),
        ({"subset": "en"}, "facts.split='': must be one of all, first, second"),
        (
            {"subset": "de", "split": "dev"},
            "facts.split='dev': must be one of all, train",
        ),
        ({"data_files": "*.csv"}, "no file matches"),
    ],
)
def test_what_is_ambiguous_lists_the_choices(server, settings, told):
    server.commit("datasets", "org/facts", SHARDS | {"README.md": CARD})
    with pytest.raises(InputError, match=re.escape(told)):
        texts(path=SET, **settings)


def test_a_subset_without_a_card_is_a_folder(server):
    server.commit("datasets", "org/facts", SHARDS)
    with pytest.raises(InputError, match=r"subset='fr': .* only README.md, data, de;"):
        texts(path=SET, subset="fr")


@pytest.mark.parametrize("key", ["subset", "data_files"])
def test_a_local_source_has_no_keys_of_the_hub(key):
    config = config_lib.default()
    config.model.path = "model"
    config.sources.facts = config_lib.source(path="facts", **{key: "de"})
    with pytest.raises(
        InputError, match=rf"sources.facts.{key}='de': needs one data set"
    ):
        config_lib.validate(config)


def test_an_id_of_a_data_set_needs_its_scheme():
    with pytest.raises(
        InputError, match="no file matches; .* hf://datasets/org/facts$"
    ):
        sources.read("org/facts")


def test_a_source_is_read_while_its_files_arrive(server):
    server.commit("datasets", "org/facts", SHARDS)
    records = sources.read(f"{SET}/data")
    next(records)
    assert server.downloads()[1:] == ["data/train-00000-of-00002.parquet"]
    place = [record.place for record in records][-1]
    commit = hub.commits(ml_collections.ConfigDict({"eval": SET}), {})[SET]
    file = f"{SET}@{commit}/data/train-00001-of-00002.parquet"
    assert place == f"{file}:row group 0, row 0"


def test_files_on_the_hub_are_hashed_without_a_download(server):
    server.commit("datasets", "org/facts", SHARDS)
    before = sources.hashes(SET, split="train")
    assert [f for f in server.downloads() if f != "README.md"] == []
    server.commit("datasets", "org/facts", {"de/train.jsonl": lines("f")})
    forget()
    after = sources.hashes(SET, split="train")
    changed = [a != b for a, b in zip(before.values(), after.values(), strict=True)]
    assert changed == [False, False, True]


def test_offline_a_file_that_is_not_in_the_cache_is_an_error(server, monkeypatch):
    server.commit("datasets", "org/facts", SHARDS)
    next(sources.read(f"{SET}/data"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget()
    records = sources.read(f"{SET}/data")
    assert [next(records).fields["text"] for _ in range(2)] == ["a", "b"]
    with pytest.raises(InputError, match="train-00001.*HF_HUB_OFFLINE is set"):
        next(records)


@uploads
def test_a_push_makes_one_commit(server, tmp_path):
    files = {
        "config.json": b"{}",
        "README.md": b"# Mine",
        "model.safetensors": b"-" * 9,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    first = hub.push(epath.Path(tmp_path), "me/mine", True)
    found = server.files("models", "me/mine")
    assert {name: found[name] for name in files} == files
    assert server.private["me/mine"] in (True, "private")
    (tmp_path / "config.json").write_bytes(b"[]")
    second = hub.push(epath.Path(tmp_path), "me/mine", True)
    assert first.partition("@")[0] == second.partition("@")[0] == "hf://me/mine"
    assert (
        server.files("models", "me/mine", second.partition("@")[2])["config.json"]
        == b"[]"
    )


def test_a_push_that_the_hub_refuses_is_one_line(server, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_bytes(b"{}")
    server.gated.add("me/mine")
    with pytest.raises(InputError, match=r"export.hub_id=me/mine: .*set HF_TOKEN"):
        hub.push(epath.Path(tmp_path), "me/mine", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="export.hub_id=me/mine: the Hub cannot be re"):
        hub.push(epath.Path(tmp_path), "me/mine", True)


@pytest.mark.parametrize(
    ("name", "told"),
    [("mine", "export.hub_id='mine': must be ORG/NAME"), ("me/mine", "set HF_TOKEN")],
)
def test_a_push_is_checked_before_the_run(name, told, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    config = config_lib.default()
    config.job = "export"
    config.model.path = "model"
    config.export.hub_id = name
    with pytest.raises(InputError, match=told):
        config_lib.validate(config)


@uploads
@pytest.mark.slow
def test_from_the_hub_to_the_hub(served, tiny_config, tmp_path, monkeypatch):
    """A model and a data set by their names, and the card of what was made of them."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    card = b"---\nlicense: apache-2.0\n---\n# Tiny\n"
    base = served.commit("models", ID, {"README.md": card})
    passages = [f"passage {i} about the facts of day {i}" for i in range(64)]
    facts = served.commit("datasets", "org/facts", {"train.jsonl": lines(*passages)})
    config = tiny_config
    config.model.path = ID
    config.sources.domain.path = SET
    config.train.num_steps = 1
    config.phases = ("cpt", "export")
    config.overrides.export = {"init_from": "phase:cpt", "job": "export"}
    config.export.hub_id = "me/mine"
    _, results = main.run(config, str(tmp_path / "run"))
    pushed = served.files("models", "me/mine")
    written = contents(tmp_path / "run" / "export" / "hf")
    assert {k: v for k, v in pushed.items() if k != ".gitattributes"} == written
    text = written["README.md"].decode()
    header = huggingface_hub.ModelCard(text).data.to_dict()
    assert header["base_model"] == [ID]
    assert header["license"] == "apache-2.0"
    assert header["datasets"] == ["org/facts"]
    assert f"org/facts@{facts[:12]}" in text
    assert "logit swap self-distillation" in text
    assert "arxiv.org/abs/2407.10804" in text
    assert "| domain: perplexity" in text
    assert str(tmp_path) not in text
    provenance = json.loads((tmp_path / "run/cpt/provenance.json").read_text())
    assert provenance["commits"] == {f"hf://{ID}": base, SET: facts}
    # Both repositories move on; the run does not.
    served.commit("models", ID, {"config.json": b"{}"})
    served.commit("datasets", "org/facts", {"train.jsonl": b"{}"})
    forget()
    (tmp_path / "run" / "export" / "results.json").unlink()
    _, again = main.run(config, str(tmp_path / "run"))
    assert again["cpt"] == results["cpt"]
    assert contents(tmp_path / "run" / "export" / "hf") == written
    # A finished run needs neither the Hub nor the cache.
    forget()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    assert main.run(config, str(tmp_path / "run"))[1] == again
