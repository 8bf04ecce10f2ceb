"""The streamed head against the dense losses: values, gradients, shardings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixcpt_jax.core import mesh_shape
from mixcpt_jax.objectives import dense as losses
from mixcpt_jax.objectives import streamed as fused
from mixcpt_jax.runtime import sharding

T, D, E, V = 48, 16, 24, 64

# Each example is compiled, so few are tried; `EXAMPLES` of conftest.py moves these, too.
FEW = settings(max_examples=max(5, settings().max_examples // 8))
FEWER = settings(max_examples=max(2, settings().max_examples // 20))


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


def dense_compact(
    hidden, kernel, teacher_hidden, teacher_kernel, targets, weights, top_k, cap=None
):
    """`dense` with the teacher's tail as one outcome; also the statistics."""
    student, teacher = hidden @ kernel, teacher_hidden @ teacher_kernel
    if cap is not None:
        student, teacher = (cap * jnp.tanh(x / cap) for x in (student, teacher))
    top, teacher_top = student.argmax(-1), teacher.argmax(-1)
    statistics = fused.TokenStatistics(
        losses.cross_entropy(student, targets),
        losses.coarse_lssd(student, teacher, targets, top_k),
        losses.coarse_distillation(student, teacher, targets, top_k),
        top == targets,
        top == teacher_top,
        teacher_top != targets,
    )
    selective = jnp.where(statistics.swapped, statistics.ntp, statistics.kd)
    value = jnp.sum(
        weights.ntp * statistics.ntp
        + weights.lssd * statistics.lssd
        + weights.kd * statistics.kd
        + weights.selective * selective
    )
    return value, statistics


def compact_head(
    hidden, kernel, teacher_hidden, teacher_kernel, targets, weights, top_k, **options
):
    """`head_loss` with a compact form of the same teacher."""
    names = ("vocab_first", "vocab_size", "soft_cap")
    shared = {name: options[name] for name in names if name in options}
    compact = fused.compact_teacher(
        teacher_hidden, teacher_kernel, targets, top_k, **shared
    )
    return fused.head_loss(
        hidden, kernel, None, None, targets, weights, compact=compact, **options
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


@pytest.mark.parametrize("chunk_size", [7, 48, 1000])
def test_value_and_gradients_equal_the_dense_ones_for_any_chunk(chunk_size):
    actual = value_and_gradients(fused.head_loss, *problem(), chunk_size=chunk_size)
    assert_same(actual, value_and_gradients(dense, *problem()))


def dense_weighted(
    hidden, kernel, teacher_hidden, teacher_kernel, targets, weights, kind
):
    """`dense` whose next-token prediction is multiplied by `token_factor`."""
    student, teacher = hidden @ kernel, teacher_hidden @ teacher_kernel
    factor = losses.token_factor(
        kind,
        losses.cross_entropy(student, targets),
        losses.cross_entropy(teacher, targets),
    )
    operands = hidden, kernel, teacher_hidden, teacher_kernel, targets
    return dense(*operands, weights._replace(ntp=weights.ntp * factor))


@pytest.mark.parametrize("options", [{"chunk_size": 7}, {"vocab_tile": 24}])
@pytest.mark.parametrize("kind", ["none", "teacher_probability", "excess_loss"])
def test_token_weighting_equals_the_dense_one(kind, options):
    actual = value_and_gradients(
        fused.head_loss, *problem(), token_weighting=kind, **options
    )
    expected = value_and_gradients(dense_weighted, *problem(), kind=kind)
    assert_same(actual, expected)


def test_token_factors_are_their_formulas():
    student, teacher = np.array([0.5, 2.0, 3.0]), np.array([0.5, 1.0, 4.0])
    probability = losses.token_factor("teacher_probability", student, teacher)
    np.testing.assert_allclose(probability, np.exp(-teacher), rtol=1e-6)
    excess = losses.token_factor("excess_loss", student, teacher)
    np.testing.assert_allclose(excess, 2 / (1 + np.exp(teacher - student)), rtol=1e-6)
    assert excess[0] == 1
    with pytest.raises(ValueError, match="unknown kind"):
        losses.token_factor("probability", student, teacher)


def test_token_weighting_needs_a_teacher():
    hidden, kernel, _, _, targets, weights = problem()
    with pytest.raises(ValueError, match="needs a teacher"):
        fused.head_loss(
            hidden, kernel, None, None, targets, weights, token_weighting="excess_loss"
        )


@pytest.mark.parametrize("kind", ["teacher_probability", "excess_loss"])
def test_token_weighting_by_a_compact_teacher_that_lists_all(kind):
    actual = value_and_gradients(
        compact_head, *problem(), top_k=V, token_weighting=kind
    )
    assert_same(actual, value_and_gradients(dense_weighted, *problem(), kind=kind))


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


@pytest.mark.parametrize("vocab_tile", [None, 24])
def test_soft_cap(vocab_tile):
    actual = value_and_gradients(
        fused.head_loss, *problem(), soft_cap=5.0, vocab_tile=vocab_tile
    )
    assert_same(
        actual, value_and_gradients(functools.partial(dense, cap=5.0), *problem())
    )


def test_soft_cap_against_float64():
    hidden, kernel, teacher_hidden, teacher_kernel, targets, weights = problem()
    h, w, g, u = (np.float64(x) for x in problem()[:4])
    cap, targets_T = 5.0, np.asarray(targets)
    student = cap * np.tanh(h @ w / cap)
    teacher = cap * np.tanh(g @ u / cap)
    weights_T = np.float64(weights.lssd)
    value, d_capped = swap_oracle(student, teacher, targets_T, weights_T, 0.0)
    d_logits = d_capped * (1 - (student / cap) ** 2)

    def loss(hidden, kernel):
        return fused.lssd(
            hidden,
            kernel,
            teacher_hidden,
            teacher_kernel,
            targets,
            weights.lssd,
            soft_cap=cap,
        )

    actual = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, kernel)
    assert_same(actual, (value, (d_logits @ w.T, h.T @ d_logits)))


