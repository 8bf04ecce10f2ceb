"""Properties of the network; parity with other implementations is in weights_test."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixcpt_jax import model

CONFIG = model.ModelConfig(
    family="llama",
    vocab_size=50,
    hidden_size=24,
    mlp_size=40,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_size=4,
    max_positions=64,
    rope_theta=1e4,
)


def run(tokens, config=CONFIG, positions=None, segment_ids=None, **options):
    params = model.init_params(config, jax.random.key(0))
    # Attention differs little between random tokens unless the weights are large.
    params["layers"] |= {k: 20 * params["layers"][k] for k in ("query", "key")}
    tokens = jnp.atleast_2d(tokens)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if segment_ids is None:
        segment_ids = jnp.ones(tokens.shape, jnp.int32)
    forward = jax.jit(model.make_forward(config, **options))
    return np.asarray(forward(params, tokens, positions, segment_ids), np.float32)


def draw(length, seed=0):
    return jax.random.randint(jax.random.key(seed), (length,), 0, 50)


def test_later_tokens_do_not_change_earlier_ones():
    tokens = draw(20)
    changed = tokens.at[13].add(1)
    before, after = run(tokens)[0], run(changed)[0]
    np.testing.assert_array_equal(before[:13], after[:13])
    assert np.all(np.abs(before[13:] - after[13:]).max(-1) > 1e-4)


def test_documents_of_a_row_do_not_see_each_other():
    tokens, segments = draw(20), jnp.array([[1] * 8 + [2] * 7 + [0] * 5])
    changed = tokens.at[2].add(1)
    before = run(tokens, segment_ids=segments)[0]
    after = run(changed, segment_ids=segments)[0]
    np.testing.assert_array_equal(before[8:], after[8:])
    assert np.abs(before[7] - after[7]).max() > 1e-4


def test_positions_count_only_relative_to_each_other():
    tokens = draw(12)
    shifted = run(tokens, positions=jnp.arange(12)[None] + 30)
    np.testing.assert_allclose(run(tokens), shifted, atol=2e-4)


def test_the_window_bounds_how_far_back_a_layer_reaches():
    config = dataclasses.replace(CONFIG, sliding_window=3, num_layers=1)
    tokens = draw(12)
    before, after = run(tokens, config)[0], run(tokens.at[4].add(1), config)[0]
    moved = np.abs(before - after).max(-1) > 1e-5
    np.testing.assert_array_equal(np.flatnonzero(moved), [4, 5, 6])


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones():
    scaling = model.Llama3RopeScaling(8.0, 1.0, 4.0, 512)
    config = dataclasses.replace(CONFIG, head_size=64, rope_theta=5e5)
    plain = model.rope_frequencies(config)
    scaled = model.rope_frequencies(dataclasses.replace(config, rope_scaling=scaling))
    waves = 2 * np.pi / np.asarray(plain)
    ratio = np.asarray(plain / scaled)
    np.testing.assert_allclose(ratio[waves < 512 / 4], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[waves > 512], 8.0, rtol=1e-6)
    between = ratio[(waves > 512 / 4) & (waves < 512)]
    assert np.all((between > 1) & (between < 8))


def test_compute_dtype_is_apart_from_parameter_dtype():
    exact, rounded = run(draw(16)), run(draw(16), dtype=jnp.bfloat16)
    np.testing.assert_allclose(rounded, exact, atol=0.1)
    assert np.any(rounded != exact)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_shapes_axes_and_parameters_agree(tied, bias):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied, qkv_bias=bias)
    params = model.init_params(config, jax.random.key(0), jnp.bfloat16)
    abstract = model.abstract_params(config, jnp.bfloat16)
    axes = model.param_axes(config)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract
    )
    ranks = jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple))
    assert ranks == jax.tree.map(lambda x: x.ndim, params)
    assert model.logits(params, jnp.ones((3, 24))).shape == (3, 50)
