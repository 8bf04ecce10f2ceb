"""Attention: all forms against jax.nn's, forward and backward."""

import functools
import re
import types

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


def cudnn(query, key, value, segments, sliding_window=None, query_scale=None):
    """The arguments of the GPU kernel, computed by the library's reference."""
    query = query * jnp.asarray((query_scale or query.shape[-1]) ** -0.5, query.dtype)
    return attention.cudnn(
        query, key, value, segments, sliding_window, implementation="xla"
    )


@pytest.fixture
def gpu(monkeypatch):
    """Traces and lowers as on an H100; the library's own checks ask a device."""
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    monkeypatch.setattr(sharding, "compute_capability", lambda: 9.0)
    checks = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(checks, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(checks, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(
        checks, "is_cuda_compute_capability_equal", lambda capability: False
    )


KERNELS = ("__cudnn$fmhaScaleBiasSoftmax(", "__cudnn$fmhaScaleBiasSoftmaxBackward(")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("sliding_window", "shards"), [(40, 1), (None, 2)])
def test_on_a_gpu_the_kernel_runs_both_passes_without_scores_in_memory(
    sliding_window, shards
):
    def loss(query, key, value, segments):
        out = attention.attend(query, key, value, segments, sliding_window)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    arrays = jax.eval_shape(lambda: operands(256, (4, 2, 2), 64, jnp.bfloat16))
    sizes = dict(zip(mesh_shape.MESH_AXES, (shards, 1, shards)))
    with jax.set_mesh(sharding.make_mesh(sizes, jax.devices()[: shards**2])):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for kernel in KERNELS:
        assert text.count(kernel) == 1
    # Pairs of tokens exist only in the mask of documents, which all heads share.
    heads = re.findall(r"tensor<\d+x(\d+)x256x256x(?:bf16|f32)>", text)
    assert set(heads) == {"1"}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("length", "head_size", "dtype", "options", "form"),
    [
        (256, 64, jnp.bfloat16, (40, 50.0), "cudnn"),
        (256, 64, jnp.float16, (), "cudnn"),
        (256, 64, jnp.float32, (), "in_blocks"),
        (255, 64, jnp.bfloat16, (), "in_blocks"),
        (256, 60, jnp.bfloat16, (), "in_blocks"),
        (256, 64, jnp.bfloat16, (None, 50.0, 2.0), "in_blocks"),
    ],
    ids=str,
)
def test_what_the_gpu_kernel_does_not_support_runs_in_blocks(
    monkeypatch, length, head_size, dtype, options, form
):
    called = []
    for name in ("cudnn", "in_blocks"):

        def record(*operands, name=name):
            called.append(name)
            return operands[0]

        monkeypatch.setattr(attention, name, record)
    arrays = jax.eval_shape(lambda: operands(length, (4, 2, 2), head_size, dtype))
    jax.eval_shape(lambda *arrays: attention.attend(*arrays, *options), *arrays)
    assert called == [form]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("capability", "largest"), [(0.0, 0), (7.5, 0), (8.0, 128), (8.9, 128), (10.0, 256)]
)
def test_older_gpus_have_kernels_for_smaller_heads(monkeypatch, capability, largest):
    monkeypatch.setattr(sharding, "compute_capability", lambda: capability)
    for head_size in (64, 128, 256):
        query = jax.ShapeDtypeStruct((1, 256, 4, head_size), jnp.bfloat16)
        assert attention._fits_cudnn(query) == (head_size <= largest)


@pytest.mark.parametrize(
    ("found", "capability"),
    [("9.0", 9.0), ("12.1", 12.1), ("gfx942", 0.0), (None, 0.0)],
)
def test_the_compute_capability_is_a_number_on_nvidia_gpus(
    monkeypatch, found, capability
):
    device = types.SimpleNamespace(compute_capability=found)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert sharding.compute_capability() == capability


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


@pytest.mark.parametrize("options", [(None,), (5, 50.0)], ids=str)
def test_the_gpu_kernel_gets_the_documents_the_window_and_the_scale(options):
    """In values and gradients; the portable form is the reference."""
    query, key, value, segments = operands(24, (4, 2, 2))

    def squares(attend, *qkv):
        out = attend(*qkv, segments, *options)
        return jnp.sum(out**2), out

    found, expected = (
        jax.jit(
            jax.value_and_grad(
                functools.partial(squares, form), (0, 1, 2), has_aux=True
            )
        )(query, key, value)
        for form in (cudnn, attention.attend)
    )
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, atol=1e-5 * np.abs(e).max()),
        found,
        expected,
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
