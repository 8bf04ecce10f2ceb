"""Whatever the files of a model hold, the model is read or refused in one line."""

import json
import random
import shutil

import jax
import jax.numpy as jnp
import pytest
from mutations import EXAMPLES, change, change_bytes, change_json
from pretrained_test import BASE, random_params, write_gguf
from run_records_fuzz_test import refusal
from tokenizer_test import write_bpe_gguf

from mixcpt_jax.models import pretrained, tokenizer, transformer


def read_weights(path):
    config = pretrained.read_model_config(path)
    pretrained.identity(path)
    # The shapes are of the config, which may name any.
    if config.vocab_size * config.hidden_size * config.num_layers < 2**24:
        wanted = transformer.abstract_params(config, jnp.float32)
        pretrained.load_params(path, wanted)


def read_tokenizer(path):
    vocabulary = tokenizer.load(path)
    vocabulary.encode("Two words, 3 € and é\n")
    tokenizer.check_vocabulary(vocabulary, 512, path)


def change_header(file, rng):
    """Changes the JSON in front of the tensors of a safetensors file."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    if rng.random() < 0.5:
        header = change_json(content[8:end].decode(), rng).encode()
        size = len(header)
    else:
        header = change_bytes(content[:end], rng)
        size, header = int.from_bytes(header[:8], "little"), header[8:]
    file.write_bytes(size.to_bytes(8, "little") + header + content[end:])


def make_files(tiny_model, folder):
    """A model in one file, one in several, and as GGUF."""
    for name, most in (("whole", 2**30), ("shards", 2**16)):
        shutil.copytree(tiny_model, folder / name)
        config = pretrained.read_model_config(tiny_model)
        params = transformer.init_params(config, jax.random.key(0))
        vocabulary = tokenizer.load(tiny_model)
        pretrained.save_pretrained(
            str(folder / name),
            params,
            config,
            vocabulary,
            dtype="float32",
            stop_ids=[0],
            max_shard_bytes=most,
        )
    write_gguf(folder / "weights.gguf", BASE, random_params(BASE))
    write_bpe_gguf(str(folder / "words.gguf"), folder / "whole", tokenizer_pre="gpt-2")


@pytest.fixture(scope="module")
def files(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    make_files(tiny_model, folder)
    return folder


CASES = {
    "config.json": ("whole", read_weights),
    "generation_config.json": ("whole", read_tokenizer),
    "tokenizer.json": ("whole", read_tokenizer),
    "tokenizer_config.json": ("whole", read_tokenizer),
    "model.safetensors": ("whole", read_weights),
    "model.safetensors.index.json": ("shards", read_weights),
    "weights.gguf": ("", read_weights),
    "words.gguf": ("", read_tokenizer),
}


@pytest.mark.parametrize("name", CASES)
def test_a_changed_file_is_read_or_refused(files, tmp_path, name):
    folder, read = CASES[name]
    assert refusal(read, str(files / (folder or name))) == ""
    others = [files / "whole" / "config.json", files / "weights.gguf"]
    num_refused = 0
    for seed in range(EXAMPLES):
        rng = random.Random(seed)
        place = tmp_path / str(seed)
        if folder:
            shutil.copytree(files / folder, place)
        else:
            place.mkdir()
            shutil.copy(files / name, place / name)
        file = place / name
        if name == "model.safetensors" and rng.random() < 0.8:
            change_header(file, rng)
        elif name.endswith(".gguf") and rng.random() < 0.9:
            content = file.read_bytes()
            begin = rng.randrange(min(len(content), 4096))
            changed = change_bytes(content[begin : begin + 512], rng)
            file.write_bytes(content[:begin] + changed + content[begin + 512 :])
        else:
            change(file, others, rng)
        message = refusal(read, str(place if folder else file))
        num_refused += bool(message)
        shutil.rmtree(place)
    assert num_refused


def test_settings_of_a_changed_config_are_checked(files, tmp_path):
    """No value that is accepted makes a shape that no model has."""
    raw = json.loads((files / "whole" / "config.json").read_text())
    for key in raw:
        for value in (None, -1, 0, 1e308, "x", [], {}, True, 2**62):
            (tmp_path / "config.json").write_text(json.dumps(raw | {key: value}))
            refusal(pretrained.read_model_config, str(tmp_path))
