"""The dense losses against their definition, written out in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixcpt_jax import losses

V = 17


def oracle_log_softmax(logits):
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def oracle_softmax(logits):
    return np.exp(oracle_log_softmax(logits))


def oracle_swap(teacher, gold):
    """Exchanges the entries of argmax (lowest index first) and gold."""
    swapped = teacher.copy()
    top = int(np.argmax(teacher))
    swapped[top], swapped[gold] = teacher[gold], teacher[top]
    return swapped


def oracle_lssd(student, teacher, gold):
    """Value and gradient in the student's logits, from the definition."""
    log_p = oracle_log_softmax(oracle_swap(teacher, gold))
    log_q = oracle_log_softmax(student)
    value = np.sum(np.exp(log_p) * (log_p - log_q))
    return value, np.exp(log_q) - np.exp(log_p)


def draw(seed, shape=(40,), scale=3.0):
    """Student logits, teacher logits and targets; every third target is the top."""
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=(2, *shape, V)) * scale
    targets = rng.integers(0, V, shape)
    targets[::3] = teacher.argmax(-1)[::3]
    return student, teacher, targets


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


FORMS = [losses.lssd, losses.lssd_by_identity]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [0.1, 3.0, 50.0])
def test_lssd_equals_its_definition_in_value_and_gradient(form, scale):
    student, teacher, targets = draw(0, scale=scale)
    expected = [oracle_lssd(*row) for row in zip(student, teacher, targets)]
    values = form(student, teacher, targets)
    gradients = jax.grad(lambda s: form(s, teacher, targets).sum())(student)
    np.testing.assert_allclose(values, [v for v, _ in expected], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(gradients, [g for _, g in expected], atol=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_ties_go_to_the_lowest_index(form):
    teacher = np.zeros(V)
    teacher[[3, 9]] = 2.0
    student = np.linspace(-1, 1, V)
    for gold in (3, 9, 5):
        expected, _ = oracle_lssd(student, teacher, gold)
        np.testing.assert_allclose(
            form(student, teacher, jnp.array(gold)), expected, rtol=1e-12
        )


def test_swap_exchanges_two_entries_and_is_its_own_inverse_of_position():
    _, teacher, targets = draw(1)
    swapped = losses.swap_logits(teacher, targets)
    for row, expected in enumerate(map(oracle_swap, teacher, targets)):
        np.testing.assert_array_equal(swapped[row], expected)
    np.testing.assert_array_equal(np.sort(swapped), np.sort(teacher))
    np.testing.assert_array_equal(np.argmax(swapped, -1), targets)


def test_swap_keeps_entropy():
    _, teacher, targets = draw(2)
    for before, after in zip(teacher, losses.swap_logits(teacher, targets)):
        p, swapped = oracle_softmax(before), oracle_softmax(np.asarray(after))
        np.testing.assert_allclose(
            np.sum(p * np.log(p)), np.sum(swapped * np.log(swapped)), rtol=1e-12
        )


@pytest.mark.parametrize("form", FORMS)
def test_where_the_teacher_is_right_lssd_is_plain_distillation(form):
    student, teacher, _ = draw(3)
    np.testing.assert_allclose(
        form(student, teacher, teacher.argmax(-1)),
        losses.distillation(student, teacher),
        rtol=1e-12,
    )


@pytest.mark.parametrize("form", FORMS)
def test_lssd_is_never_negative_and_zero_at_the_swapped_teacher(form):
    student, teacher, targets = draw(4, shape=(500,))
    assert np.all(form(student, teacher, targets) > 0)
    at_optimum = losses.swap_logits(teacher, targets)
    np.testing.assert_allclose(form(at_optimum, teacher, targets), 0.0, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_constants_added_to_logits_change_nothing(form):
    student, teacher, targets = draw(5)
    np.testing.assert_allclose(
        form(student + 7.0, teacher - 11.0, targets),
        form(student, teacher, targets),
        rtol=1e-11,
    )


@pytest.mark.parametrize("form", FORMS)
def test_no_gradient_reaches_the_teacher(form):
    student, teacher, targets = draw(6)
    gradient = jax.grad(lambda t: form(student, t, targets).sum())(teacher)
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("form", FORMS)
def test_huge_logits_stay_finite_in_float32(form):
    student, teacher, targets = draw(7, scale=1e4)
    student, teacher = student.astype(np.float32), teacher.astype(np.float32)
    values = form(student, teacher, targets)
    gradients = jax.grad(lambda s: form(s, teacher, targets).sum())(student)
    expected = [
        oracle_lssd(s.astype(float), t.astype(float), y)
        for s, t, y in zip(student, teacher, targets)
    ]
    assert values.dtype == jnp.float32
    # A logit of 1e4 is known to 1e-3 in float32, and so is its log-probability.
    np.testing.assert_allclose(values, [v for v, _ in expected], rtol=1e-5, atol=5e-2)
    np.testing.assert_allclose(gradients, [g for _, g in expected], atol=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_masked_vocabulary_contributes_nothing(form):
    student, teacher, targets = draw(8)
    padding = np.full((*targets.shape, 5), -np.inf)
    masked = [np.concatenate([x, padding], -1) for x in (student, teacher)]
    np.testing.assert_allclose(
        form(*masked, targets), form(student, teacher, targets), rtol=1e-12
    )
    gradient = jax.grad(lambda s: form(s, masked[1], targets).sum())(masked[0])
    expected = jax.grad(lambda s: form(s, teacher, targets).sum())(student)
    np.testing.assert_allclose(gradient[:, :V], expected, atol=1e-14)
    np.testing.assert_array_equal(gradient[:, V:], 0.0)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_logits_are_reduced_in_float32(form):
    student, teacher, targets = draw(9)
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in (student, teacher))
    values = form(student, teacher, targets)
    expected = [
        oracle_lssd(np.asarray(s, float), np.asarray(t, float), y)[0]
        for s, t, y in zip(student, teacher, targets)
    ]
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)


def test_cross_entropy_and_distillation_equal_their_definitions():
    student, teacher, targets = draw(10, shape=(4, 5))
    q, p = (np.apply_along_axis(oracle_softmax, -1, x) for x in (student, teacher))
    gold = np.take_along_axis(q, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(
        losses.cross_entropy(student, targets), -np.log(gold), rtol=1e-12
    )
    np.testing.assert_allclose(
        losses.distillation(student, teacher),
        np.sum(p * np.log(p / q), -1),
        rtol=1e-11,
    )


def test_cross_entropy_has_the_floor_that_the_teacher_sets():
    """At LSSD's optimum the gold token has the teacher's own top probability."""
    _, teacher, targets = draw(11)
    optimum = losses.swap_logits(teacher, targets)
    top = np.array([oracle_softmax(t).max() for t in teacher])
    np.testing.assert_allclose(
        losses.cross_entropy(optimum, targets), -np.log(top), rtol=1e-12
    )
