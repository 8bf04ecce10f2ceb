"""Every family computes what transformers computes, before and after an export."""

import dataclasses
import json
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from benchmarks import small_models
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.evaluation import generation
from mixcpt_jax.models import families, huggingface, pretrained, transformer

FAST = ("Gemma 2", "Phi-4-mini")
each_model = pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in small_models.MODELS
    ],
)
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 48))
# Float32 noise of a few layers, relative to the largest logit.
NOISE = 1e-5


@pytest.fixture
def theirs(name, tmp_path):
    """A small model of transformers, which is saved in `tmp_path / "theirs"`."""
    pytest.importorskip("transformers")
    made = small_models.make(small_models.MODELS[name])
    made.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    return made


def load(folder):
    config = pretrained.read_model_config(str(folder))
    abstract = transformer.abstract_params(config)
    return config, pretrained.load_params(str(folder), abstract)


def our_logits(config, params):
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    forward = jax.jit(transformer.make_forward(config))
    hidden = forward(params, TOKENS, positions, jnp.ones_like(TOKENS))
    return np.asarray(transformer.logits(params, hidden, config.final_soft_cap))


def their_logits(model, tokens=TOKENS):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def test_a_small_model_for_every_family():
    kinds = {
        model.settings.get("text_config", {}).get("model_type", model.model_type)
        for model in small_models.MODELS.values()
    }
    assert kinds - families.WRAPPERS.keys() == families.FAMILIES.keys()


# Settings that an export writes otherwise, and what transformers sees then.
OTHERWISE = {"architectures", "dtype", "_name_or_path", "transformers_version"}
# RoPE's kind has two names; what follows from others is written out.
OTHERWISE |= {"rope_parameters", "max_window_layers"}


