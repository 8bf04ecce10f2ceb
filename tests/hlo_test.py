"""Reading compiled modules, against programs of known FLOPs and traffic."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mixcpt_jax.models import transformer
from mixcpt_jax.planning import hlo
from mixcpt_jax.runtime import sharding

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
    ),
    pytest.mark.usefixtures("compiled_anew"),
]


REPLICATED = P()


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_topology_mesh("v5e:2x2", {"data": 1, "fsdp": 4, "tensor": 1})


def compile_on(mesh, function, *shapes, spec=REPLICATED):
    operands = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape in shapes
    ]
    with jax.set_mesh(mesh):
        return hlo.Module(jax.jit(function).lower(*operands).compile().as_text())


def test_loops_count_in_full(mesh):
    def repeated(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=7)[0]

    module = compile_on(mesh, repeated, (256, 512), (512, 512))
    assert module.flops == 7 * 2 * 256 * 512 * 512
    once = compile_on(mesh, lambda x, w: jnp.tanh(x @ w), (256, 512), (512, 512))
    assert once.flops == 2 * 256 * 512 * 512
    assert 5 * once.cycles < module.cycles < 9 * once.cycles


@pytest.mark.parametrize("shares", [(1.0, 1.0), (0.25, 0.75)])
def test_branches_count_by_their_shares(mesh, shares):
    def mixed(x, w):
        def once(x):
            return jnp.tanh(x @ w)

        def step(x, is_twice):
            return jax.lax.cond(is_twice, lambda x: once(once(x)), once, x), None

        return jax.lax.scan(step, x, jnp.array([True, True, False, True]))[0]

    operands = [
        jax.ShapeDtypeStruct(
            shape, jnp.bfloat16, sharding=NamedSharding(mesh, REPLICATED)
        )
        for shape in ((256, 512), (512, 512))
    ]
    text = jax.jit(mixed).lower(*operands).compile().as_text()
    expected = 4 * (shares[0] + 2 * shares[1]) * 2 * 256 * 512 * 512
    assert hlo.Module(text, shares).flops == expected


@pytest.mark.parametrize(
    ("equation", "shapes", "flops"),
    [
        ("ab,bc->ac", ((256, 384), (384, 128)), 2 * 256 * 384 * 128),
        ("nab,nbc->nac", ((8, 256, 384), (8, 384, 128)), 8 * 2 * 256 * 384 * 128),
        ("nab,nac->bc", ((4, 256, 384), (4, 256, 128)), 4 * 2 * 256 * 384 * 128),
        ("anb,cnb->nca", ((64, 4, 128), (32, 4, 128)), 4 * 2 * 64 * 128 * 32),
    ],
)
def test_every_product_is_two_flops_per_multiply_add(mesh, equation, shapes, flops):
    module = compile_on(mesh, lambda a, b: jnp.einsum(equation, a, b), *shapes)
    assert module.flops == flops


def test_the_roofline_is_the_longer_of_flops_and_traffic(mesh):
    module = compile_on(mesh, jnp.matmul, (2048, 2048), (2048, 2048))
    flops, traffic = 2 * 2048**3, 3 * 2 * 2048**2
    assert module.roofline_seconds(flops, 1e30) == pytest.approx(1.0)
    assert module.roofline_seconds(1e30, traffic) == pytest.approx(1.0, rel=0.01)


def test_collectives_are_listed_with_their_bytes(mesh):
    @jax.shard_map(mesh=mesh, in_specs=P("fsdp"), out_specs=P(), check_vma=False)
    def gather(x):
        return jax.lax.all_gather(x, "fsdp", tiled=True)

    module = compile_on(mesh, gather, (1024, 256), spec=P("fsdp"))
    (collective,) = module.collectives
    assert collective.kind == "all-gather"
    assert collective.num_bytes == 1024 * 256 * 2
    assert collective.times == 1
    assert sorted(collective.group) == [0, 1, 2, 3]
    # Three quarters of it come from the other chips.
    assert collective.received(4) == 3 / 4 * 1024 * 256 * 2


def test_a_reduce_scatter_is_not_an_all_reduce(mesh):
    """The TPU compiler writes a reduce-scatter as a fusion of an all-reduce and a slice."""

    def summed(kind):
        @jax.shard_map(
            mesh=mesh,
            in_specs=P(),
            out_specs=P("fsdp") if kind == "reduce-scatter" else P(),
            check_vma=False,
        )
        def run(x):
            if kind == "reduce-scatter":
                return jax.lax.psum_scatter(x, "fsdp", tiled=True)
            return jax.lax.psum(x, "fsdp")

        return max(
            compile_on(mesh, run, (2048, 256)).collectives, key=lambda c: c.num_bytes
        )

    scattered, reduced = summed("reduce-scatter"), summed("all-reduce")
    size = 2048 * 256 * 2
    assert scattered.kind == "reduce-scatter"
    assert reduced.kind == "all-reduce"
    assert reduced.received(4) == 2 * 3 / 4 * size
    # Half of that, and a few rows more where a part does not end with a tile.
    assert 3 / 4 * size <= scattered.received(4) <= 0.85 * size


@pytest.mark.parametrize(
    ("notation", "group"),
    [
        ("{{0,2},{1,3}}", (0, 2)),
        ("mesh['a'=2,'b'=2] {'a'}", (0, 2)),
        ("mesh['a'=2,'b'=2] {'a','b'}", (0, 1, 2, 3)),
        ("[2,2]<=[4]", (0, 1)),
        ("[2,2]<=[2,2]T(1,0)", (0, 2)),
    ],
)
def test_groups_of_devices_have_three_notations(notation, group):
    text = f"""
ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {{
  %x = bf16[8,128]{{1,0}} parameter(0)
  ROOT %sum = bf16[8,128]{{1,0}} all-reduce(%x), replica_groups={notation}, to_apply=%add
}}
"""
    (collective,) = hlo.Module(text).collectives
    assert collective.group == group
    assert not collective.is_async


def test_unknown_trip_counts_are_refused(mesh):
    def until_small(x):
        return jax.lax.while_loop(lambda x: jnp.any(x > 1), lambda x: x @ x, x)

    module = compile_on(mesh, until_small, (128, 128))
    with pytest.raises(ValueError, match="trip count is not a constant"):
        _ = module.flops


def counted_loop(start: str, limit: int, step: int) -> hlo.Module:
    return hlo.Module(
        f"""
