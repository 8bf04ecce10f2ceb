"""The dense losses against their definition, written out in NumPy float64."""

import collections
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixcpt_jax.objectives import dense

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


def oracle_selective(student, teacher, gold):
    """The same for next-token prediction where the teacher is wrong."""
    log_p, log_q = oracle_log_softmax(teacher), oracle_log_softmax(student)
    if np.argmax(teacher) == gold:
        return np.sum(np.exp(log_p) * (log_p - log_q)), np.exp(log_q) - np.exp(log_p)
    return -log_q[gold], np.exp(log_q) - np.eye(V)[gold]


def oracle_coarse(student, teacher, gold, top_k, form):
    """Value and gradient with the tail of the teacher's tokens as one outcome."""
    is_tail = np.ones(V, bool)
    is_tail[[*np.argsort(-teacher, kind="stable")[:top_k], gold]] = False
    swapped = oracle_swap(teacher, gold) if form is dense.coarse_lssd else teacher
    log_p, log_q = oracle_log_softmax(swapped), oracle_log_softmax(student)
    target = np.exp(log_p)
    value = np.sum((target * (log_p - log_q))[~is_tail])
    if is_tail.any():
        log_p_tail, log_q_tail = (
            np.logaddexp.reduce(x[is_tail]) for x in (log_p, log_q)
        )
        value += np.exp(log_p_tail) * (log_p_tail - log_q_tail)
        target[is_tail] = np.exp(log_p_tail + log_q[is_tail] - log_q_tail)
    return value, np.exp(log_q) - target


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


SWAPS = [dense.lssd, dense.lssd_by_identity]
WHOLE = dict.fromkeys(SWAPS, oracle_lssd) | {dense.selective: oracle_selective}
COARSE = {
    functools.partial(form, top_k=top_k): functools.partial(
        oracle_coarse, top_k=top_k, form=form
    )
    for form in (dense.coarse_lssd, dense.coarse_distillation)
    for top_k in (1, 4, V - 1, V)
}
ORACLES = WHOLE | COARSE


