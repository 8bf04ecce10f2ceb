import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from mixcpt_jax import checkpoint, sharding
from mixcpt_jax.errors import InputError
from mixcpt_jax.steps import TrainState

SOURCES = {"domain": "00ff"}
PROVENANCE = {"start": {"weights": "somewhere"}, "files": {}}


def make_state(step, mesh_sizes=(1, 8, 1)):
    mesh = sharding.make_mesh(dict(zip(sharding.MESH_AXES, mesh_sizes, strict=True)))
    where = sharding.shardings(mesh, {"kernel": ("hidden", "mlp"), "norm": (None,)})
    params = jax.device_put(
        {"kernel": jnp.arange(64.0).reshape(8, 8) + step, "norm": jnp.ones(8)}, where
    )
    moments = optax.adam(1e-3).init(params)
    return TrainState(jnp.array(step), params, moments)


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def save(folder, steps, **options):
    with checkpoint.Checkpoints(epath.Path(folder), **options) as checkpoints:
        for step in steps:
            checkpoints.save(
                make_state(step),
                step,
                8 * step,
                {"seed": 0},
                SOURCES,
                PROVENANCE,
                loss=abs(step - 3.0),
            )


def restore(folder, template, sources=SOURCES, provenance=PROVENANCE):
    with checkpoint.Checkpoints(epath.Path(folder)) as checkpoints:
        return checkpoints.restore(abstract(template), sources, provenance)


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    save(tmp_path, [1, 2])
    with checkpoint.Checkpoints(epath.Path(tmp_path)) as checkpoints:
        assert (checkpoints.latest_step(), checkpoints.latest_rows()) == (2, 16)
    state = make_state(2)
    restored = restore(tmp_path, state)
    assert_equal(restored, state)
    assert restored.params["kernel"].sharding == state.params["kernel"].sharding


def test_another_mesh_reads_the_same_numbers(tmp_path):
    save(tmp_path, [2])
    other = make_state(2, mesh_sizes=(2, 2, 2))
    restored = restore(tmp_path, other)
    assert_equal(restored, other)
    assert restored.params["kernel"].sharding == other.params["kernel"].sharding


def test_the_last_and_the_best_are_kept(tmp_path):
    save(tmp_path, range(1, 8), keep_last=2, keep_best=1)
    kept = {int(path.name) for path in (tmp_path / checkpoint.FOLDER).iterdir()}
    assert kept == {3, 6, 7}


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    save(tmp_path, [1])
    folder = tmp_path / checkpoint.FOLDER
    (folder / "2.orbax-checkpoint-tmp").mkdir()
    (folder / "2.orbax-checkpoint-tmp" / "junk").write_text("half")
    with checkpoint.Checkpoints(epath.Path(tmp_path)) as checkpoints:
        assert checkpoints.latest_step() == 1


def test_changed_sources_are_named(tmp_path):
    save(tmp_path, [1])
    with pytest.raises(InputError, match="sources.domain: holds other text"):
        restore(tmp_path, make_state(1), {"domain": "1234"})
    with pytest.raises(InputError, match="sources.general: holds other text"):
        restore(tmp_path, make_state(1), SOURCES | {"general": "1234"})


def test_another_start_is_named(tmp_path):
    save(tmp_path, [1])
    other = {"start": {"init_from": "elsewhere", "step": 3, "id": "ab"}}
    with pytest.raises(InputError, match="trained from .*somewhere.*elsewhere"):
        restore(tmp_path, make_state(1), provenance=other)


def test_another_dtype_is_not_cast_in_silence(tmp_path):
    save(tmp_path, [1])
    state = make_state(1)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)
    with pytest.raises(InputError, match=r"\['kernel'\] is .*float32.*bfloat16"):
        restore(tmp_path, state._replace(params=half))


def test_no_two_saves_have_one_identity(tmp_path):
    save(tmp_path / "a", [1, 2])
    save(tmp_path / "b", [2])
    a, b = (checkpoint.identity(str(tmp_path / name)) for name in "ab")
    assert a["step"] == b["step"] == 2
    assert a["id"] != b["id"]
    assert checkpoint.read_config(str(tmp_path / "a")) == {"seed": 0}


def test_hand_over_reads_parameters_alone(tmp_path):
    save(tmp_path, [4, 5])
    params = make_state(5).params
    for folder in (tmp_path, tmp_path / checkpoint.FOLDER):
        loaded = checkpoint.load_params(str(folder), abstract(params))
        assert_equal(loaded, params)


def test_hand_over_names_what_does_not_fit(tmp_path):
    save(tmp_path, [1])
    template = abstract(make_state(1).params)
    wrong = template | {"kernel": jax.ShapeDtypeStruct((8, 9), jnp.float32)}
    with pytest.raises(
        InputError, match=r"\['kernel'\] is \(8, 8\) there and \(8, 9\)"
    ):
        checkpoint.load_params(str(tmp_path), wrong)
    extra = template | {"bias": jax.ShapeDtypeStruct((8,), jnp.float32)}
    with pytest.raises(InputError, match=r"\['bias'\] is absent there"):
        checkpoint.load_params(str(tmp_path), extra)


def test_hand_over_from_nothing(tmp_path):
    with pytest.raises(InputError, match="has no folder"):
        checkpoint.load_params(str(tmp_path / "none"), {})
    (tmp_path / checkpoint.FOLDER).mkdir()
    with pytest.raises(InputError, match="no whole checkpoint"):
        checkpoint.load_params(str(tmp_path), {})