%condition (c: (f32[8,128], s32[])) -> pred[] {{
  %c = (f32[8,128]{{1,0}}, s32[]) parameter(0)
  %counter = s32[] get-tuple-element(%c), index=1
  %limit = s32[] constant({limit})
  ROOT %more = pred[] compare(%counter, %limit), direction=LT
}}

%body (b: (f32[8,128], s32[])) -> (f32[8,128], s32[]) {{
  %b = (f32[8,128]{{1,0}}, s32[]) parameter(0)
  %x = f32[8,128]{{1,0}} get-tuple-element(%b), index=0
  %i = s32[] get-tuple-element(%b), index=1
  %step = s32[] constant({step})
  %next = s32[] add(%i, %step)
  %inside = f32[8,128]{{1,0}} negate(%x)
  ROOT %t = (f32[8,128]{{1,0}}, s32[]) tuple(%inside, %next)
}}

ENTRY %main (p: f32[8,128]) -> (f32[8,128], s32[]) {{
  %p = f32[8,128]{{1,0}} parameter(0)
  %start = s32[] {start}
  %copied = s32[] copy(%start)
  %given = (f32[8,128]{{1,0}}, s32[]) tuple(%p, %copied)
  ROOT %loop = (f32[8,128]{{1,0}}, s32[]) while(%given), condition=%condition, body=%body
}}
"""
    )


@pytest.mark.parametrize("start", [0, 1, 3, 7])
@pytest.mark.parametrize("step", [1, 2, 4])
def test_loops_run_from_their_start_to_their_limit(start, step):
    """The compiler may peel the first iterations of a loop, and unroll it."""
    module = counted_loop(f"constant({start})", 7, step)
    assert module.executions("inside") == len(range(start, 7, step))


def test_a_loop_that_starts_at_an_unknown_number_is_refused():
    module = counted_loop("parameter(1)", 7, 1)
    with pytest.raises(ValueError, match="trip count is not a constant"):
        module.executions("inside")


def test_a_transfer_to_the_other_slices_is_a_collective():
    module = hlo.Module(
        """
ENTRY %main (p: f32[4,8,128]) -> token[] {
  %p = f32[4,8,128]{2,1,0} parameter(0)
  %after = token[] after-all()
  %host = (f32[4,8,128]{2,1,0}, u32[], token[]) send(%p, %after), is_host_transfer=true
  %send = (f32[4,8,128]{2,1,0}, u32[], token[]) send(%p, %after), is_host_transfer=true, \
frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""
    )
    (collective,) = module.between_slices
    assert collective.kind == "all-reduce"
    size = 4 * 4 * 8 * 128
    assert collective.num_bytes == size
    assert collective.received(num_devices=4) == 2 * 3 / 4 * size
    assert module.collectives == []


def test_a_slice_that_a_nested_fusion_reads_is_not_the_whole():
    module = hlo.Module(
        """
%inner (a: f32[32,8,128], i: s32[]) -> f32[8,128] {
  %a = f32[32,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %c = s32[] constant(0)
  %part = f32[1,8,128]{2,1,0} dynamic-slice(%a, %i, %c, %c), dynamic_slice_sizes={1,8,128}
  ROOT %b = f32[8,128]{1,0} bitcast(%part)
}

%outer (x: f32[32,8,128], j: s32[]) -> f32[8,128] {
  %x = f32[32,8,128]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  ROOT %f = f32[8,128]{1,0} fusion(%x, %j), kind=kLoop, calls=%inner
}

ENTRY %main (p: f32[32,8,128], k: s32[]) -> f32[8,128] {
  %p = f32[32,8,128]{2,1,0} parameter(0)
  %k = s32[] parameter(1)
  ROOT %g = f32[8,128]{1,0} fusion(%p, %k), kind=kLoop, calls=%outer
}
"""
    )
    # Reads and writes one slice, and reads the index.
    read_and_written = 2 * 4 * 8 * 128 + 4
    assert module.roofline_seconds(1, 1) == read_and_written