@pytest.mark.parametrize("form", ORACLES)
@pytest.mark.parametrize("scale", [0.1, 3.0, 50.0])
def test_a_loss_equals_its_definition_in_value_and_gradient(form, scale):
    student, teacher, targets = draw(0, scale=scale)
    expected = [ORACLES[form](*row) for row in zip(student, teacher, targets)]
    values = form(student, teacher, targets)
    gradients = jax.grad(lambda s: form(s, teacher, targets).sum())(student)
    np.testing.assert_allclose(values, [v for v, _ in expected], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(gradients, [g for _, g in expected], atol=1e-14)


@pytest.mark.parametrize("form", ORACLES)
def test_ties_go_to_the_lowest_index(form):
    teacher = np.zeros(V)
    teacher[[3, 9]] = 2.0
    student = np.linspace(-1, 1, V)
    for gold in (3, 9, 5):
        expected, _ = ORACLES[form](student, teacher, gold)
        np.testing.assert_allclose(
            form(student, teacher, jnp.array(gold)), expected, rtol=1e-12
        )


def test_swap_exchanges_two_entries_and_is_its_own_inverse_of_position():
    _, teacher, targets = draw(1)
    swapped = dense.swap_logits(teacher, targets)
    for row, expected in enumerate(map(oracle_swap, teacher, targets)):
        np.testing.assert_array_equal(swapped[row], expected)
    np.testing.assert_array_equal(np.sort(swapped), np.sort(teacher))
    np.testing.assert_array_equal(np.argmax(swapped, -1), targets)


def test_swap_keeps_entropy():
    _, teacher, targets = draw(2)
    for before, after in zip(teacher, dense.swap_logits(teacher, targets)):
        p, swapped = oracle_softmax(before), oracle_softmax(np.asarray(after))
        np.testing.assert_allclose(
            np.sum(p * np.log(p)), np.sum(swapped * np.log(swapped)), rtol=1e-12
        )


@pytest.mark.parametrize("form", WHOLE)
def test_where_the_teacher_is_right_it_is_plain_distillation(form):
    student, teacher, _ = draw(3)
    np.testing.assert_allclose(
        form(student, teacher, teacher.argmax(-1)),
        dense.distillation(student, teacher),
        rtol=1e-12,
    )


@pytest.mark.parametrize("form", SWAPS)
def test_lssd_is_never_negative_and_zero_at_the_swapped_teacher(form):
    student, teacher, targets = draw(4, shape=(500,))
    assert np.all(form(student, teacher, targets) > 0)
    at_optimum = dense.swap_logits(teacher, targets)
    np.testing.assert_allclose(form(at_optimum, teacher, targets), 0.0, atol=1e-13)


@pytest.mark.parametrize("form", ORACLES)
def test_constants_added_to_logits_change_nothing(form):
    student, teacher, targets = draw(5)
    np.testing.assert_allclose(
        form(student + 7.0, teacher - 11.0, targets),
        form(student, teacher, targets),
        rtol=1e-11,
    )


@pytest.mark.parametrize("form", ORACLES)
def test_no_gradient_reaches_the_teacher(form):
    student, teacher, targets = draw(6)
    gradient = jax.grad(lambda t: form(student, t, targets).sum())(teacher)
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("form", ORACLES)
def test_huge_logits_stay_finite_in_float32(form):
    student, teacher, targets = draw(7, scale=1e4)
    student, teacher = student.astype(np.float32), teacher.astype(np.float32)
    values = form(student, teacher, targets)
    gradients = jax.grad(lambda s: form(s, teacher, targets).sum())(student)
    expected = [
        ORACLES[form](s.astype(float), t.astype(float), y)
        for s, t, y in zip(student, teacher, targets)
    ]
    assert values.dtype == jnp.float32
    # A logit of 1e4 is known to 1e-3 in float32, and so is its log-probability.
    np.testing.assert_allclose(values, [v for v, _ in expected], rtol=1e-5, atol=5e-2)
    np.testing.assert_allclose(gradients, [g for _, g in expected], atol=1e-2)


@pytest.mark.parametrize("form", ORACLES)
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


@pytest.mark.parametrize("form", ORACLES)
def test_bfloat16_logits_are_reduced_in_float32(form):
    student, teacher, targets = draw(9)
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in (student, teacher))
    values = form(student, teacher, targets)
    expected = [
        ORACLES[form](np.asarray(s, float), np.asarray(t, float), y)[0]
        for s, t, y in zip(student, teacher, targets)
    ]
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)


def test_cross_entropy_and_distillation_equal_their_definitions():
    student, teacher, targets = draw(10, shape=(4, 5))
    q, p = (np.apply_along_axis(oracle_softmax, -1, x) for x in (student, teacher))
    gold = np.take_along_axis(q, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(
        dense.cross_entropy(student, targets), -np.log(gold), rtol=1e-12
    )
    np.testing.assert_allclose(
        dense.distillation(student, teacher),
        np.sum(p * np.log(p / q), -1),
        rtol=1e-11,
    )


def test_cross_entropy_has_the_floor_that_the_teacher_sets():
    """At LSSD's optimum the gold token has the teacher's own top probability."""
    _, teacher, targets = draw(11)
    optimum = dense.swap_logits(teacher, targets)
    top = np.array([oracle_softmax(t).max() for t in teacher])
    np.testing.assert_allclose(
        dense.cross_entropy(optimum, targets), -np.log(top), rtol=1e-12
    )


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_selective_raises_the_ceiling_of_lssd(share):
    """Both together have one target, with more probability for the gold token than `p~`."""
    student, teacher, targets = draw(12)

    def mixed(student):
        lssd, selective = (
            form(student, teacher, targets) for form in (dense.lssd, dense.selective)
        )
        return jnp.sum((1 - share) * lssd + share * selective)

    for s, t, y, gradient in zip(student, teacher, targets, jax.grad(mixed)(student)):
        target = oracle_softmax(oracle_swap(t, y))
        if np.argmax(t) != y:
            target = (1 - share) * target + share * np.eye(V)[y]
        # The gradient of KL(target || q).
        np.testing.assert_allclose(gradient, oracle_softmax(s) - target, atol=1e-14)


@pytest.mark.parametrize(
    ("coarse", "whole"),
    [
        (dense.coarse_lssd, dense.lssd),
        (dense.coarse_distillation, lambda s, t, _: dense.distillation(s, t)),
    ],
)
def test_a_coarse_divergence_grows_with_what_is_listed_up_to_the_whole(coarse, whole):
    student, teacher, targets = draw(13, shape=(300,))
    values = [np.zeros(300)]
    values += [coarse(student, teacher, targets, top_k) for top_k in range(1, V + 1)]
    expected = whole(student, teacher, targets)
    assert np.all(np.diff(values, axis=0) >= -1e-14)
    # One token that is not listed is as good as listed.
    for value in values[-2:]:
        np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-14)