def test_without_a_soft_cap_nothing_is_capped():
    lowered = jax.jit(jax.grad(lambda h: fused.head_loss(h, *problem()[1:])[0]))
    assert "tanh" not in lowered.lower(problem()[0]).as_text()


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


# What a mesh does to the head: shards of tokens, of the vocabulary, of both.
MESHES = [
    ((2, 2, 2), False),
    ((2, 2, 2), True),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [((8, 1, 1), False), ((1, 8, 1), True), ((1, 1, 8), False)]
    ),
]


@pytest.mark.parametrize(("shape", "vocab_parallel"), MESHES)
def test_any_mesh_gives_the_same(shape, vocab_parallel):
    """The swap crosses shards: argmax and gold lie on different devices."""
    mesh = sharding.make_mesh(dict(zip(mesh_shape.MESH_AXES, shape)))
    cap = 5.0 if vocab_parallel else None
    with jax.set_mesh(mesh):
        actual = value_and_gradients(
            fused.head_loss,
            *problem(),
            chunk_size=5,
            vocab_parallel=vocab_parallel,
            soft_cap=cap,
        )
        _, statistics = jax.jit(
            functools.partial(
                fused.head_loss, vocab_parallel=vocab_parallel, soft_cap=cap
            )
        )(*problem())
    expected = value_and_gradients(functools.partial(dense, cap=cap), *problem())
    assert_same(actual, expected)
    assert_same(statistics, fused.head_loss(*problem(), soft_cap=cap)[1])


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


def log_sum_exp(x, **kwargs):
    return np.logaddexp.reduce(x, initial=-np.inf, **kwargs)


def stored_teacher(teacher, targets, top_k, dtype=np.float32):
    """What `streamed.compact_teacher` computes, in float64; then rounded."""
    teacher = teacher.astype(np.float64)
    logps = teacher - log_sum_exp(teacher, axis=-1)[:, None]
    ids = np.argsort(-teacher, axis=-1, kind="stable")[:, :top_k]
    is_repeated = (ids == targets[:, None]).any(-1)
    ids = np.concatenate([ids, targets[:, None]], -1)
    listed = np.take_along_axis(logps, ids, -1)
    listed[is_repeated, -1] = -np.inf
    np.put_along_axis(logps, ids, -np.inf, -1)
    return fused.CompactTeacher(
        ids.astype(np.int32),
        listed.astype(dtype),
        log_sum_exp(logps, axis=-1).astype(np.float32),
    )


