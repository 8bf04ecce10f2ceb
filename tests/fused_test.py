"""The streamed head against the dense losses: values, gradients, shardings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixcpt_jax import fused, losses, sharding

T, D, E, V = 48, 16, 24, 64


@functools.cache
def problem(dtype=jnp.float32, vocab=V):
    keys = jax.random.split(jax.random.key(0), 9)
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
    weights = fused.TokenWeights(*(jax.random.uniform(k, (T,)) for k in keys[5:]))
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
        + weights.selective * losses.selective(student, teacher, targets)
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
    weights = fused.TokenWeights.of(T, ntp=weights.ntp)
    actual = value_and_gradients(
        fused.head_loss, hidden, kernel, None, None, targets, weights, chunk_size=10
    )
    expected = value_and_gradients(dense, *problem()[:5], weights)
    assert_same(actual, expected)


def test_mft_target_is_a_choice_of_weights():
    """KL((1 - m) p + m e_y || q) has the gradient of (1 - m) KD + m NTP."""
    hidden, kernel, teacher_hidden, teacher_kernel, targets, _ = problem()
    share = 0.3
    ones = jnp.ones(T)
    weights = fused.TokenWeights.of(T, ntp=share * ones, kd=(1 - share) * ones)

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


MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)]


@pytest.mark.parametrize("vocab_parallel", [False, True])
@pytest.mark.parametrize("shape", MESHES)
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


def swap_oracle(student, teacher, targets, weights, share):
    """Loss and gradient for the student's logits, literally, in float64.

    Of `share` selective and the rest LSSD: plain distillation where the teacher is right.
    """
    student, teacher = student.astype(np.float64), teacher.astype(np.float64)
    rows = np.arange(len(targets))
    swapped = teacher.copy()
    top = teacher.argmax(-1)
    swapped[rows, top] = teacher[rows, targets]
    swapped[rows, targets] = teacher[rows, top]

    def log_softmax(x):
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    log_p, log_q = log_softmax(swapped), log_softmax(student)
    losses_T = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    share_T = np.where(top == targets, 0.0, share)
    losses_T = (1 - share_T) * losses_T - share_T * log_q[rows, targets]
    target = (1 - share_T)[:, None] * np.exp(log_p)
    target[rows, targets] += share_T
    return weights @ losses_T, weights[:, None] * (np.exp(log_q) - target)


@st.composite
def logit_problems(draw):
    """Logits of both sides, targets, weights and how much of each is selective.

    The adversarial ones included.
    """
    num_tokens = draw(st.sampled_from([1, 3, 8, 13]))
    vocab = draw(st.sampled_from([2, 5, 31, 32, 61]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (num_tokens, vocab)
    kinds = {
        "normal": lambda: 3 * rng.standard_normal(shape),
        # Few values, so that the largest ties, also across tiles and shards.
        "ties": lambda: rng.integers(-1, 2, shape),
        "equal": lambda: np.zeros(shape),
        "huge": lambda: rng.choice([-1e4, 0.0, 1e4], shape),
        "one-hot": lambda: 1e4 * np.eye(vocab)[rng.integers(0, vocab, num_tokens)],
    }
    student, teacher = (
        # Exact in bfloat16, so the same problem serves both dtypes.
        np.asarray(jnp.asarray(kinds[kind](), jnp.bfloat16), np.float32)
        for kind in (draw(st.sampled_from(sorted(kinds))) for _ in range(2))
    )
    targets = rng.integers(0, vocab, num_tokens)
    if draw(st.booleans()):
        targets = teacher.argmax(-1)
    weights = rng.uniform(0, 1, num_tokens) * rng.integers(0, 2, num_tokens)
    share = draw(st.sampled_from([0.0, 0.25, 1.0]))
    return student, teacher, targets, weights.astype(np.float32), share


def check_against_oracle(problem, dtype, **options):
    """Hidden states are one-hot, so logits are exactly the rows of the unembedding."""
    student, teacher, targets, weights, share = problem
    value, d_logits = swap_oracle(*problem)
    hidden = jnp.eye(len(targets), dtype=dtype)
    token_weights = fused.TokenWeights.of(
        len(targets), lssd=(1 - share) * weights, selective=share * weights
    )

    def loss(hidden, kernel):
        operands = hidden, kernel, hidden, jnp.asarray(teacher), targets
        return fused.head_loss(*operands, token_weights, **options)[0]

    actual_value, (d_hidden, d_kernel) = jax.jit(jax.value_and_grad(loss, (0, 1)))(
        hidden, jnp.asarray(student)
    )
    # A loss is a difference of numbers as large as the logits; its sums over the
    # vocabulary lose a few bits of float32.
    spread = np.ptp(student, axis=-1) + np.ptp(teacher, axis=-1) + 1
    few_bits = 2.0**-20
    assert abs(actual_value - value) <= few_bits * (weights @ spread)
    # Rounding d to `dtype` and, for bfloat16, nothing else.
    epsilon = few_bits if dtype == jnp.float32 else 2.0**-8
    limit = epsilon * np.abs(d_logits) + few_bits * weights[:, None]
    assert np.all(np.abs(np.asarray(d_kernel, np.float64) - d_logits) <= limit)
    expected = d_logits @ student.astype(np.float64).T
    limit = limit @ np.abs(student.T) + epsilon * np.abs(expected) + 1e-30
    assert np.all(np.abs(np.asarray(d_hidden, np.float64) - expected) <= limit)


@settings(max_examples=40, deadline=None)
@given(
    problem=logit_problems(),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    chunk_size=st.integers(1, 15),
    chunks_per_block=st.integers(1, 3),
    vocab_tile=st.sampled_from([1, 2, 7, 16, 100]),
    vocab_first=st.booleans(),
)
def test_any_chunks_and_tiles_equal_the_literal_swap(
    problem, dtype, chunk_size, chunks_per_block, vocab_tile, vocab_first
):
    student, teacher, targets, weights, _ = problem
    options = {
        "chunk_size": chunk_size,
        "block_size": chunk_size * chunks_per_block,
        "vocab_tile": vocab_tile,
    }
    check_against_oracle(problem, dtype, **options)
    if vocab_first:
        hidden = jnp.eye(len(targets))
        value = functools.partial(fused.lssd, **options)
        np.testing.assert_allclose(
            value(hidden, student.T, hidden, teacher.T, targets, weights,
                  vocab_first=True),
            value(hidden, student, hidden, teacher, targets, weights),
            rtol=1e-6, atol=1e-6,
        )  # fmt: skip


@pytest.mark.parametrize("num_shards", [1, 2, 4, 8])
@pytest.mark.parametrize("over", ["tensor", "fsdp"])
@settings(max_examples=4, deadline=None)
@given(problem=logit_problems(), vocab_tile=st.sampled_from([3, 100]))
def test_any_vocabulary_sharding_equals_the_literal_swap(
    over, num_shards, problem, vocab_tile
):
    """Neither tokens nor vocabulary nor hidden size are multiples of the shards."""
    mesh = sharding.make_mesh(
        {"data": 8 // num_shards, "fsdp": 1, "tensor": 1} | {over: num_shards}
    )
    with jax.set_mesh(mesh):
        check_against_oracle(
            problem,
            jnp.float32,
            chunk_size=4,
            vocab_tile=vocab_tile,
            vocab_parallel=over == "fsdp",
        )


def test_tied_embeddings_are_used_as_they_lie():
    """`[V, D]` unembeddings give the transposed gradient and the same value."""
    hidden, kernel, teacher_hidden, teacher_kernel, *rest = problem()
    value, (d_hidden, d_kernel) = value_and_gradients(
        fused.head_loss, hidden, kernel.T, teacher_hidden, teacher_kernel.T, *rest,
        chunk_size=10, vocab_first=True,
    )  # fmt: skip
    assert_same((value, (d_hidden, d_kernel.T)), value_and_gradients(dense, *problem()))


def test_a_constant_added_to_the_logits_changes_nothing():
    rng = np.random.default_rng(0)
    student, teacher = (rng.standard_normal((4, 9)).astype(np.float32) for _ in "st")
    # Whole numbers, so that adding 2^12 is exact.
    student, teacher = np.round(student * 4), np.round(teacher * 4)
    hidden, targets, ones = jnp.eye(4), np.arange(4), np.ones(4, np.float32)
    value = fused.lssd(hidden, student, hidden, teacher, targets, ones)
    moved = fused.lssd(hidden, student + 4096, hidden, teacher - 4096, targets, ones)
    np.testing.assert_array_equal(moved, value)


def test_block_size_must_be_a_multiple_of_chunk_size():
    with pytest.raises(ValueError, match="block_size: 10 is not a multiple.*4"):
        fused.head_loss(*problem(), chunk_size=4, block_size=10)


def test_evaluation_holds_one_tile_of_logits():
    text = (
        jax.jit(functools.partial(fused.head_loss, chunk_size=6, vocab_tile=16))
        .lower(*problem())
        .as_text()
    )
    assert "16x6xf32" in text
    assert f"{V}x6x" not in text


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
    assert f"{V}x{chunk}xf32" in text
    assert f"{T}x{V}x" not in text
    assert f"{V}x{T}x" not in text


@pytest.mark.parametrize("chunk_size", [7, 16, 1000])
def test_log_probabilities_are_the_dense_ones_in_value_and_gradient(chunk_size):
    hidden, kernel, _, _, targets, weights = problem()

    # Any function of them that is no weighted sum.
    def streamed(hidden, kernel):
        logps_T = fused.log_probabilities(
            hidden, kernel, targets, chunk_size=chunk_size
        )
        return jnp.sum(weights.ntp * jnp.tanh(logps_T))

    def literal(hidden, kernel):
        logps_T = -losses.cross_entropy(hidden @ kernel, targets)
        return jnp.sum(weights.ntp * jnp.tanh(logps_T))

    actual, expected = (
        jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, kernel)
        for f in (streamed, literal)
    )
    assert_same(actual, expected)


def test_without_a_gradient_for_the_unembedding_none_is_accumulated():
    """What trains adapters: the compiler drops the product and its accumulator."""
    *operands, weights = problem()

    def loss(hidden, kernel):
        return fused.head_loss(hidden, kernel, *operands[2:], weights, chunk_size=16)[0]

    def flops(argnums):
        lowered = jax.jit(jax.grad(loss, argnums)).lower(*operands[:2])
        return lowered.compile().cost_analysis()["flops"]

    # cost_analysis counts a loop's body once, so only the chunk's products show.
    assert flops(0) <= flops((0, 1)) - 2 * 16 * D * V
