import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixcpt_jax import config as config_lib
from mixcpt_jax.objectives import interface
from mixcpt_jax.runtime import sharding
from mixcpt_jax.training import optimizer, steps


def schedule(num_steps=100, **settings):
    config = config_lib.default().optimizer
    config.learning_rate = 2.0
    config.update(settings)
    made = optimizer.make_schedule(config, num_steps)
    return np.array([made(step) for step in range(num_steps)])


def test_warm_up_is_linear_and_starts_above_zero():
    rates = schedule(warmup_steps=10, schedule="constant")
    np.testing.assert_allclose(np.diff(rates[:11]), np.diff(rates[:11])[0], rtol=1e-5)
    assert rates[0] > 0
    np.testing.assert_allclose(rates[10:], 2.0)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 37, 1000])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 1.0])
def test_a_share_of_warm_up_suits_a_phase_of_any_length(num_steps, share):
    rates = schedule(num_steps, warmup_share=share, schedule="constant")
    steps = min(int(share * num_steps + 0.5), num_steps - 1)
    np.testing.assert_allclose(rates[steps:], 2.0)
    assert (rates[:steps] < 2.0).all()
    same = schedule(num_steps, warmup_steps=steps, schedule="constant")
    np.testing.assert_array_equal(rates, same)


@given(st.data())
def test_the_peak_follows_the_warm_up_and_the_last_step_has_the_final_ratio(data):
    name = data.draw(st.sampled_from(["cosine", "wsd", "constant"]))
    num_steps = data.draw(st.integers(1, 500))
    warmup = data.draw(st.integers(0, num_steps - 1))
    # XLA takes numbers below the smallest normal one for 0.
    ratio = data.draw(st.floats(0, 1, width=32, allow_subnormal=False))
    config = config_lib.default().optimizer
    config.update(
        schedule=name,
        learning_rate=2.0,
        warmup_steps=warmup,
        final_ratio=ratio,
        decay_fraction=data.draw(st.floats(0, 1)),
    )
    made = optimizer.make_schedule(config, num_steps)
    # One shape for all lengths, so that nothing is compiled twice.
    rates = np.asarray(made(np.arange(500)))[:num_steps]
    if name != "constant":
        warmup = max(min(warmup, num_steps - 2), 0)
    ramp = 2.0 * np.arange(1, warmup + 1) / (warmup + 1)
    np.testing.assert_allclose(rates[:warmup], ramp, atol=1e-6)
    last = 2.0 if name == "constant" else np.float32(2.0) * np.float32(ratio)
    assert rates[-1] == last
    if num_steps > 1:
        assert rates[warmup] == 2.0
        assert rates[0] > 0
    assert np.all(np.diff(rates[warmup:]) <= 1e-6)


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_the_final_ratio_is_exact(name):
    """Also where the decay ends within rounding of it, as after 122 steps."""
    config = config_lib.default().optimizer
    config.update(schedule=name, final_ratio=0.0, decay_fraction=1.0, warmup_steps=0)
    for num_steps in (1, 2, 122):
        rates = optimizer.make_schedule(config, num_steps)(np.arange(500))
        assert not np.any(rates[num_steps - 1 :])


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_the_last_step_that_is_taken_has_the_final_ratio(name, parts):
    """With microbatches and over a resume: in the metric and in what moves."""
    num_steps = 12
    config = config_lib.default().optimizer
    config.update(schedule=name, learning_rate=0.5, warmup_steps=3, final_ratio=0.25)
    # A constant gradient of 1, whose clipped moments are 1: Adam moves by the rate.
    config.update(weight_decay=0.0, epsilon=0.0)
    objective = interface.Objective(
        lambda batch: (
            jnp.float32(batch["x"].size),
            interface.loss_count(jnp.ones((), bool)),
        ),
        lambda params, _, batch, scale: (params["w"] * batch["x"].sum() * scale, {}),
    )

    def run(state, first, last):
        transforms, rates = optimizer.make_optimizer(config, num_steps)
        step = steps.make_train_step(objective, transforms, rates, parts)
        step, moved = jax.jit(step), []
        for _ in range(first, last):
            before = state.params["w"]
            state, metrics = step(state, None, {"x": jnp.ones(4)})
            moved.append(float(before - state.params["w"]))
            reported = float(metrics["learning_rate"][0])
            np.testing.assert_allclose(moved[-1], reported, rtol=1e-4)
        return state, moved

    params = {"w": jnp.zeros(())}
    transforms, _ = optimizer.make_optimizer(config, num_steps)
    zero = jnp.zeros((), jnp.int32)
    state = steps.TrainState(zero, params, transforms.init(params))
    state, before = run(state, 0, 7)
    _, after = run(jax.tree.map(np.asarray, state), 7, num_steps)
    moved = np.array(before + after)
    assert moved[0] > 0
    np.testing.assert_allclose(moved[3], 0.5, rtol=1e-4)
    np.testing.assert_allclose(moved[-1], 0.125, rtol=1e-4)


