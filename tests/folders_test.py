"""Of a model folder and of file headers all is read, or refused by name."""

import dataclasses
import itertools
import json
import pathlib
import shutil
import time

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mixcpt_jax import config as config_lib
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.evaluation import load_model
from mixcpt_jax.models import pretrained, tokenizer, transformer
from mixcpt_jax.training import checkpoint, phase

CONFIG = transformer.ModelConfig(
    family="llama",
    vocab_size=64,
    hidden_size=32,
    mlp_size=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    max_positions=64,
    rope_theta=1e4,
)
INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path):
    """(folder, tensor -> file) of a model in several files."""
    folder = tmp_path / "model"
    params = transformer.init_params(CONFIG, jax.random.key(0))
    pretrained.save_pretrained(
        str(folder), params, CONFIG, dtype="float32", max_shard_bytes=2**14
    )
    return folder, json.loads((folder / INDEX).read_text())["weight_map"]


def outcome(read, *args):
    """(what it returns, the message of the `InputError` that it raises)."""
    try:
        return read(*args), ""
    except InputError as error:
        return None, str(error)


def load(folder):
    config = pretrained.read_model_config(str(folder))
    return pretrained.load_params(
        str(folder), transformer.abstract_params(config, jnp.float32)
    )


def edit(file, change):
    tensors = {name: np.array(x) for name, x in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_of_a_tensor_in_two_files_the_index_names_one(sharded):
    folder, weight_map = sharded
    expected = load(folder)
    for name, file in weight_map.items():
        for other in set(weight_map.values()) - {file}:
            edit(folder / other, lambda t, n=name: t.update({n: np.zeros(3, "f4")}))
    jax.tree.map(np.testing.assert_array_equal, load(folder), expected)


def test_index_and_files_must_agree(sharded):
    folder, weight_map = sharded
    name, file = next(iter(weight_map.items()))
    for changed, message in (
        (
            {name: next(f for f in weight_map.values() if f != file)},
            f"{name} is not in",
        ),
        ({"other.weight": file}, "other.weight is not in"),
        ({name: 3}, r"weight_map of tensor .*: 3 must be the name of a file"),
        *(
            ({name: path}, "must be the name of a file or folder in")
            for path in ("../elsewhere.safetensors", "..", "", "/a", "a\0b", "a" * 256)
        ),
    ):
        written = {"weight_map": weight_map | changed}
        (folder / INDEX).write_text(json.dumps(written))
        with pytest.raises(InputError, match=message):
            load(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    edit(folder / file, lambda t: t.update({"extra": np.zeros(3, "f4")}))
    with pytest.raises(InputError, match=rf"{file}: tensor extra is not in {INDEX}"):
        load(folder)


def test_weights_of_two_saves_are_refused_and_others_reported(sharded, caplog):
    folder, weight_map = sharded
    save_file({"a": np.zeros(3, "f4")}, folder / "consolidated.safetensors")
    load(folder)
    assert "not read: consolidated.safetensors" in caplog.text
    save_file({"a": np.zeros(3, "f4")}, folder / "model.safetensors")
    with pytest.raises(InputError, match="weights of two saves"):
        load(folder)
    for file in {*weight_map.values(), INDEX, "model.safetensors"}:
        (folder / file).unlink()
    with pytest.raises(InputError, match=r"consolidated\.safetensors is not read"):
        load(folder)


def test_a_tied_model_repeats_its_embedding_or_is_refused(tmp_path):
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    params = transformer.init_params(tied, jax.random.key(0))
    pretrained.save_pretrained(str(tmp_path / "m"), params, tied, dtype="float32")
    file = tmp_path / "m" / "model.safetensors"

    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    edit(file, repeat)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "m"), params)
    edit(file, lambda t: t["lm_head.weight"].__setitem__((63, 31), 1.0))
    with pytest.raises(InputError, match=r"lm_head\.weight differs from the embedding"):
        load(tmp_path / "m")


def test_an_adapter_is_refused_by_its_name(sharded, tmp_path):
    def write(folder):
        folder.mkdir(exist_ok=True)
        settings = {"peft_type": "LORA", "base_model_name_or_path": "some/base"}
        (folder / "adapter_config.json").write_text(json.dumps(settings))

    write(tmp_path / "adapter")
    for read in (pretrained.read_model_config, load_model.load):
        with pytest.raises(InputError, match="an adapter of some/base and no model"):
            read(str(tmp_path / "adapter"))
    write(sharded[0])
    with pytest.raises(InputError, match="an adapter .* beside a model"):
        load(sharded[0])