def compact_oracle(student, compact, targets, weights, share):
    """`swap_oracle` for stored values, literally: a swap of two of a few outcomes."""
    student = student.astype(np.float64)
    value, d_logits = 0.0, np.zeros_like(student)
    for row, (s, ids, logps, tail) in enumerate(zip(student, *compact)):
        log_q = s - log_sum_exp(s)
        listed = ids[logps > -np.inf]
        others = np.setdiff1d(np.arange(len(s)), listed)
        log_p = np.array([*logps[logps > -np.inf], tail], np.float64)
        log_p -= log_sum_exp(log_p)
        top, gold = 0, listed.tolist().index(targets[row])
        log_p[[top, gold]] = log_p[[gold, top]]
        p = np.exp(log_p)
        target = np.zeros_like(s)
        target[listed] = p[:-1]
        loss = p[:-1] @ (log_p[:-1] - log_q[listed])
        if p[-1] > 0:
            log_q_tail = log_sum_exp(log_q[others])
            loss += p[-1] * (log_p[-1] - log_q_tail)
            target[others] = p[-1] * np.exp(log_q[others] - log_q_tail)
        if gold != top:
            loss = (1 - share) * loss - share * log_q[targets[row]]
            target = (1 - share) * target + share * np.eye(len(s))[targets[row]]
        value += weights[row] * loss
        d_logits[row] = weights[row] * (np.exp(log_q) - target)
    return value, d_logits


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


def check_against_oracle(problem, dtype, compact=None, **options):
    """Hidden states are one-hot, so logits are exactly the rows of the unembedding."""
    student, teacher, targets, weights, share = problem
    hidden = jnp.eye(len(targets), dtype=dtype)
    if compact is None:
        value, d_logits = swap_oracle(*problem)
        teacher_operands = hidden, jnp.asarray(teacher)
    else:
        value, d_logits = compact_oracle(student, compact, targets, weights, share)
        teacher_operands = None, None
        options["compact"] = jax.tree.map(jnp.asarray, compact)
    token_weights = fused.TokenWeights.of(
        len(targets), lssd=(1 - share) * weights, selective=share * weights
    )

    def loss(hidden, kernel):
        operands = hidden, kernel, *teacher_operands, targets
        return fused.head_loss(*operands, token_weights, **options)

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (actual_value, statistics), (d_hidden, d_kernel) = gradient(
        hidden, jnp.asarray(student)
    )
    top, teacher_top = student.argmax(-1), teacher.argmax(-1)
    np.testing.assert_array_equal(statistics.correct, top == targets)
    if compact is None:
        np.testing.assert_array_equal(statistics.agree, top == teacher_top)
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


@FEW
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


@pytest.mark.parametrize("num_shards", [8, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("over", ["tensor", "fsdp"])
@FEWER
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


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("chunk_size", [7, 1000])
def test_log_probabilities_are_the_dense_ones_in_value_and_gradient(chunk_size, cap):
    hidden, kernel, _, _, targets, weights = problem()

    # Any function of them that is no weighted sum and does not saturate.
    def streamed(hidden, kernel):
        logps_T = fused.log_probabilities(
            hidden, kernel, targets, chunk_size=chunk_size, soft_cap=cap
        )
        return jnp.sum(weights.ntp * jnp.sin(logps_T))

    def literal(hidden, kernel):
        logits_TxV = hidden @ kernel
        if cap is not None:
            logits_TxV = cap * jnp.tanh(logits_TxV / cap)
        logps_T = -losses.cross_entropy(logits_TxV, targets)
        return jnp.sum(weights.ntp * jnp.sin(logps_T))

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


TOP_KS = [8, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, V - 1))]


@pytest.mark.parametrize("top_k", TOP_KS)
def test_a_compact_teacher_gives_the_dense_coarse_losses(top_k):
    head = functools.partial(compact_head, top_k=top_k, chunk_size=7)
    expected = functools.partial(dense_compact, top_k=top_k)
    assert_same(
        value_and_gradients(head, *problem()), value_and_gradients(expected, *problem())
    )
    # Without gradients, in one tile and in several.
    for tile in (None, 16):
        actual = jax.jit(functools.partial(head, vocab_tile=tile))(*problem())
        assert_same(actual, expected(*problem()))


def test_a_compact_teacher_beside_tied_embeddings():
    hidden, kernel, teacher_hidden, teacher_kernel, *rest = problem()
    value, (d_hidden, d_kernel) = value_and_gradients(
        functools.partial(compact_head, top_k=5, vocab_first=True),
        hidden, kernel.T, teacher_hidden, teacher_kernel.T, *rest,
    )  # fmt: skip
    expected = functools.partial(dense_compact, top_k=5)
    assert_same(
        (value, (d_hidden, d_kernel.T)), value_and_gradients(expected, *problem())
    )


@pytest.mark.parametrize("top_k", [V - 1, V])
def test_a_compact_teacher_that_lists_all_is_the_teacher(top_k):
    head = functools.partial(compact_head, top_k=top_k)
    assert_same(
        value_and_gradients(head, *problem()),
        value_and_gradients(fused.head_loss, *problem()),
    )
    assert_same(head(*problem())[1], fused.head_loss(*problem())[1])