def oracle_log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def oracle_preference(
    logps, *, beta, kind, label_smoothing=0.0, sft_weight=0.0, lengths=1
):
    """Loss and its gradient `[4, P]`, written from the papers' formulas.

    `logps` are `[4, P]`: chosen, rejected, reference's chosen, reference's rejected.
    """
    chosen, rejected, reference_chosen, reference_rejected = logps
    # DPO's eq. 7 takes the ratios of policy and reference, IPO's h in eq. 17 those of
    # chosen and rejected: the same number.
    margin = (chosen - rejected) - (reference_chosen - reference_rejected)
    right, wrong = oracle_log_sigmoid(beta * margin), oracle_log_sigmoid(-beta * margin)
    if kind == "sigmoid":
        loss = -(1 - label_smoothing) * right - label_smoothing * wrong
        # DPO's section 4: weighted by the sigmoid of the wrong order.
        slope = label_smoothing * np.exp(right) - (1 - label_smoothing) * np.exp(wrong)
        slope = beta * slope
    else:
        loss = (margin - 1 / (2 * beta)) ** 2
        slope = 2 * margin - 1 / beta
    loss = loss - sft_weight * chosen / lengths
    return loss, np.stack([slope - sft_weight / lengths, -slope, 0 * slope, 0 * slope])


def draw_logps(seed, pairs=50, scale=3.0):
    """`[4, P]`: log-probabilities near -40; the reference's close to the policy's."""
    rng = np.random.default_rng(seed)
    policy = -40 + 10 * rng.normal(size=(2, pairs))
    return np.concatenate([policy, policy + scale * rng.normal(size=(2, pairs))])


PREFERENCES = {
    "dpo": {"kind": "sigmoid"},
    "conservative": {"kind": "sigmoid", "label_smoothing": 0.2},
    "ipo": {"kind": "ipo"},
    "dpo+sft": {"kind": "sigmoid", "sft_weight": 0.7},
    "ipo+sft": {"kind": "ipo", "sft_weight": 0.7},
}


def preference(logps, *, lengths=None, **options):
    return dense.preference_loss(*logps, chosen_lengths_P=lengths, **options)


def preference_gradient(logps, **options):
    total = jax.jit(lambda *logps: preference(logps, **options)[0].sum())
    return np.stack(jax.grad(total, argnums=(0, 1, 2, 3))(*logps))


@pytest.mark.parametrize("options", PREFERENCES.values(), ids=PREFERENCES)
@pytest.mark.parametrize("beta", [0.05, 1.0, 4.0])
def test_preference_equals_its_definition_in_value_and_gradient(options, beta):
    logps = draw_logps(20)
    lengths = np.random.default_rng(21).integers(1, 90, logps.shape[1])
    options = {**options, "beta": beta, "lengths": lengths}
    expected, expected_gradient = oracle_preference(logps, **options)
    values, chosen_rewards, rejected_rewards = preference(logps, **options)
    np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(
        preference_gradient(logps, **options), expected_gradient, rtol=1e-11, atol=1e-13
    )
    np.testing.assert_allclose(chosen_rewards, beta * (logps[0] - logps[2]), rtol=1e-14)
    np.testing.assert_allclose(
        rejected_rewards, beta * (logps[1] - logps[3]), rtol=1e-14
    )


