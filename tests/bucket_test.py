"""Runs and models in a bucket, and what happens when it fails.

The server is on this machine; gcsfs and TensorStore have no credentials for it, and say
so.
"""

import urllib.error
import urllib.parse
import urllib.request

import bucket
import gcsfs.retry
import gguf
import jax
import numpy as np
import pytest
from etils import epath
from processes import finish, kill

from mixcpt_jax import config as config_lib
from mixcpt_jax.cli import command
from mixcpt_jax.core import paths
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.models import (
    gguf_file,
    huggingface_export,
    pretrained,
    tokenizer,
    transformer,
)
from mixcpt_jax.runtime import metrics
from mixcpt_jax.training import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

NUM_STEPS = 8


@pytest.fixture(scope="module")
def port():
    with bucket.serve() as port:
        yield port


@pytest.fixture
def faults():
    """None at first; tests change their share."""
    return bucket.Faults(share=0.0)


@pytest.fixture
def faulty_port(port, faults):
    with bucket.faulty(port, faults) as faulty_port:
        yield faulty_port


@pytest.fixture(autouse=True)
def folder(faulty_port, faults, request):
    """A folder of the test's own, without faults as long as the test asks for none."""
    with bucket.reached_by(faulty_port) as root:
        yield root / request.node.name


def is_there(path, port):
    """Whether an object is in the bucket, by a request to its server."""
    name = urllib.parse.quote(f"{path}".removeprefix("gs://bucket/"), safe="")
    try:
        url = f"http://localhost:{port}/storage/v1/b/bucket/o/{name}"
        urllib.request.urlopen(url).close()
    except urllib.error.HTTPError as error:
        error.close()
        return False
    return True


def lines(workdir):
    rows = metrics.read(epath.Path(workdir))
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in rows]


@pytest.mark.long
def test_a_run_in_a_bucket_that_fails_now_and_then_is_killed_and_goes_on(
    launcher,
    tiny_config,
    write_config_file,
    folder,
    port,
    faulty_port,
    faults,
    tmp_path,
):
    tiny_config.train.num_steps = NUM_STEPS
    tiny_config.train.save_every = 4
    tiny_config.metrics.tensorboard = True
    flag = f"--config={write_config_file(tiny_config)}"
    finish([launcher.start(flag, f"--workdir={tmp_path}/local")])
    env = bucket.environment(faulty_port)
    faults.share = 0.04

    killed = launcher.start(flag, f"--workdir={folder}", env=env)
    saved = folder / checkpoint.FOLDER / "4" / "commit_success.txt"
    # Asked without faults, for each of which gcsfs waits longer than the run lasts.
    assert kill(killed, lambda: is_there(saved, port)), killed.output
    assert not (folder / "results.json").exists()
    # What the checkpoint holds is in the record, too.
    assert {row["step"] for row in lines(folder)} >= {0, 1, 2, 3, 4}

    finish([launcher.start(flag, f"--workdir={folder}", env=env)])
    assert set(faults.counts) == {"", *bucket.KINDS}
    faults.share = 0.0
    assert lines(folder) == lines(tmp_path / "local")
    assert len(list((folder / "tensorboard").iterdir())) == 2


def test_a_bucket_that_is_away_is_named_and_nothing_is_taken_for_damaged(
    folder, faults, monkeypatch, capsys
):
    (folder / "checkpoints" / "4" / "_CHECKPOINT_METADATA").write_text("{}")
    monkeypatch.setattr(faults, "kinds", ("refused",))
    monkeypatch.setattr(gcsfs.retry, "min", lambda *_: 0, raising=False)  # no waiting
    faults.share = 1.0
    with pytest.raises(SystemExit) as stop:
        command.run((folder / "config.json").exists)
    assert stop.value.code == 1
    assert "error: the bucket cannot be read or written" in capsys.readouterr().err
    with pytest.raises(gcsfs.retry.HttpError):
        checkpoint._read((folder / "config.json").read_text)


def test_lines_in_a_bucket_are_there_after_each_save(folder):
    def write(resume_step, steps):
        writer = metrics.Writer(folder, config_lib.default().metrics, resume_step, {})
        for step in steps:
            writer.write(step, {"loss": float(step)})
        return writer

    write(-1, [1, 2]).save()  # and then it is killed
    assert [row["step"] for row in metrics.read(folder)] == [1, 2]
    with write(1, [2, 3]):
        pass
    assert [row["step"] for row in metrics.read(folder)] == [1, 2, 3]
    assert [file.name for file in folder.glob("*.tmp")] == []


def test_what_others_write_is_seen(folder, port):
    (folder / "one").write_text("1")
    assert [file.name for file in folder.iterdir()] == ["one"]
    address = f"http://localhost:{port}/upload/storage/v1/b/bucket/o?uploadType=media"
    name = f"{folder}/two".removeprefix("gs://bucket/")
    urllib.request.urlopen(f"{address}&name={name}", data=b"2").close()
    assert (folder / "two").exists()
    assert sorted(file.name for file in folder.iterdir()) == ["one", "two"]


def test_a_model_comes_from_a_bucket_and_goes_to_one(tiny_model, folder, tmp_path):
    for file in epath.Path(tiny_model).iterdir():
        paths.copy_file(file, folder / "hf" / file.name)
    model_config = pretrained.read_model_config(f"{folder}/hf")
    abstract = transformer.abstract_params(model_config)
    params = pretrained.load_params(f"{folder}/hf", abstract)
    expected = pretrained.load_params(tiny_model, abstract)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    vocabulary = tokenizer.load(f"{folder}/hf")
    assert vocabulary.fingerprint == tokenizer.load(tiny_model).fingerprint

    target = folder / huggingface_export.FOLDER / "new"
    for dtype in ("float32", "bfloat16"):  # the second takes the place of the first
        for place in (target, tmp_path / "new"):
            pretrained.save_pretrained(
                str(place), params, model_config, vocabulary, dtype=dtype
            )
    local = {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()}
    assert {file.name: file.read_bytes() for file in target.iterdir()} == local
    (target / "mine.txt").write_text("x")
    with pytest.raises(InputError, match=r"holds mine\.txt"):
        pretrained.save_pretrained(str(target), params, model_config)


def test_a_gguf_file_comes_from_a_bucket(folder, tmp_path):
    numbers = np.arange(12, dtype=np.float32).reshape(3, 4)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    paths.copy_file(epath.Path(tmp_path) / "model.gguf", folder / "model.gguf")
    (tensor,) = gguf_file.open_gguf(folder / "model.gguf").tensors
    # Its copy is deleted, and still mapped.
    np.testing.assert_array_equal(tensor.data, numbers)