@pytest.mark.parametrize("top_k", TOP_KS)
def test_a_coarse_kd_is_never_above_the_whole(top_k):
    _, statistics = compact_head(*problem(), top_k=top_k)
    _, whole = fused.head_loss(*problem())
    assert np.all(statistics.kd <= whole.kd * (1 + 1e-5))
    assert np.all(statistics.lssd <= whole.lssd * (1 + 1e-5))


@pytest.mark.parametrize("vocab_tile", [None, 16])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_a_compact_teacher_with_a_padded_vocabulary(soft_cap, vocab_tile):
    hidden, kernel, teacher_hidden, teacher_kernel, *rest = problem()
    padded = [
        jnp.pad(k, ((0, 0), (0, 9)), constant_values=3.0)
        for k in (kernel, teacher_kernel)
    ]
    value, (d_hidden, d_kernel) = value_and_gradients(
        functools.partial(compact_head, top_k=5),
        hidden, padded[0], teacher_hidden, padded[1], *rest,
        vocab_size=V, chunk_size=10, soft_cap=soft_cap, vocab_tile=vocab_tile,
    )  # fmt: skip
    expected = functools.partial(dense_compact, top_k=5, cap=soft_cap)
    assert_same(
        (value, (d_hidden, d_kernel[:, :V])), value_and_gradients(expected, *problem())
    )
    np.testing.assert_array_equal(d_kernel[:, V:], 0.0)


@pytest.mark.parametrize(("shape", "vocab_parallel"), MESHES)
def test_any_mesh_gives_the_same_with_a_compact_teacher(shape, vocab_parallel):
    mesh = sharding.make_mesh(dict(zip(mesh_shape.MESH_AXES, shape)))
    options = {"top_k": 5, "chunk_size": 5, "vocab_parallel": vocab_parallel}
    with jax.set_mesh(mesh):
        # The teacher's compact form is computed there too.
        actual = jax.jit(
            jax.value_and_grad(
                functools.partial(compact_head, **options), (0, 1), has_aux=True
            )
        )(*problem())
    expected = jax.value_and_grad(
        functools.partial(dense_compact, top_k=5), (0, 1), has_aux=True
    )(*problem())
    assert_same(actual, expected)


DTYPES = [np.float32, np.float16, jnp.bfloat16]


@FEW
@given(
    problem=logit_problems(),
    top_k=st.integers(1, 61),
    stored_dtype=st.sampled_from(DTYPES),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    chunk_size=st.integers(1, 15),
    vocab_tile=st.sampled_from([1, 2, 7, 16, 100]),
)
def test_any_chunks_and_tiles_equal_what_is_stored_of_the_teacher(
    problem, top_k, stored_dtype, dtype, chunk_size, vocab_tile
):
    _, teacher, targets, *_ = problem
    compact = stored_teacher(teacher, targets, top_k, stored_dtype)
    options = {"chunk_size": chunk_size, "vocab_tile": vocab_tile}
    check_against_oracle(problem, dtype, compact, **options)