def test_wsd_is_stable_before_it_decays():
    rates = schedule(schedule="wsd", warmup_steps=10, decay_fraction=0.3)
    np.testing.assert_allclose(rates[10:70], 2.0)
    assert np.all(np.diff(rates[71:]) < 0)


def test_norms_and_biases_are_not_decayed():
    params = {
        "embedding": jnp.ones((4, 2)),
        "layers": {
            "attention_norm": jnp.ones((3, 2)),
            "query": jnp.ones((3, 2, 2)),
            "query_bias": jnp.ones((3, 2)),
        },
        "final_norm": jnp.ones(2),
    }
    config = config_lib.default().optimizer
    config.learning_rate, config.weight_decay = 0.1, 0.5
    transforms, _ = optimizer.make_optimizer(config, 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = transforms.update(zeros, transforms.init(params), params)
    moved = jax.tree.map(lambda u: bool(jnp.any(u != 0)), updates)
    assert moved == {
        "embedding": True,
        "layers": {"attention_norm": False, "query": True, "query_bias": False},
        "final_norm": False,
    }


def test_moments_lie_where_their_parameters_lie():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    axes = {"embedding": ("vocab", "hidden"), "final_norm": (None,)}
    where = sharding.shardings(mesh, axes)
    params = {
        "embedding": jax.ShapeDtypeStruct((8, 4), jnp.float32),
        "final_norm": jax.ShapeDtypeStruct((4,), jnp.float32),
    }
    transforms, _ = optimizer.make_optimizer(config_lib.default().optimizer, 10)
    states = optimizer.state_shardings(
        transforms, params, where, sharding.replicated(mesh)
    )
    shapes = jax.eval_shape(transforms.init, params)
    pairs = list(zip(jax.tree.leaves(shapes), jax.tree.leaves(states), strict=True))
    for leaf, place in pairs:
        if leaf.shape == (8, 4):
            assert place == where["embedding"]
    assert sum(leaf.shape == (8, 4) for leaf, _ in pairs) == 2


NAN, INF = float("nan"), float("inf")


def guarded(spike_factor=0.0):
    config = config_lib.default().optimizer
    config.learning_rate, config.warmup_steps = 0.1, 5
    transforms, _ = optimizer.make_optimizer(config, 100)
    return transforms, optimizer.skip_bad_steps(transforms, spike_factor)


def walk(transforms, norms):
    """Parameters and optimizer state after each step whose gradient has that norm."""
    params = {"kernel": jnp.array([[-0.0, 0.0], [1.0, -2.0]]), "norm": jnp.ones(2)}
    state = transforms.init(params)
    update, apply = jax.jit(transforms.update), jax.jit(optax.apply_updates)
    ones = jax.tree.map(jnp.ones_like, params)
    for norm in norms:
        grads = optax.tree.scale(norm / 6**0.5, ones)
        updates, state = update(grads, state, params)
        params = apply(params, updates)
        yield params, state


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_bad_steps_leave_no_trace_but_their_count():
    plain, guard = guarded()
    good = [1.0, 0.5, 2.0, 3.0, 1.5]
    norms = [NAN, 1.0, INF, -INF, 0.5, 2.0, NAN, NAN, NAN, 3.0, 1.5]
    *_, (expected, state) = walk(plain, good)
    *_, (params, guard_state) = walk(guard, norms)
    assert bits(params) == bits(expected)
    assert bits(guard_state.inner) == bits(state)
    counts = [
        (int(s.skipped), int(s.in_a_row), int(s.longest)) for _, s in walk(guard, norms)
    ]
    assert counts == [
        (1, 1, 1), (1, 0, 1), (2, 1, 1), (3, 2, 2), (3, 0, 2), (3, 0, 2), (4, 1, 2),
        (5, 2, 2), (6, 3, 3), (6, 0, 3), (6, 0, 3),
    ]  # fmt: skip
    # The first step is a bad one: not even the sign of a zero moves.
    (first, _), *_ = walk(guard, norms)
    assert np.signbit(first["kernel"][0]).tolist() == [True, False]


def test_spikes_are_measured_by_the_mean_of_the_norms_before_them():
    _, guard = guarded(spike_factor=3.0)
    steady = [1.0, 2.0] * 15
    skipped = [int(s.skipped) for _, s in walk(guard, [*steady, 4.0, 5.0, 100.0, 4.0])]
    # The mean is 1.5 and a little: 4 is below three times that, 5 is not.
    assert skipped == [0] * 31 + [1, 2, 2]
    # Early on nothing is known, and what is skipped does not move the mean.
    _, state = list(walk(guard, [1.0, 100.0, NAN]))[-1]
    assert int(state.skipped) == 1
    _, state = list(walk(guard, [*steady, *[100.0] * 300]))[-1]
    assert int(state.longest) == 300


def test_without_a_factor_no_norm_is_a_spike():
    *_, (_, state) = walk(guarded()[1], [1.0] * 30 + [1e6])
    assert int(state.skipped) == 0


def test_the_moments_under_a_guard_lie_where_their_parameters_lie():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    where = sharding.shardings(mesh, {"embedding": ("vocab", "hidden")})
    params = {"embedding": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
    _, guard = guarded()
    states = optimizer.state_shardings(guard, params, where, sharding.replicated(mesh))
    shapes = jax.eval_shape(guard.init, params)
    for leaf, place in zip(
        jax.tree.leaves(shapes), jax.tree.leaves(states), strict=True
    ):
        moments = leaf.shape == (8, 4)
        assert place == (where["embedding"] if moments else sharding.replicated(mesh))


def test_bfloat16_is_rounded_by_chance_and_right_on_average():
    values = jnp.asarray(
        [1.0, 1.001, -3.7e-5, 0.0, 1e30, jnp.inf, jnp.nan], jnp.float32
    )
    repeated = jnp.broadcast_to(values[:, None], (len(values), 40_000))
    rounded = optimizer.round_stochastically(repeated, jax.random.key(0))
    assert rounded.dtype == jnp.bfloat16
    nearest = values.astype(jnp.bfloat16).astype(jnp.float32)
    rows = np.asarray(rounded, np.float64)
    for row, value, near in zip(rows, np.asarray(values), np.asarray(nearest)):
        seen = np.unique(row)
        if not np.isfinite(value) or value == near:
            np.testing.assert_array_equal(seen, near[None])
            continue
        # The two neighbours, which are 2^-8 of the value apart at most.
        assert len(seen) == 2
        assert seen[0] < value < seen[1]
        deviation = (seen[1] - seen[0]) / 2 / np.sqrt(len(row))
        assert abs(row.mean() - value) < 5 * deviation


def test_small_updates_are_not_lost_in_bfloat16():
    """A thousand updates of 1/1000 of what bfloat16 can tell apart near 1 add up."""
    params = {"w": jnp.ones((256,), jnp.bfloat16)}
    updates = {"w": jnp.full((256,), 2.0**-7 / 1000)}
    moved = params
    for step in range(1000):
        moved = jax.jit(optimizer.apply_updates)(moved, updates, step)
    drift = np.asarray(moved["w"], np.float64).mean() - 1
    # Each is 0 or 2^-7; the sum's deviation is at most that of a fair coin's.
    assert abs(drift - 2.0**-7) < 5 * 2.0**-7 / np.sqrt(256)
    assert optax.apply_updates(params, updates)["w"].max() == 1


@pytest.mark.parametrize(
    ("param_dtype", "moments_dtype"),
    [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")],
)
def test_training_in_bfloat16_learns_like_float32(param_dtype, moments_dtype):
    """Steps of 1e-4 at parameters near 1, of which rounding to nearest loses every one."""
    config = config_lib.default().optimizer
    config.learning_rate, config.schedule, config.weight_decay = 1e-4, "constant", 0.0
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.standard_normal((64, 16)), jnp.float32)
    kernel = 1 + 0.1 * rng.standard_normal((16, 4))
    targets = inputs @ jnp.asarray(kernel, jnp.float32)

    def train(param_dtype, moments_dtype):
        config.moments_dtype = moments_dtype
        transforms, _ = optimizer.make_optimizer(config, 1000, param_dtype)
        params = {"w": jnp.ones((16, 4), param_dtype)}
        state = transforms.init(params)

        def loss(params):
            return jnp.mean((inputs @ params["w"].astype(jnp.float32) - targets) ** 2)

        @jax.jit
        def step(params, state, number):
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = transforms.update(grads, state, params)
            return optimizer.apply_updates(params, updates, number), state, value

        for number in range(1000):
            params, state, value = step(params, state, number)
        return params, state, float(value)

    start = float(jnp.mean((inputs @ jnp.ones((16, 4)) - targets) ** 2))

    params, state, value = train(param_dtype, moments_dtype)
    assert params["w"].dtype == param_dtype
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert {str(x.dtype) for x in moments} == {moments_dtype}
    _, _, reference = train("float32", "float32")
    assert reference < start / 3
    # bfloat16 tells 16 parameters near 1 apart to 2^-7 each.
    assert value <= reference + 16 * (2.0**-7) ** 2
    naive = {"w": jnp.ones((16, 4), jnp.bfloat16)}
    assert optax.apply_updates(naive, {"w": jnp.full((16, 4), 1e-4)})["w"].max() == 1