# Values that no key allows: wrong types, and numbers out of range.
WRONG = st.one_of(
    st.integers(max_value=-1),
    st.integers(min_value=2**60),
    st.floats(max_value=-0.5) | st.sampled_from([float("nan"), float("inf")]),
    st.text(max_size=8),
    st.lists(st.none() | st.text(max_size=3), min_size=1, max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), min_size=1, max_size=2),
)
HF = {
    "llama": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5},
    "qwen3": {"head_dim": 8},
    "gemma2": {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "layer_types": ["full_attention"] * 2,
    },
    "gemma3_text": {
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_local_base_freq": 1e4,
        "sliding_window_pattern": 2,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
}
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "attention_bias": False,
    "max_position_embeddings": 64,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}


def places(values):
    """Paths to all values of nested objects, to the objects themselves too."""
    for key, value in values.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, *rest) for rest in places(value))


@given(st.data())
def test_config_json_loads_the_same_or_names_the_key(tmp_path_factory, data):
    family = data.draw(st.sampled_from(sorted(HF)))
    whole = COMMON | HF[family] | {"model_type": family}
    file = tmp_path_factory.getbasetemp() / "mutated" / "config.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(whole))
    expected = pretrained.read_model_config(str(file))
    mutated = json.loads(json.dumps(whole))
    *parents, key = place = data.draw(st.sampled_from(sorted(places(whole))))
    values = mutated
    for parent in parents:
        values = values[parent]
    values[key] = data.draw(WRONG)
    file.write_text(json.dumps(mutated))
    found, message = outcome(pretrained.read_model_config, str(file))
    if found is None:
        # A key within an object that has become another kind of value is its own.
        names = {*place, "factor", "rope_type"} if "rope" in place[0] else {*place}
        assert any(name in message for name in names), message
        assert str(file) in message
        assert "\n" not in message
    else:
        assert found == expected


@pytest.mark.parametrize(
    "content",
    ["[]", "3", "null", '{"a":' * 10**5, "{", '"\\ud800"', "\x00", "9" * 5000],
)
@pytest.mark.parametrize("name", ["config.json", INDEX, "adapter_config.json"])
def test_a_header_of_another_shape_is_named(sharded, name, content):
    folder, _ = sharded
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=name):
        load(folder)
    (folder / name).write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match=name):
        load(folder)


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "▁a"]
KINDS = [2, 3, 3, *[6] * 256, 1, 1, 1]
GGUF = {
    "general.type": "model",
    "split.count": 1,
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 32,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e4,
    "llama.rope.dimension_count": 8,
    "llama.vocab_size": len(PIECES),
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": PIECES,
    "tokenizer.ggml.token_type": KINDS,
    "tokenizer.ggml.scores": [-float(i) for i in range(len(PIECES))],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.add_space_prefix": True,
}


def write_gguf(file, values):
    writer = gguf.GGUFWriter(file, "llama")
    types = {bool: "BOOL", int: "INT64", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    for key, value in values.items():
        if value is not None:
            kind = gguf.GGUFValueType[types[type(value)]]
            writer.add_key_value(key, value, kind)
    writer.add_tensor("token_embd.weight", np.zeros((len(PIECES), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file)


def read_gguf(file):
    return pretrained.read_model_config(file), tokenizer.load(file).fingerprint


@given(st.data())
def test_gguf_loads_the_same_or_names_the_key(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "mutated.gguf"
    key = data.draw(st.sampled_from(sorted(GGUF)))
    value = data.draw(
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(-(2**63), -1) | st.integers(2**40, 2**63 - 1),
            st.floats(max_value=-0.5, width=32) | st.just(float("nan")),
            st.text(max_size=8),
            st.lists(st.integers(-5, 300), min_size=1, max_size=3),
            st.lists(st.text(max_size=3), min_size=1, max_size=3),
        )
    )
    expected = read_gguf(write_gguf(file, GGUF))
    # Under a name of its own, because the last file stays open.
    file.unlink()
    file = file.with_stem(f"mutated-{time.monotonic_ns()}")
    found, message = outcome(read_gguf, write_gguf(file, GGUF | {key: value}))
    if found is None:
        # Lists of another length are reported together.
        columns = ("tokens", "scores", "token_type")
        assert key in message or key.split(".")[-1] in columns, message
        assert str(file) in message
    else:
        # What is absent, or another flag, is another model.
        assert found == expected or value is None or isinstance(value, bool)
    file.unlink()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"general.type": "imatrix"}, "general.type is 'imatrix'.*quantize"),
        ({"general.type": "adapter"}, "general.type is 'adapter'.*merge"),
        ({"general.type": "mmproj"}, "general.type is 'mmproj'.*text model"),
        ({"split.count": 3}, "one of 3 parts.*llama-gguf-split --merge"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn'; supported"),
        ({"llama.vocab_size": 999}, "vocab_size is 999; must be the embedding's 262"),
        ({"llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scale_linear": 4.0}, 4.0),
        ({"llama.rope.scale_linear": 4.0, "llama.rope.scaling.type": "linear"}, 4.0),
        ({"llama.rope.scale_linear": 1.0}, None),
        (
            {"llama.rope.scale_linear": 4.0, "llama.rope.scaling.factor": 2.0},
            "scales RoPE in several ways",
        ),
    ],
)
def test_gguf_that_is_no_whole_model_or_scales_rope(changes, expected, tmp_path):
    file = write_gguf(tmp_path / "a.gguf", GGUF | changes)
    if isinstance(expected, str):
        with pytest.raises(InputError, match=rf"a\.gguf: {'.*' + expected}"):
            read_gguf(file)
    else:
        scaling = None if expected is None else transformer.LinearRopeScaling(expected)
        assert read_gguf(file)[0].rope_scaling == scaling