@pytest.mark.parametrize("options", PREFERENCES.values(), ids=PREFERENCES)
def test_preference_gradient_equals_finite_differences(options):
    logps = draw_logps(22)
    options = {**options, "beta": 0.3, "lengths": np.full(logps.shape[1], 13)}
    gradient = preference_gradient(logps, **options)
    step = 1e-4  # The error is step^2 of a third derivative and 1e-14 / step.
    for row in range(2):
        shift = np.zeros_like(logps)
        shift[row] = step
        above = oracle_preference(logps + shift, **options)[0]
        below = oracle_preference(logps - shift, **options)[0]
        np.testing.assert_allclose(
            gradient[row], (above - below) / (2 * step), rtol=1e-7, atol=1e-8
        )
    np.testing.assert_array_equal(gradient[2:], 0.0)


def test_no_gradient_leaves_the_rewards():
    logps = draw_logps(23)
    for which in (1, 2):
        gradients = jax.grad(
            lambda logps, which=which: preference(logps, beta=0.1)[which].sum()
        )(jnp.asarray(logps))
        np.testing.assert_array_equal(gradients, 0.0)


@pytest.mark.parametrize("options", PREFERENCES.values(), ids=PREFERENCES)
def test_preference_sees_ratios_only(options):
    """A constant of an answer that policy and reference share changes nothing."""
    logps = draw_logps(24)
    options = {**options, "beta": 0.3, "sft_weight": 0.0}
    constants = np.array([[7.0], [-11.0], [7.0], [-11.0]])
    for before, after in zip(
        preference(logps, **options), preference(logps + constants, **options)
    ):
        np.testing.assert_allclose(after, before, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("options", PREFERENCES.values(), ids=PREFERENCES)
def test_a_nat_less_for_both_answers_of_policy_alone_changes_only_rewards(options):
    logps = draw_logps(25)
    options = {**options, "beta": 0.3, "sft_weight": 0.0}
    value, *rewards = preference(logps, **options)
    shifted, *shifted_rewards = preference(logps - [[1], [1], [0], [0]], **options)
    np.testing.assert_allclose(shifted, value, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(shifted_rewards, np.array(rewards) - 0.3, atol=1e-13)


def test_swapped_answers_mirror_the_margin():
    logps = draw_logps(26)
    swapped = logps[[1, 0, 3, 2]]
    for smoothing in (0.0, 0.1):
        options = {"beta": 0.3, "label_smoothing": smoothing}
        value, chosen, rejected = preference(logps, **options)
        mirrored, mirrored_chosen, mirrored_rejected = preference(swapped, **options)
        np.testing.assert_array_equal(mirrored_chosen, rejected)
        np.testing.assert_array_equal(mirrored_rejected, chosen)
        # log sigmoid(x) - log sigmoid(-x) = x
        np.testing.assert_allclose(
            mirrored - value, (1 - 2 * smoothing) * (chosen - rejected), atol=1e-12
        )
    # (m + c)^2 - (m - c)^2 = 4 m c with c = 1 / (2 beta)
    value, chosen, rejected = preference(logps, beta=0.3, kind="ipo")
    mirrored, *_ = preference(swapped, beta=0.3, kind="ipo")
    np.testing.assert_allclose(
        mirrored - value, 2 * (chosen - rejected) / 0.3**2, rtol=1e-10
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.49])
@pytest.mark.parametrize("beta", [0.05, 4.0])
def test_at_the_reference_the_loss_is_log_2(label_smoothing, beta):
    logps = draw_logps(27, scale=0.0)
    options = {"beta": beta, "label_smoothing": label_smoothing}
    value, chosen, rejected = preference(logps, **options)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-15)
    np.testing.assert_array_equal([chosen, rejected], 0.0)
    slope = beta * (0.5 - label_smoothing)
    gradient = preference_gradient(logps, **options)
    np.testing.assert_allclose(gradient[0], -slope, rtol=1e-12)
    np.testing.assert_allclose(gradient[1], slope, rtol=1e-12)


