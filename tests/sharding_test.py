import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import presets
from mixcpt_jax.core import mesh_shape
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.runtime import sharding


def test_an_axis_of_minus_1_takes_the_remaining_devices():
    assert mesh_shape.mesh_shape({"data": 1, "fsdp": -1, "tensor": 2}, 8) == (1, 4, 2)
    assert mesh_shape.mesh_shape({"data": 2, "fsdp": 2, "tensor": 2}, 8) == (2, 2, 2)


@pytest.mark.parametrize(
    "sizes", [(-1, -1, 1), (0, 1, 8), (3, -1, 1), (2, 2, 1), (16, 1, 1)]
)
def test_impossible_meshes_are_refused(sizes):
    with pytest.raises(InputError, match="mesh: "):
        mesh_shape.mesh_shape(dict(zip(mesh_shape.MESH_AXES, sizes, strict=True)), 8)


@pytest.mark.parametrize(
    "topology", [part.topology for part in presets.SLICES.values()]
)
def test_chips_that_share_weights_are_neighbours_on_every_slice(topology):
    pytest.importorskip("libtpu")
    sizes = {"data": 4, "fsdp": -1, "tensor": 1}
    mesh = sharding.make_topology_mesh(topology, sizes)
    for group in mesh.devices:
        coordinates = np.array([(*d.coords, d.core_on_chip) for d in group.flat])
        box = np.ptp(coordinates, axis=0) + 1
        assert box.prod() == group.size


def test_each_slice_has_a_copy_of_the_weights_and_its_own_rows():
    sizes = {"slices": 2, "data": 4, "fsdp": 2, "tensor": 1}
    mesh = sharding.make_mesh(sizes)
    assert mesh.shape["slices"] == mesh.shape["data"] == 2
    assert sharding.sizes_of(mesh) == sizes
    numbers = [[device.id for device in part.flat] for part in mesh.devices]
    assert [sorted(part) for part in numbers] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    where = NamedSharding(mesh, sharding.spec(("hidden", "mlp")))
    for part in mesh.devices:
        held = where.devices_indices_map((8, 4))
        assert {held[device][0].start for device in part.flat} == {0, 4}
    rows = sharding.batch_sharding(mesh).devices_indices_map((8,))
    assert sorted(rows[device][0].start for device in mesh.devices.flat) == [*range(8)]


@pytest.mark.parametrize(
    ("sizes", "slices", "problem"),
    [
        ((6, 1, 1), 4, "mesh.slices=4 does not divide 6 devices"),
        ((1, 8, 1), 2, "mesh.data=1 does not divide over 2 slices"),
        ((2, 4, 1), 4, "mesh.data=2 does not divide over 4 slices"),
    ],
)
def test_slices_that_do_not_divide_are_refused(sizes, slices, problem):
    sizes = dict(zip(mesh_shape.MESH_AXES, sizes, strict=True))
    devices = jax.devices()[: np.prod([*sizes.values()])]
    with pytest.raises(InputError, match=problem):
        sharding.make_mesh(sizes | {"slices": slices}, devices)


def test_a_tpu_knows_its_slices():
    devices = [
        types.SimpleNamespace(slice_index=i // 4, platform="tpu") for i in range(8)
    ]
    sizes = {"data": 4, "fsdp": 2, "tensor": 1, "slices": 4}
    with pytest.raises(InputError, match="mesh.slices=4: the devices are of 2 slices"):
        sharding.make_mesh(sizes, devices)


def test_logical_axes_to_mesh_axes():
    split = ("fsdp", "expert")
    assert sharding.spec(("layers", "hidden", "mlp")) == P(None, split, "tensor")
    assert sharding.spec(("batch", None)) == P(("data", *split), None)
    assert sharding.spec(("experts", "expert_hidden")) == P("expert", "fsdp")


def test_the_experts_split_the_devices_of_fsdp():
    sizes = {"data": 1, "fsdp": -1, "tensor": 2, "expert": 2}
    mesh = sharding.make_mesh(sizes)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}
    assert sharding.sizes_of(mesh) == sizes | {"fsdp": 4}
    with pytest.raises(InputError, match="mesh.expert=3: must divide mesh.fsdp, 4"):
        sharding.make_mesh(sizes | {"expert": 3})


def test_constrain_needs_a_mesh_to_have_an_effect():
    x = jnp.ones((8, 4))
    assert sharding.constrain(x, "batch", None) is x
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 1})
    with jax.set_mesh(mesh):
        pinned = jax.jit(lambda x: sharding.constrain(x, "batch", None))(x)
    assert {shard.data.shape for shard in pinned.addressable_shards} == {(1, 4)}


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 4, 1), None])
def test_a_scattered_gradient_has_the_same_value_and_its_sharding(sizes):
    kernel, x = np.arange(32.0).reshape(8, 4), np.linspace(0, 1, 64).reshape(8, 8)

    def loss(kernel, x):
        return jnp.sum((x @ sharding.scatter_gradient(kernel, ("hidden", "mlp"))) ** 2)

    expected = jax.grad(lambda kernel, x: jnp.sum((x @ kernel) ** 2))(kernel, x)
    if sizes is None:
        actual = jax.jit(jax.grad(loss))(kernel, x)
    else:
        mesh = sharding.make_mesh(dict(zip(mesh_shape.MESH_AXES, sizes)))
        with jax.set_mesh(mesh):
            where = NamedSharding(mesh, sharding.spec(("hidden", "mlp")))
            rows = sharding.batch_sharding(mesh)
            arrays = jax.device_put(kernel, where), jax.device_put(x, rows)
            actual = jax.jit(jax.grad(loss))(*arrays)
        # On other meshes the compiler chooses the sharding.
        assert sizes != (1, 8, 1) or actual.sharding.is_equivalent_to(where, 2)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
