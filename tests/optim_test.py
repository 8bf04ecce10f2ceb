import jax
import jax.numpy as jnp
import numpy as np
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