def test_sigmoid_always_pushes_the_chosen_up_and_the_rejected_down():
    gradient = preference_gradient(draw_logps(28), beta=0.3)
    assert np.all(gradient[0] < 0)
    assert np.all(gradient[1] > 0)


def test_ipo_and_smoothing_stop_at_a_margin():
    margins = np.linspace(-9, 9, 50)
    logps = np.stack([margins - 5, 0 * margins - 5, *np.full((2, 50), -5.0)])
    for options, best in (
        ({"kind": "ipo"}, 1 / (2 * 0.3)),
        ({"label_smoothing": 0.2}, np.log(0.8 / 0.2) / 0.3),
    ):
        gradient = preference_gradient(logps, beta=0.3, **options)
        np.testing.assert_array_equal(np.sign(gradient[0]), np.sign(margins - best))


def test_no_smoothing_equals_plain_dpo():
    logps = draw_logps(29)
    value, chosen, rejected = preference(logps, beta=0.3, label_smoothing=0.0)
    plain = -oracle_log_sigmoid(np.asarray(chosen - rejected))
    np.testing.assert_allclose(value, plain, rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(value, preference(logps, beta=0.3)[0])


def test_sft_term_of_an_empty_answer_is_zero():
    empty = np.zeros((4, 1))
    options = {"beta": 0.3, "sft_weight": 0.7, "lengths": np.array([0])}
    np.testing.assert_allclose(preference(empty, **options)[0], np.log(2), rtol=1e-15)
    assert np.all(np.isfinite(preference_gradient(empty, **options)))


@pytest.mark.parametrize("options", PREFERENCES.values(), ids=PREFERENCES)
def test_huge_margins_stay_finite_in_float32(options):
    logps = np.zeros((4, 4), np.float32)
    logps[0] = [-1e4, 0, -1e4, -1]
    logps[1] = [0, -1e4, -1, -1e4]
    options = {**options, "beta": 1.0, "lengths": np.full(4, 10)}
    value, *rewards = preference(logps, **options)
    expected, expected_gradient = oracle_preference(logps.astype(float), **options)
    assert {x.dtype for x in (value, *rewards)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    gradient = preference_gradient(logps, **options)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6)


@pytest.mark.parametrize("options", PREFERENCES.values(), ids=PREFERENCES)
@pytest.mark.parametrize(
    ("dtype", "result"),
    [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")],
)
def test_preference_is_computed_in_float32_at_least(options, dtype, result):
    logps = jnp.asarray(draw_logps(30), dtype)
    options = {**options, "beta": 0.3, "lengths": jnp.full(50, 13)}
    outputs = preference(logps, **options)
    expected, _ = oracle_preference(np.asarray(logps, float), **options)
    assert {x.dtype for x in outputs} == {jnp.dtype(result)}
    # Differences of entries near 40 have an error of 2^-24 of their own size.
    np.testing.assert_allclose(outputs[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kind": "hinge"}, "kind.*'hinge'"),
        ({"label_smoothing": 0.5}, r"label_smoothing.*0\.5"),
        ({"label_smoothing": -0.1}, r"label_smoothing.*-0\.1"),
        ({"label_smoothing": float("nan")}, "label_smoothing.*nan"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "label_smoothing.*ipo"),
        ({"sft_weight": 1.0}, "sft_weight.*chosen_lengths_P"),
    ],
)
def test_what_is_wrong_with_the_options_of_a_preference_is_named(options, named):
    with pytest.raises(ValueError, match=named):
        preference(draw_logps(31), beta=0.3, **options)


# TRL sums and averages by itself, so it is compared from tokens: one pair, rows chosen
# and rejected, `[2, T]`; the reference's sums `[2]`.


def trl_loss(logps_2T, mask_2T, reference_2, loss_type, beta, label_smoothing):
    """TRL's loss, its metrics, and the loss's gradient in `logps_2T`.

    By the method of TRL 1.16, `DPOTrainer._compute_loss`. Its `sigmoid` has no label
    smoothing; `aot` has DPO's conservative form, with sorted ratios, which for one pair
    changes nothing.
    """
    torch = pytest.importorskip("torch")
    trl = pytest.importorskip("trl")
    metrics = collections.defaultdict(lambda: collections.defaultdict(list))
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True),
        accelerator=types.SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
    )
    log_probs = torch.tensor(logps_2T * mask_2T, requires_grad=True)
    ignored = torch.zeros_like(log_probs)
    outputs = types.SimpleNamespace(
        log_probs=log_probs, entropy=ignored, mean_logits=ignored, is_top1=ignored > 0
    )
    prompt = np.zeros((2, 1), int)
    mask = torch.tensor(np.concatenate([prompt, mask_2T], 1))
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": torch.tensor(reference_2[:1]),
        "ref_rejected_logps": torch.tensor(reference_2[1:]),
    }
    loss = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    loss.backward()
    rewards = {
        name: value[0]
        for name, value in metrics["train"].items()
        if name.startswith("rewards/")
    }
    return loss.item(), rewards, log_probs.grad.numpy()