@pytest.mark.parametrize("num_shards", [8, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("over", ["tensor", "fsdp"])
@FEWER
@given(
    problem=logit_problems(),
    top_k=st.sampled_from([1, 4, 30]),
    vocab_tile=st.sampled_from([3, 100]),
)
def test_any_vocabulary_sharding_equals_what_is_stored_of_the_teacher(
    over, num_shards, problem, top_k, vocab_tile
):
    mesh = sharding.make_mesh(
        {"data": 8 // num_shards, "fsdp": 1, "tensor": 1} | {over: num_shards}
    )
    _, teacher, targets, *_ = problem
    with jax.set_mesh(mesh):
        check_against_oracle(
            problem,
            jnp.float32,
            stored_teacher(teacher, targets, top_k, np.float16),
            chunk_size=4,
            vocab_tile=vocab_tile,
            vocab_parallel=over == "fsdp",
        )


@pytest.mark.parametrize("vocab_tile", [3, 100])
@pytest.mark.parametrize("gold", [2, 9, 5])
def test_the_top_token_is_the_first_listed_even_if_rounding_makes_ties(
    gold, vocab_tile
):
    """9 was more likely than 2 before both were rounded."""
    student = np.random.default_rng(0).normal(size=(1, 12)).astype(np.float32)
    compact = fused.CompactTeacher(
        np.array([[9, 2, gold]]),
        np.float16([[-1.5, -1.5, -4.0 if gold == 5 else -np.inf]]),
        np.float32([-0.8]),
    )
    problem = student, student, np.array([gold]), np.ones(1, np.float32), 0.5
    check_against_oracle(problem, jnp.float32, compact, vocab_tile=vocab_tile)


@pytest.mark.parametrize("ids", [0, -1])
@pytest.mark.parametrize("logps", [0.0, -np.inf])
@pytest.mark.parametrize("tail", [0.0, -np.inf])
def test_masked_tokens_of_a_compact_teacher_contribute_exactly_nothing(
    ids, logps, tail
):
    """Whatever stands there as padding."""
    hidden, kernel, teacher_hidden, teacher_kernel, targets, weights = problem()
    compact = fused.compact_teacher(teacher_hidden, teacher_kernel, targets, 5)
    padding = fused.CompactTeacher(ids, logps, tail)
    poisoned = jax.tree.map(lambda x, p: x.at[::5].set(p), compact, padding)

    def value(hidden, compact):
        return fused.head_loss(
            hidden, kernel, None, None, targets, weights, compact=compact, chunk_size=7
        )

    value_and_gradient = jax.value_and_grad(value, has_aux=True)
    (expected, _), expected_gradient = value_and_gradient(hidden, compact)
    (actual, statistics), gradient = value_and_gradient(hidden, poisoned)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(gradient, expected_gradient)
    np.testing.assert_array_equal(gradient[::5], 0.0)
    assert all(np.all(np.isfinite(x)) for x in statistics)


def test_no_gradient_reaches_a_compact_teacher():
    hidden, kernel, teacher_hidden, teacher_kernel, targets, weights = problem()
    compact = fused.compact_teacher(teacher_hidden, teacher_kernel, targets, 5)

    def value(logps, tail):
        return fused.head_loss(
            hidden, kernel, None, None, targets, weights,
            compact=compact._replace(logps=logps, tail=tail),
        )[0]  # fmt: skip

    gradients = jax.grad(value, (0, 1))(compact.logps, compact.tail)
    assert_same(gradients, jax.tree.map(jnp.zeros_like, gradients))


@pytest.mark.parametrize("top_k", TOP_KS)
@pytest.mark.parametrize("chunk_size", [7, None])
def test_compact_teacher_equals_its_definition(top_k, chunk_size):
    _, _, hidden, kernel, targets, _ = problem()
    expected = stored_teacher(np.asarray(hidden @ kernel), np.asarray(targets), top_k)
    for vocab_first in (False, True):
        actual = fused.compact_teacher(
            hidden,
            kernel.T if vocab_first else kernel,
            targets,
            top_k,
            vocab_first=vocab_first,
            chunk_size=chunk_size,
        )
        for a, e in zip(actual, expected):
            assert a.dtype == e.dtype
            np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


def test_compact_teacher_applies_the_cap():
    _, _, hidden, kernel, targets, _ = problem()
    logits = 5.0 * np.tanh(np.asarray(hidden @ kernel) / 5.0)
    padded = jnp.pad(kernel, ((0, 0), (0, 9)), constant_values=3.0)
    actual = fused.compact_teacher(
        hidden, padded, targets, 4, vocab_size=V, soft_cap=5.0
    )
    for a, e in zip(actual, stored_teacher(logits, np.asarray(targets), 4)):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


def test_compact_teacher_holds_one_chunk_of_logits():
    _, _, hidden, kernel, targets, _ = problem()
    form = functools.partial(fused.compact_teacher, top_k=5, chunk_size=6)
    text = jax.jit(form).lower(hidden, kernel, targets).as_text()
    assert f"{V}x6xf32" in text
    assert f"{T}x{V}x" not in text
    assert f"{V}x{T}x" not in text


def test_there_is_one_teacher():
    _, _, teacher_hidden, teacher_kernel, targets, _ = problem()
    compact = fused.compact_teacher(teacher_hidden, teacher_kernel, targets, 5)
    with pytest.raises(ValueError, match="compact teacher.*one or the other"):
        fused.head_loss(*problem(), compact=compact)


@pytest.mark.parametrize("top_k", [0, 61])
def test_top_k_must_fit_the_vocabulary(top_k):
    _, _, hidden, kernel, targets, _ = problem()
    with pytest.raises(ValueError, match=rf"top_k: {top_k} is not in \[1, 60\]"):
        fused.compact_teacher(hidden, kernel, targets, top_k, vocab_size=60)