HOST_STEP = """
%condition (c: (s32[], bf16[6,256,1024])) -> pred[] {{
  %c = (s32[], bf16[6,256,1024]{{2,1,0:S(5)}}) parameter(0)
  %counter = s32[] get-tuple-element(%c), index=0
  %limit = s32[] constant(6)
  ROOT %more = pred[] compare(%counter, %limit), direction=LT
}}

%body (b: (s32[], bf16[6,256,1024])) -> (s32[], bf16[6,256,1024]) {{
  %b = (s32[], bf16[6,256,1024]{{2,1,0:S(5)}}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %host = bf16[6,256,1024]{{2,1,0:T(8,128)(2,1)S(5)}} get-tuple-element(%b), index=1
  %one = s32[] constant(1)
  %zero = s32[] constant(0)
  %next = s32[] add(%i, %one)
  %x = bf16[1,256,1024]{{2,1,0:S(1)}} broadcast(%zero), dimensions={{}}
  %to = ((bf16[6,256,1024]{{2,1,0:S(5)}}, bf16[1,256,1024]{{2,1,0:S(1)}}, s32[], s32[], \
s32[]), bf16[6,256,1024]{{2,1,0:S(5)}}, u32[]{{:S(2)}}) \
dynamic-update-slice-start(%host, %x, %i, %zero, %zero)
  {between}
  %full = bf16[6,256,1024]{{2,1,0:S(5)}} dynamic-update-slice-done(%to)
  %from = ((bf16[6,256,1024]{{2,1,0:S(5)}}, s32[], s32[], s32[]), \
bf16[1,256,1024]{{2,1,0}}, u32[]{{:S(2)}}) dynamic-slice-start(%full, %i, %zero, %zero), \
dynamic_slice_sizes={{1,256,1024}}
  %y = bf16[1,256,1024]{{2,1,0}} dynamic-slice-done(%from)
  ROOT %t = (s32[], bf16[6,256,1024]{{2,1,0:S(5)}}) tuple(%next, %full)
}}

ENTRY %main () -> (s32[], bf16[6,256,1024]) {{
  %start = s32[] constant(0)
  %buffer = bf16[6,256,1024]{{2,1,0:S(5)}} custom-call(), \
custom_call_target="AllocateBuffer"
  %given = (s32[], bf16[6,256,1024]{{2,1,0:S(5)}}) tuple(%start, %buffer)
  ROOT %loop = (s32[], bf16[6,256,1024]{{2,1,0:S(5)}}) while(%given), \
condition=%condition, body=%body
}}
"""
SLICE = 2 * 256 * 1024


@pytest.mark.parametrize(
    ("rows", "waited"), [(0, 2.0), (128, 1.5), (256, 1.0), (2048, 1.0)]
)
def test_work_hides_transfers_to_the_memory_of_the_host(rows, waited):
    """Of the two transfers of an iteration, only the first has work beside it."""
    work = f"%work = bf16[{rows},1024]{{1,0}} broadcast(%zero), dimensions={{}}"
    module = hlo.Module(HOST_STEP.format(between=work if rows else ""))
    assert module.host_bytes == 6 * 2 * SLICE
    # The same bandwidth for both memories; the counter takes 12 bytes.
    seconds = module.host_seconds(1e30, SLICE, SLICE)
    assert seconds == pytest.approx(6 * waited, abs=1e-3)
    # In HBM, one slice is written, and what hides the transfers.
    traffic = module.roofline_seconds(1e30, 1)
    assert traffic == pytest.approx(6 * (SLICE + 2 * rows * 1024), abs=6 * 64)


def test_a_copy_to_the_host_that_nothing_overlaps_is_waited_for():
    module = hlo.Module(
        """
ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  %sent = f32[8,128]{1,0:S(5)} copy(%p)
  ROOT %back = f32[8,128]{1,0} copy(%sent)
}
"""
    )
    assert module.host_bytes == 2 * 4 * 8 * 128
    assert module.host_seconds(1, 1, 4 * 8 * 128) == 2.0
    assert module.roofline_seconds(1, 1) == 2 * 4 * 8 * 128


def test_the_inputs_of_layers_go_to_the_host_and_back(mesh):
    def layer(x, w):
        x = checkpoint_name(x, "layer_input")
        return jnp.tanh(jnp.tanh(x @ w) @ w), None

    def loss(x, w):
        policy = transformer.REMAT_POLICIES["offload"]
        run = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        return jnp.sum(jax.lax.scan(run, x, w)[0].astype(jnp.float32))

    gradient = jax.grad(loss, argnums=1)
    module = compile_on(mesh, gradient, (256, 1024), (6, 1024, 1024))
    assert module.host_bytes == 2 * 6 * SLICE
