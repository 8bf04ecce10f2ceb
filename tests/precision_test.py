"""What bfloat16 products leave exact: sums over tokens, constants, and where a run starts.

The program that is lowered is read, so what a compiler may do on top is not in here.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixcpt_jax import config as config_lib
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.models import attention, pretrained, transformer
from mixcpt_jax.models import lora as lora_lib
from mixcpt_jax.objectives import dense, over_pairs, over_tokens, streamed, teachers
from mixcpt_jax.training import optimizer, steps

# No head size, query scale, rank or cap below is a power of two, or has one
# for a root, so each scale shows if it is rounded. The embedding's alone is meant to be.
LLAMA = transformer.ModelConfig(
    family="llama",
    vocab_size=64,
    hidden_size=64,
    mlp_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=12,
    max_positions=64,
    rope_theta=1e4,
)
GEMMA2 = dataclasses.replace(
    LLAMA,
    family="gemma2",
    sliding_window=5,
    global_layers=(1,),
    post_norms=True,
    activation="gelu_tanh",
    scale_embeddings=True,
    query_scale=24,
    attention_soft_cap=3.0,
    final_soft_cap=5.0,
    tie_embeddings=True,
)
FAMILIES = {
    "llama": LLAMA,
    "mistral": dataclasses.replace(LLAMA, family="mistral", sliding_window=5),
    "qwen2": dataclasses.replace(LLAMA, family="qwen2", qkv_bias=True),
    "qwen3": dataclasses.replace(LLAMA, family="qwen3", qk_norm=True),
    "gemma2": GEMMA2,
    "gemma3": dataclasses.replace(
        GEMMA2,
        family="gemma3_text",
        local_rope_theta=100.0,
        qk_norm=True,
        attention_soft_cap=None,
        final_soft_cap=None,
    ),
    # What other families add, at once.
    "others": dataclasses.replace(
        LLAMA,
        family="smollm3",
        rope_scaling=transformer.YarnRopeScaling(3.0, 16, 1.3, 4.0, 0.5),
        nope_layers=(1,),
        rope_fraction=0.5,
        query_growth=0.3,
        qk_norm=True,
        qk_norm_over_heads=True,
        pre_norms=False,
        post_norms=True,
        embedding_multiplier=11.0,
        residual_multiplier=0.22,
        logits_scaling=6.0,
    ),
}
LORA = lora_lib.Lora(rank=3, alpha=7.0, targets=lora_lib.LORA_TARGETS)
ROWS, LENGTH, SEGMENTS = 2, 16, 4
BATCH = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "positions": jnp.int32,
    "segment_ids": jnp.int32,
    "source_ids": jnp.int32,
    "loss_mask": jnp.float32,
} | {f"{name}_weights": jnp.float32 for name in config_lib.OBJECTIVES}


def make_objective(config, kind, dtype=jnp.bfloat16, lora=None):
    """The objective whose network, and whose frozen model, compute in a dtype."""
    student = transformer.make_forward(config, dtype, "full", lora)
    frozen = transformer.make_forward(config, dtype)
    head = {"soft_cap": config.final_soft_cap}
    if kind == "tokens":
        return over_tokens.token_objective(
            student,
            teachers.running_teacher(frozen),
            ("all",),
            functools.partial(streamed.head_loss, **head),
        )
    return over_pairs.preference_objective(
        student,
        frozen,
        ("all",),
        SEGMENTS,
        functools.partial(dense.preference_loss, beta=0.3),
        log_probabilities=functools.partial(streamed.log_probabilities, **head),
    )


def lowered_step(config, kind, lora, parts):
    """The whole training step, as text."""
    objective = make_objective(config, kind, lora=lora)
    transforms, schedule = optimizer.make_optimizer(config_lib.default().optimizer, 10)
    params = transformer.abstract_params(config)
    if lora:
        params = lora_lib.abstract_adapters(config, lora)
    state = steps.TrainState(
        jax.ShapeDtypeStruct((), jnp.int32),
        params,
        jax.eval_shape(transforms.init, params),
    )
    step = steps.make_train_step(objective, transforms, schedule, parts, bool(lora))
    frozen = transformer.abstract_params(config, jnp.bfloat16)
    batch = {
        name: jax.ShapeDtypeStruct((ROWS, LENGTH), dtype)
        for name, dtype in BATCH.items()
    }
    return jax.jit(step).lower(state, frozen, batch).as_text()


def sums(text, dtype):
    """Reductions that add, and scatters, that give a dtype."""
    reductions = re.findall(r"stablehlo\.reduce\(.*applies stablehlo\.add .*", text)
    scatters = re.findall(r'"stablehlo\.scatter"(?:.|\n)*?\}\) : (.*)', text)
    is_of = re.compile(rf"-> tensor<(\d+x)*{dtype}>")
    return [found for found in reductions + scatters if is_of.search(found)]


@pytest.mark.parametrize(
    ("kind", "parts", "lora"),
    [("tokens", 1, None), ("tokens", 2, LORA), ("preference", 1, None)],
    ids=["tokens", "lora", "preference"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_sums_and_scales_in_float32(family, kind, parts, lora):
    """Sums over tokens are gradients: of embeddings, norm scales and biases."""
    text = lowered_step(FAMILIES[family], kind, lora, parts)
    assert sums(text, "f32")
    assert not sums(text, "bf16")
    constants = re.findall(r"constant dense<([^>]+)> : tensor<(?:\d+x)*bf16>", text)
    assert set(map(float, constants)) <= {0.0, 1.0, 8.0}  # 8: sqrt(hidden_size)


def test_queries_are_scaled_by_the_factor_itself():
    query = jax.random.normal(jax.random.key(0), (1, 2, 3, 128), jnp.bfloat16)
    exact = np.asarray(query, np.float64) / np.sqrt(12)
    scaled = np.asarray(attention._scaled(query, 12), np.float64)
    np.testing.assert_allclose(scaled, exact, rtol=2**-8)
    assert abs(np.mean(scaled / exact) - 1) < 2**-12


def test_a_norm_scale_near_one_keeps_its_digits_in_a_bfloat16_model(tmp_path):
    """Gemma's is 1 + w: read in bfloat16, used, and written again."""
    w = np.float32([0.001, -0.0017, 0.013, 0.0002])
    config = dataclasses.replace(GEMMA2, hidden_size=4)
    params = transformer.init_params(config, jax.random.key(0))
    params["final_norm"] = jnp.asarray(1 + w)
    pretrained.save_pretrained(str(tmp_path / "start"), params, config, dtype="float32")
    loaded = pretrained.load_params(
        str(tmp_path / "start"), transformer.abstract_params(config, jnp.bfloat16)
    )
    assert loaded["embedding"].dtype == jnp.bfloat16
    np.testing.assert_allclose(loaded["final_norm"] - 1, w, atol=2**-23)
    again = transformer.cast(loaded, jnp.bfloat16)
    np.testing.assert_array_equal(again["final_norm"], loaded["final_norm"])
    x = jax.random.normal(jax.random.key(1), (64, 4), jnp.bfloat16)
    normed = transformer.rms_norm(x, loaded["final_norm"], 1e-6)
    exact = transformer.rms_norm(x.astype(jnp.float32), jnp.asarray(1 + w), 1e-6)
    np.testing.assert_array_equal(normed, exact.astype(jnp.bfloat16))


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    shape = (ROWS, LENGTH)
    batch = {name: np.zeros(shape, BATCH[name]) for name in BATCH}
    batch["tokens"], batch["targets"] = rng.integers(0, 64, (2, *shape), np.int32)
    batch["positions"][:] = np.arange(LENGTH)
    batch["segment_ids"][:] = 1 + np.arange(LENGTH) * SEGMENTS // LENGTH
    batch["loss_mask"][:] = batch["kd_weights"][:] = 1
    return batch


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_kl_and_margins_begin_at_zero(compute_dtype):
    """From a start with the digits of float32, such as the end of an earlier phase."""
    config = FAMILIES["gemma3"]
    settings = config_lib.default().model
    settings.compute_dtype = compute_dtype
    rng = np.random.default_rng(0)
    student = jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32),
        transformer.init_params(config, jax.random.key(0)),
    )
    frozen = transformer.cast(student, config_lib.frozen_dtype(settings))

    def means(kind):
        objective = make_objective(config, kind, compute_dtype)
        _, metrics = jax.jit(objective.loss_sum)(student, frozen, make_batch(), 1.0)
        return {name: float(total / count) for name, (total, count) in metrics.items()}

    # They are exactly 0 where the compiler rounds both networks alike.
    noise = 4 * float(jnp.finfo(compute_dtype).eps)
    assert abs(means("tokens")["kd"]) <= noise
    pairs = means("preference")
    for name in ("margin", "chosen_reward", "rejected_reward"):
        assert abs(pairs[name]) <= noise * abs(pairs["chosen_logp"])


@pytest.mark.parametrize(
    ("param_dtype", "compute_dtype", "teacher_dtype", "is_refused"),
    [
        ("float32", "bfloat16", "", False),
        ("float32", "bfloat16", "bfloat16", False),
        ("float32", "bfloat16", "float32", False),
        ("float32", "float32", "float32", False),
        ("float32", "float32", "bfloat16", True),
        ("bfloat16", "float32", "float32", True),
    ],
)
def test_a_teacher_that_is_rounded_otherwise_is_refused(
    tmp_path, param_dtype, compute_dtype, teacher_dtype, is_refused
):
    (tmp_path / "text.jsonl").write_text('{"text": "words"}\n')
    config = config_lib.default()
    config.model.path = str(tmp_path)
    config.sources.domain = config_lib.source(path=str(tmp_path / "text.jsonl"))
    config.model.param_dtype = param_dtype
    config.model.compute_dtype = compute_dtype
    config.model.teacher_dtype = teacher_dtype
    if is_refused:
        with pytest.raises(InputError, match=r"^model.teacher_dtype=.*leave it empty"):
            config_lib.validate(config)
        config.lora.rank = 4
    config_lib.validate(config)
