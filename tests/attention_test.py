"""Attention: all forms against jax.nn's, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixcpt_jax.core import mesh_shape
from mixcpt_jax.models import attention
from mixcpt_jax.runtime import sharding


def operands(length, heads=(6, 2, 2), head_size=16, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value = (
        jax.random.normal(k, (2, length, n, head_size)).astype(dtype)
        for k, n in zip(keys, heads)
    )
    segments = jnp.sort(jax.random.randint(keys[3], (2, length), 1, 4), axis=1)
    return query, key, value, segments


def library(
    query, key, value, segments, sliding_window=None, query_scale=None, soft_cap=None
):
    positions = jnp.arange(segments.shape[1])
    distance = positions[:, None] - positions[None]
    mask = (distance >= 0) & (distance < (sliding_window or segments.shape[1]))
    mask = mask[None] & (segments[:, :, None] == segments[:, None, :])
    if soft_cap is not None:
        return capped(query, key, value, mask[:, None], query_scale, soft_cap)
    return jax.nn.dot_product_attention(
        *(x.astype(jnp.float32) for x in (query, key, value)), mask=mask[:, None]
    )


def capped(query, key, value, mask, query_scale, soft_cap):
    """Gemma 2's, literally; the library has no soft-cap on a CPU."""
    repeats = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
    scores = jnp.einsum("blhk,bmhk->bhlm", query, key) / query_scale**0.5
    scores = jnp.where(mask, soft_cap * jnp.tanh(scores / soft_cap), -jnp.inf)
    return jnp.einsum("bhlm,bmhk->blhk", jax.nn.softmax(scores), value)


def splash(
    query, key, value, segments, sliding_window=None, query_scale=None, soft_cap=None
):
    query = query * jnp.asarray((query_scale or query.shape[-1]) ** -0.5, query.dtype)
    return attention.splash(
        query, key, value, segments, sliding_window, soft_cap, interpret=True
    )


@pytest.mark.parametrize("sliding_window", [None, 7])
@pytest.mark.parametrize("length", [1, 5, 128, 129, 300])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_blocks_equal_the_library(length, dtype, sliding_window):
    query, key, value, segments = operands(length, dtype=dtype)
    actual = attention.attend(query, key, value, segments, sliding_window)
    assert actual.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 2**-6
    np.testing.assert_allclose(
        actual.astype(jnp.float32),
        library(query, key, value, segments, sliding_window),
        atol=tolerance,
    )


@pytest.mark.parametrize("form", [attention.attend, splash])
@pytest.mark.parametrize(
    "options",
    [
        (40, 50.0, 2.0),
        *(pytest.param(case, marks=pytest.mark.slow) for case in [(None,), (40,)]),
    ],
    ids=str,
)
def test_values_and_gradients_equal_the_librarys(form, options):
    """The TPU kernel is interpreted; 256 tokens are two of its smallest blocks."""
    query, key, value, segments = operands(256, (4, 2, 2), 128)

    def squares(attend, *qkv):
        out = attend(*qkv, segments, *options)
        return jnp.sum(out**2), out

    (_, actual), actual_gradients = jax.value_and_grad(
        functools.partial(squares, form), (0, 1, 2), has_aux=True
    )(query, key, value)
    (_, expected), expected_gradients = jax.value_and_grad(
        functools.partial(squares, library), (0, 1, 2), has_aux=True
    )(query, key, value)
    for a, e in zip(
        (actual, *actual_gradients), (expected, *expected_gradients), strict=True
    ):
        np.testing.assert_allclose(a, e, atol=1e-5 * np.abs(e).max())


def test_splash_is_the_same_on_any_mesh():
    arrays = operands(128, (4, 2, 2), 128)
    expected = splash(*arrays)
    for shape in ((2, 1, 1), (1, 2, 2)):
        mesh = sharding.make_mesh(
            dict(zip(mesh_shape.MESH_AXES, shape)), jax.devices()[: np.prod(shape)]
        )
        with jax.set_mesh(mesh):
            np.testing.assert_allclose(jax.jit(splash)(*arrays), expected, atol=1e-6)


@pytest.mark.parametrize("sliding_window", [None, 7])
@pytest.mark.parametrize("new_tokens", [1, 5, 129])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_cache_stands_for_the_row(new_tokens, dtype, sliding_window):
    """The last queries of rows of different lengths, with leftovers behind them."""
    query, key, value, segments = operands(200, dtype=dtype)
    expected = library(query, key, value, jnp.ones_like(segments), sliding_window)
    last = jnp.array([150, 199])
    positions = last[:, None] - jnp.arange(new_tokens)[None, ::-1]
    is_row = jnp.arange(200)[None] <= last[:, None]
    cache = (
        jnp.where(is_row[..., None, None], x, 1e3).reshape(2, 200, -1)
        for x in (key, value)
    )
    at = positions[..., None, None]
    actual = attention.attend_to_cache(
        jnp.take_along_axis(query, at, axis=1), *cache, positions, sliding_window
    )
    assert actual.dtype == dtype
    np.testing.assert_allclose(
        actual.astype(jnp.float32),
        jnp.take_along_axis(expected, at, axis=1),
        atol=1e-5 if dtype == jnp.float32 else 2**-6,
    )
