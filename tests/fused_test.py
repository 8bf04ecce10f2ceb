"""The streamed head against the dense losses: values, gradients, shardings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixcpt_jax import fused, losses, sharding

T, D, E, V = 48, 16, 24, 64


@functools.cache
def problem(dtype=jnp.float32, vocab=V):
    keys = jax.random.split(jax.random.key(0), 8)
    hidden, teacher_hidden = (
        jax.random.normal(k, (T, n)).astype(dtype) for k, n in zip(keys[:2], (D, E))
    )
    kernel, teacher_kernel = (
        jax.random.normal(k, (n, vocab)) for k, n in zip(keys[2:4], (D, E))
    )
    targets = jax.random.randint(keys[4], (T,), 0, vocab)
    targets = targets.at[::3].set(
        jnp.argmax(teacher_hidden.astype(jnp.float32) @ teacher_kernel, -1)[::3]
    )
    weights = fused.TokenWeights(*(jax.random.uniform(k, (T,)) for k in keys[5:8]))
    # A fifth of the tokens is masked.
    weights = jax.tree.map(lambda w: w.at[::5].set(0.0), weights)
    return hidden, kernel, teacher_hidden, teacher_kernel, targets, weights


def dense(hidden, kernel, teacher_hidden, teacher_kernel, targets, weights, cap=None):
    student, teacher = hidden @ kernel, teacher_hidden @ teacher_kernel
    if cap is not None:
        student, teacher = (cap * jnp.tanh(x / cap) for x in (student, teacher))
    return jnp.sum(
        weights.ntp * losses.cross_entropy(student, targets)
        + weights.lssd * losses.lssd(student, teacher, targets)
        + weights.kd * losses.distillation(student, teacher)
    )


def assert_same(actual, expected, rtol=2e-5):
    """Equal to float32 noise relative to the largest entry."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        e = np.asarray(e, np.float64)
        scale = max(np.abs(e).max(), 1e-6)
        np.testing.assert_allclose(np.asarray(a, np.float64), e, atol=rtol * scale)


def value_and_gradients(function, *operands, **options):
    def first(*args):
        out = function(*args, *operands[2:], **options)
        return out[0] if isinstance(out, tuple) else out

    return jax.jit(jax.value_and_grad(first, (0, 1)))(*operands[:2])


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 48, 1000])
def test_value_and_gradients_equal_the_dense_ones_for_any_chunk(chunk_size):
    actual = value_and_gradients(fused.head_loss, *problem(), chunk_size=chunk_size)
    assert_same(actual, value_and_gradients(dense, *problem()))


def test_value_without_gradient_is_the_same():
    value, _ = jax.jit(functools.partial(fused.head_loss, chunk_size=10))(*problem())
    assert_same(value, dense(*problem()))


def test_statistics_equal_the_dense_ones():
    hidden, kernel, teacher_hidden, teacher_kernel, targets, _ = problem()
    student, teacher = hidden @ kernel, teacher_hidden @ teacher_kernel
    _, statistics = fused.head_loss(*problem(), chunk_size=10)
    top, teacher_top = student.argmax(-1), teacher.argmax(-1)
    expected = fused.TokenStatistics(
        losses.cross_entropy(student, targets),
        losses.lssd(student, teacher, targets),
        losses.distillation(student, teacher),
        top == targets,
        top == teacher_top,
        teacher_top != targets,
    )
    assert_same(statistics, expected)


def test_masked_tokens_contribute_exactly_nothing():
    hidden, *rest = problem()
    poisoned = hidden.at[::5].mul(100.0)
    value = functools.partial(fused.head_loss, chunk_size=7)
    np.testing.assert_array_equal(value(poisoned, *rest)[0], value(hidden, *rest)[0])
    gradient = jax.grad(lambda h: value(h, *rest)[0])(hidden)
    np.testing.assert_array_equal(gradient[::5], 0.0)
    assert np.all(np.abs(gradient[1::5]).max(-1) > 0)


def test_no_gradient_reaches_the_teacher():
    hidden, kernel, teacher_hidden, teacher_kernel, *rest = problem()
    gradients = jax.grad(
        lambda h, k: fused.head_loss(hidden, kernel, h, k, *rest)[0], (0, 1)
    )(teacher_hidden, teacher_kernel)
    assert_same(gradients, jax.tree.map(jnp.zeros_like, gradients))