def ours_as_trl(logps_2T, mask_2T, reference_2, loss_type, beta, label_smoothing):
    """What a caller does to have TRL's loss of one pair, and TRL's metrics."""
    lengths_2 = mask_2T.sum(1)
    sums_2 = (logps_2T * mask_2T).sum(1)
    sums_11 = [x[None] for x in (*sums_2, *reference_2)]
    means_11 = [x / n for x, n in zip(sums_11, [*lengths_2, *lengths_2])]
    options = {"beta": beta}
    _, chosen, rejected = preference(sums_11, **options)
    rewards = {
        "rewards/chosen": chosen[0],
        "rewards/rejected": rejected[0],
        "rewards/accuracies": (chosen > rejected).mean(),
        "rewards/margins": (chosen - rejected)[0],
    }
    plain = preference(sums_11, **options)[0][0]
    if loss_type == "sigmoid":
        loss = plain
    elif loss_type == "aot":
        loss = preference(sums_11, label_smoothing=label_smoothing, **options)[0][0]
    elif loss_type == "robust":
        # (1 - e) l - e l', from (1 - e) l + e l' and l
        smooth = preference(sums_11, label_smoothing=label_smoothing, **options)[0][0]
        loss = (2 * (1 - label_smoothing) * plain - smooth) / (1 - 2 * label_smoothing)
    elif loss_type == "ipo":
        loss = preference(means_11, kind="ipo", **options)[0][0]
    elif loss_type == "sigmoid_norm":
        loss = preference(means_11, **options)[0][0]
    else:
        both, *_ = preference(sums_11, sft_weight=1.0, lengths=lengths_2[:1], **options)
        loss = both[0] - plain
    return loss, rewards


def draw_tokens(seed, length=9):
    rng = np.random.default_rng(seed)
    lengths_2 = rng.integers(1, length + 1, 2)
    mask_2T = (np.arange(length) < lengths_2[:, None]).astype(int)
    logps_2T = -rng.exponential(2.0, (2, length))
    reference_2 = (logps_2T * mask_2T).sum(1) + 3.0 * rng.normal(size=2)
    return logps_2T, mask_2T, reference_2


TRL_LOSSES = ["sigmoid", "aot", "robust", "ipo", "sigmoid_norm", "sft"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_preference_equals_trl_in_value_and_gradient(loss_type):
    for seed in range(4):
        tokens, *others = (*draw_tokens(seed), loss_type, 0.3, 0.1)
        expected, expected_rewards, expected_gradient = trl_loss(tokens, *others)
        loss, rewards = ours_as_trl(tokens, *others)
        gradient = jax.grad(lambda t, others=others: ours_as_trl(t, *others)[0])(tokens)
        np.testing.assert_allclose(loss, expected, rtol=1e-12, atol=1e-13)
        mask_2T = others[0]
        np.testing.assert_allclose(
            gradient, expected_gradient * mask_2T, rtol=1e-11, atol=1e-13
        )
        assert set(rewards) == set(expected_rewards)
        for name, value in expected_rewards.items():
            np.testing.assert_allclose(rewards[name], value, rtol=1e-12, err_msg=name)