@pytest.mark.parametrize("kind", ["sharded", "gguf"])
def test_identity_is_of_the_weights_alone(kind, sharded, tmp_path):
    if kind == "gguf":
        place = pathlib.Path(write_gguf(tmp_path / "a.gguf", GGUF))
        file, size = place, place.stat().st_size
        first = size - 262 * 32 * 4
    else:
        place, weight_map = sharded
        file = place / weight_map["model.norm.weight"]
        first, size = 8, file.stat().st_size
    before = pretrained.identity(str(place))
    moved = place.rename(tmp_path / f"elsewhere{place.suffix}")
    file = moved if file == place else moved / file.name
    assert pretrained.identity(str(moved)) == before
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    for place in (size - 1, *rng.integers(first, size, 20)):
        changed = bytearray(content)
        changed[place] ^= 1
        # Of a reader that maps the file, the old one stays whole.
        other = file.with_name("other")
        other.write_bytes(bytes(changed))
        other.replace(file)
        found, message = outcome(pretrained.identity, str(moved))
        assert found != before, place
        assert found or file.name in message


def test_of_small_weights_every_byte_counts(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    tensor = np.zeros((2**19, 2), np.float32)
    identities = set()
    for row in (None, 2**18, 2**17 + 5):
        if row is not None:
            tensor[row] += 1
        save_file({"model.embed_tokens.weight": tensor}, file)
        identities.add(pretrained.identity(str(tmp_path)))
        if row is not None:
            tensor[row] -= 1
    assert len(identities) == 3
    monkeypatch.setattr(pretrained, "_MOST_BYTES_WHOLE", tensor.nbytes)
    assert pretrained.identity(str(tmp_path)) not in identities


@given(st.integers(0, 2**40), st.integers(1, 2**36))
def test_samples_are_spread_over_a_tensor(begin, size):
    samples = list(pretrained._samples(begin, begin + size))
    assert samples[0][0] == begin
    assert samples[-1][1] == begin + size
    read = sum(end - start for start, end in samples)
    assert read <= 2**17 + size * 2**16 // 2**24
    for (_, end), (start, _) in itertools.pairwise(samples):
        assert 0 <= start - end <= 2**24


def test_a_phase_knows_what_it_started_from(tiny_model, tmp_path):
    def run():
        started = phase.start(config, str(tmp_path / "run"), "export")
        started.claim()
        return started.finish({"folder": "out", "dtype": "float32"})

    config = config_lib.default()
    config.job = "export"
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config.model.path = str(folder)
    config.metrics.progress = False
    expected = run()
    assert phase.finished(config, str(tmp_path / "run")) == expected
    config.model.path = str(folder.rename(tmp_path / "moved"))
    assert phase.finished(config, str(tmp_path / "run")) == expected
    identity = pretrained.identity(config.model.path)
    file = tmp_path / "moved" / "model.safetensors"
    edit(file, lambda tensors: tensors["model.norm.weight"].__imul__(2))
    message = outcome(phase.finished, config, str(tmp_path / "run"))[1]
    assert identity in message
    assert pretrained.identity(config.model.path) in message
    shutil.rmtree(tmp_path / "moved")
    assert phase.finished(config, str(tmp_path / "run")) == expected


@pytest.mark.parametrize(
    ("changes", "is_same"),
    [
        ({"weights": "/elsewhere"}, True),
        ({"identity": "b"}, False),
        ({"architecture": "b"}, False),
        ({"random": 0, "weights": None, "identity": None}, False),
        # What an older version did not note.
        ({"identity": None, "architecture": None}, True),
    ],
)
def test_the_same_start(changes, is_same):
    start = {"weights": "/here", "identity": "a", "architecture": "a"}
    other = {k: v for k, v in (start | changes).items() if v is not None}
    assert checkpoint.is_same_start(other, start) == is_same


def test_a_gguf_that_is_replaced_is_read_again(tmp_path):
    file = write_gguf(tmp_path / "a.gguf", GGUF)
    assert pretrained.read_model_config(file).rope_theta == 1e4
    other = write_gguf(tmp_path / "b.gguf", GGUF | {"llama.rope.freq_base": 5e5})
    pathlib.Path(other).replace(file)
    assert pretrained.read_model_config(file).rope_theta == 5e5
