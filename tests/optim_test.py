import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mixcpt_jax import config as config_lib
from mixcpt_jax import optim, sharding


def schedule(num_steps=100, **settings):
    config = config_lib.default().optimizer
    config.learning_rate = 2.0
    config.update(settings)
    made = optim.make_schedule(config, num_steps)
    return np.array([made(step) for step in range(num_steps)])


def test_warm_up_is_linear_and_starts_above_zero():
    rates = schedule(warmup_steps=10, schedule="constant")
    np.testing.assert_allclose(np.diff(rates[:11]), np.diff(rates[:11])[0], rtol=1e-5)
    assert rates[0] > 0
    np.testing.assert_allclose(rates[10:], 2.0)


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_decay_ends_at_the_final_ratio(name):
    rates = schedule(schedule=name, warmup_steps=10, final_ratio=0.1)
    assert rates.max() == pytest.approx(2.0)
    # The last step is one short of the end of the decay.
    assert 0.2 <= rates[-1] <= 0.2 + 1.8 / 20 + 1e-6
    assert np.all(np.diff(rates[11:]) <= 1e-6)


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
    transforms, _ = optim.make_optimizer(config, 10)
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
    transforms, _ = optim.make_optimizer(config_lib.default().optimizer, 10)
    states = optim.state_shardings(transforms, params, where, sharding.replicated(mesh))
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
    transforms, _ = optim.make_optimizer(config, 100)
    return transforms, optim.skip_bad_steps(transforms, spike_factor)


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
    states = optim.state_shardings(guard, params, where, sharding.replicated(mesh))
    shapes = jax.eval_shape(guard.init, params)
    for leaf, place in zip(
        jax.tree.leaves(shapes), jax.tree.leaves(states), strict=True
    ):
        moments = leaf.shape == (8, 4)
        assert place == (where["embedding"] if moments else sharding.replicated(mesh))