def test_without_a_teacher_it_is_cross_entropy():
    hidden, kernel, _, _, targets, weights = problem()
    zeros = jnp.zeros_like(weights.ntp)
    weights = fused.TokenWeights(weights.ntp, zeros, zeros)
    actual = value_and_gradients(
        fused.head_loss, hidden, kernel, None, None, targets, weights, chunk_size=10
    )
    expected = value_and_gradients(dense, *problem()[:5], weights)
    assert_same(actual, expected)


def test_mft_target_is_a_choice_of_weights():
    """KL((1 - m) p + m e_y || q) has the gradient of (1 - m) KD + m NTP."""
    hidden, kernel, teacher_hidden, teacher_kernel, targets, _ = problem()
    share = 0.3
    ones, zeros = jnp.ones(T), jnp.zeros(T)
    weights = fused.TokenWeights(share * ones, zeros, (1 - share) * ones)

    def mft(hidden, kernel):
        p = jax.nn.softmax(teacher_hidden @ teacher_kernel)
        target = (1 - share) * p + share * jax.nn.one_hot(targets, V)
        log_q = jax.nn.log_softmax(hidden @ kernel)
        return jnp.sum(target * (jnp.log(target) - log_q))

    _, gradients = value_and_gradients(fused.head_loss, *problem()[:5], weights)
    assert_same(gradients, jax.grad(mft, (0, 1))(hidden, kernel))


@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_padded_vocabulary_gets_no_probability(soft_cap):
    hidden, kernel, teacher_hidden, teacher_kernel, *rest = problem()
    padded = [
        jnp.pad(k, ((0, 0), (0, 9)), constant_values=3.0)
        for k in (kernel, teacher_kernel)
    ]
    value, (d_hidden, d_kernel) = value_and_gradients(
        fused.head_loss, hidden, padded[0], teacher_hidden, padded[1], *rest,
        vocab_size=V, chunk_size=10, soft_cap=soft_cap,
    )  # fmt: skip
    expected = value_and_gradients(functools.partial(dense, cap=soft_cap), *problem())
    assert_same((value, (d_hidden, d_kernel[:, :V])), expected)
    np.testing.assert_array_equal(d_kernel[:, V:], 0.0)


def test_soft_cap():
    actual = value_and_gradients(fused.head_loss, *problem(), soft_cap=5.0)
    assert_same(
        actual, value_and_gradients(functools.partial(dense, cap=5.0), *problem())
    )


def test_bfloat16_hidden_states_multiply_in_bfloat16_and_reduce_in_float32():
    operands = problem(jnp.bfloat16)
    value, (d_hidden, d_kernel) = value_and_gradients(fused.head_loss, *operands)
    assert d_hidden.dtype == jnp.bfloat16
    assert d_kernel.dtype == jnp.float32
    rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in operands[:4]]
    expected = value_and_gradients(dense, *rounded, *operands[4:])
    assert_same(value, expected[0])
    # Gradients of logits are rounded to 8 bits before their products.
    assert_same((d_hidden, d_kernel), expected[1], rtol=2**-7)


def test_vocabularies_must_match():
    hidden, kernel, teacher_hidden, teacher_kernel, *rest = problem()
    with pytest.raises(ValueError, match="share one vocabulary.*64 and 60"):
        fused.head_loss(hidden, kernel[:, :60], teacher_hidden, teacher_kernel, *rest)


@pytest.mark.parametrize("vocab_parallel", [False, True])
@pytest.mark.parametrize(
    "shape", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)]
)
def test_any_mesh_gives_the_same(shape, vocab_parallel):
    """The swap crosses shards: argmax and gold lie on different devices."""
    mesh = sharding.make_mesh(dict(zip(sharding.MESH_AXES, shape)))
    with jax.set_mesh(mesh):
        actual = value_and_gradients(
            fused.head_loss, *problem(), chunk_size=5, vocab_parallel=vocab_parallel
        )
        _, statistics = jax.jit(
            functools.partial(fused.head_loss, vocab_parallel=vocab_parallel)
        )(*problem())
    assert_same(actual, value_and_gradients(dense, *problem()))
    assert_same(statistics, fused.head_loss(*problem())[1])


def test_no_array_of_tokens_by_vocabulary_exists():
    """Outside of a chunk nothing has T x V entries, forward or backward."""
    chunk = 6
    step = jax.jit(
        jax.value_and_grad(
            lambda h, k: fused.head_loss(h, k, *problem()[2:], chunk_size=chunk)[0],
            (0, 1),
        )
    )
    text = step.lower(*problem()[:2]).as_text()
    assert f"{chunk}x{V}xf32" in text
    assert f"{T}x{V}x" not in text