@each_model
def test_logits_and_greedy_tokens_like_transformers(name, theirs, tmp_path):
    import transformers

    config, params = load(tmp_path / "theirs")
    expected = their_logits(theirs)
    noise = NOISE * np.abs(expected).max()
    np.testing.assert_allclose(our_logits(config, params), expected, atol=noise, rtol=0)

    folder = str(tmp_path / "ours")
    pretrained.save_pretrained(
        folder, params, config, dtype="float32", max_shard_bytes=2**16
    )
    assert pretrained.read_model_config(folder) == config
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager"
    )
    np.testing.assert_array_equal(their_logits(reloaded), expected)
    text_config = theirs.config.get_text_config().to_dict()
    after = reloaded.config.to_dict()
    changed = {k for k, v in text_config.items() if after.get(k, v) != v}
    assert changed <= OTHERWISE

    sampler = generation.Sampler(config, types.SimpleNamespace(vocab_size=96))
    prompt = TOKENS[0, :17].tolist()
    (new,) = sampler.generate(params, [prompt], 64, set(), generation.SamplingParams())
    logits = their_logits(reloaded, np.array([prompt + new]))[0, len(prompt) - 1 : -1]
    assert len(new) == 64
    # The largest, apart from ties.
    gaps = logits.max(-1) - logits[np.arange(64), new]
    assert gaps.max() <= 2 * noise


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The config of every small model."""
    transformers = pytest.importorskip("transformers")
    found = {}
    for name, model in small_models.MODELS.items():
        folder = tmp_path_factory.mktemp("config")
        small_models.config_of(transformers, model).save_pretrained(folder)
        found[name] = pretrained.read_model_config(str(folder))
    return found


# They change the parameters, or mean nothing at their default.
OF_SHAPES = {
    "num_experts",
    "experts_per_token",
    "qkv_bias",
    "qk_norm",
    "qk_norm_over_heads",
    "pre_norms",
    "post_norms",
    "tie_embeddings",
}
# It changes the logits by less than the bound below.
OF_SMALL_EFFECT = {"norm_epsilon"}
SETTINGS = [
    field.name
    for field in dataclasses.fields(transformer.ModelConfig)
    if field.default is not dataclasses.MISSING
    and field.name not in OF_SHAPES | OF_SMALL_EFFECT
]


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_parities_would_notice(setting, configs):
    """Some small model has the setting, and its logits depend on it."""
    default = transformer.ModelConfig.__dataclass_fields__[setting].default
    config = next(c for c in configs.values() if getattr(c, setting) != default)
    if setting == "rope_fraction":
        # Phi-4-mini's has a divisor per rotated pair.
        config = dataclasses.replace(config, rope_scaling=None)
    rng = np.random.default_rng(0)
    params = jax.tree.map_with_path(
        lambda path, leaf: jnp.asarray(
            0.2 * rng.standard_normal(leaf.shape) + ("norm" in path[-1].key), leaf.dtype
        ),
        transformer.abstract_params(config),
    )
    other = dataclasses.replace(config, **{setting: default})
    logits = our_logits(config, params)
    difference = np.abs(logits - our_logits(other, params)).max()
    assert difference > 100 * NOISE * np.abs(logits).max()


def read(tmp_path, name, **changes):
    """The config of a small model with changed keys, without transformers."""
    model = small_models.MODELS[name]
    raw = {**small_models.SHARED, **model.settings, "model_type": model.model_type}
    raw = {k: v for k, v in (raw | changes).items() if v != "absent"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return pretrained.read_model_config(str(tmp_path))


YARN = transformer.YarnRopeScaling(8.0, 32, 0.1 * np.log(8.0) + 1)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("SmolLM3", {"num_hidden_layers": 8}, {"nope_layers": (3, 7)}),
        ("SmolLM3", {"no_rope_layer_interval": 2}, {"nope_layers": (1, 3)}),
        ("OLMo 3", {"num_hidden_layers": 8}, {"global_layers": (3, 7)}),
        ("OLMo 2", {"rms_norm_eps": "absent"}, {"norm_epsilon": 1e-5}),
        ("Granite 4, no RoPE", {}, {"nope_layers": (0, 1, 2)}),
        ("Granite 3", {"attention_multiplier": 2**-7}, {"query_scale": 2**14}),
        # The older spellings of RoPE's settings.
        (
            "Qwen3",
            {
                "rope_scaling": small_models.MODELS["Qwen3, YaRN"].settings[
                    "rope_parameters"
                ]
            },
            {"rope_scaling": YARN},
        ),
        (
            "Phi-3",
            {
                "rope_scaling": {
                    "type": "su",
                    "short_factor": [1] * 4,
                    "long_factor": [2] * 4,
                },
                "original_max_position_embeddings": 64,
                "partial_rotary_factor": 0.5,
            },
            {
                "rope_fraction": 0.5,
                "max_positions": 64,
                "rope_scaling": transformer.LongRopeScaling(
                    (1,) * 4, (2,) * 4, 64, 256, np.sqrt(1 + np.log(4) / np.log(64))
                ),
            },
        ),
        # As in transformers, which ties the weights of the whole model.
        (
            "Mistral 3, with images",
            {"tie_word_embeddings": False},
            {"tie_embeddings": False, "family": "ministral3"},
        ),
        # What the models of 4B to 27B leave out.
        (
            "Gemma 3, with images",
            {
                "text_config": {
                    "hidden_size": 2560,
                    "intermediate_size": 10240,
                    "num_hidden_layers": 34,
                    "sliding_window": 1024,
                }
            },
            {
                "vocab_size": 262208,
                "num_heads": 8,
                "num_kv_heads": 4,
                "head_size": 256,
                "max_positions": 131072,
                "rope_theta": 1e6,
                "local_rope_theta": 1e4,
                "global_layers": (5, 11, 17, 23, 29),
                "family": "gemma3_text",
            },
        ),
    ],
)
def test_what_a_config_may_leave_out_or_spell_otherwise(
    name, changes, expected, tmp_path
):
    config = read(tmp_path, name, **changes)
    found = {key: getattr(config, key) for key in expected}
    assert found == expected


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Granite 4", {"num_local_experts": 4}, "num_local_experts is 4; supported: 0"),
        ("Granite 4", {"num_local_experts": "absent"}, "num_local_experts is 8"),
        (
            "Granite 4",
            {"layer_types": ["mamba"] * 3},
            "a list of attention; not Mamba's",
        ),
        ("Llama 2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("Phi-3", {"partial_rotary_factor": 0.2}, "an even number of the 16 entries"),
        ("SmolLM3", {"no_rope_layers": [1, 0]}, "no_rope_layers is .*a list of 4"),
        ("SmolLM3", {"no_rope_layers": [1, 0, 2, 1]}, "must be a list of 0 and 1"),
        (
            "Ministral 3",
            {"rope_parameters": "absent"},
            "llama_4_scaling_beta is missing",
        ),
        (
            "Ministral 3",
            {"rope_parameters": {"llama_4_scaling_beta": 0.1, "rope_type": "default"}},
            "rope_type is 'default'; supported: yarn, llama3",
        ),
        (
            "Qwen3",
            {"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}},
            "rope_parameters is .*supported: the same in all layers",
        ),
        (
            "Llama 2",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": False}},
            "truncate is False; supported: True",
        ),
        (
            "Llama 2",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_fast": 0.5}},
            "beta_fast is 0.5; must be more than beta_slow",
        ),
        (
            "Llama 2",
            {
                "rope_scaling": {
                    "rope_type": "longrope",
                    "short_factor": [1] * 8,
                    "long_factor": [1] * 7,
                }
            },
            "long_factor is .* must be a list of 8, one per pair",
        ),
        (
            "Mistral 3, with images",
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config is .*supported: None",
        ),
        ("Mistral 3, with images", {"text_config": "absent"}, "text_config is missing"),
        (
            "Qwen3-MoE",
            {"mlp_only_layers": [0]},
            r"mlp_only_layers is \[0\]; supported: ",
        ),
        (
            "Qwen3-MoE",
            {"decoder_sparse_step": 2},
            "decoder_sparse_step is 2; supported",
        ),
        ("Gemma 3", {"model_type": "gemma4_text"}, "gemma4_text is not .* wider heads"),
        ("Llama 2", {"model_type": "gpt_oss"}, "gpt_oss is not supported.* MXFP4"),
    ],
)
def test_refused_configs(name, changes, message, tmp_path):
    with pytest.raises(InputError, match=rf"config\.json: .*{message}"):
        read(tmp_path, name, **changes)


def test_a_fused_tensor_of_another_size_is_refused(tmp_path):
    config = read(tmp_path, "Phi-3")
    abstract = transformer.abstract_params(config)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
    folder = str(tmp_path / "export")
    pretrained.save_pretrained(folder, params, config, dtype="float32")
    fewer = dataclasses.replace(config, num_kv_heads=1)
    with pytest.raises(InputError, match=r"qkv_proj.* shape \(128, 64\); .* 96 rows"):
        huggingface.open_tensors(epath.Path(folder), fewer)


def table_rows(page, header):
    """The cells of a Markdown table in `docs`, without its two header lines."""
    text = (pathlib.Path(__file__).parent.parent / "docs" / page).read_text()
    lines = text[text.index(header) :].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_reference_names_every_model_type():
    rows = table_rows("reference.md", "| models | `model_type` |")
    named = {name for row in rows for name in re.findall("`(.*?)`", row[1])}
    assert named == families.FAMILIES.keys() | families.WRAPPERS.keys()


@pytest.mark.slow
def test_the_parity_table_has_every_model():
    parity = pytest.importorskip("benchmarks.parity")
    rows = table_rows("reference.md", "| | logits | round trip |")
    of_packages = {"SmolLM2-135M-Instruct, GGUF", "Gemma-3-270M, GGUF"}
    assert {row[0] for row in rows} == parity.FAMILIES.keys() | of_packages
    measured = {parity.FAMILIES[name].model for name in parity.FAMILIES}
    kinds = {small_models.MODELS[name].model_type for name in measured}
    assert kinds == families.FAMILIES.keys()
    assert all(row[5] == "192/192" for row in rows)
