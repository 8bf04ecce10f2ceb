"""Properties of the network; parity with other implementations is in weights_test."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from mixcpt_jax.core import mesh_shape
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.models import lora as lora_lib
from mixcpt_jax.models import transformer
from mixcpt_jax.runtime import sharding

CONFIG = transformer.ModelConfig(
    family="llama",
    vocab_size=50,
    hidden_size=24,
    mlp_size=40,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_size=4,
    max_positions=64,
    rope_theta=1e4,
)
LORA = lora_lib.Lora(rank=3, alpha=6.0, targets=lora_lib.LORA_TARGETS)
BIASED = dataclasses.replace(CONFIG, family="qwen2", qkv_bias=True)
WINDOWED = dataclasses.replace(CONFIG, family="mistral", sliding_window=4)
# All that is in Gemma 2 and 3, at once.
GEMMA = dataclasses.replace(
    WINDOWED,
    family="gemma3_text",
    global_layers=(1,),
    local_rope_theta=100.0,
    qk_norm=True,
    post_norms=True,
    activation="gelu_tanh",
    scale_embeddings=True,
    query_scale=6,
    attention_soft_cap=2.0,
    tie_embeddings=True,
)
# What other families add, at once.
OTHERS = dataclasses.replace(
    GEMMA,
    family="smollm3",
    nope_layers=(0,),
    rope_fraction=0.5,
    rope_scaling=transformer.YarnRopeScaling(4.0, 8, 1.2, 4.0, 0.5),
    query_growth=0.5,
    qk_norm_over_heads=True,
    pre_norms=False,
    embedding_multiplier=6.0,
    residual_multiplier=0.4,
    logits_scaling=0.7,
)


def run(tokens, config=CONFIG, positions=None, segment_ids=None, **options):
    params = transformer.init_params(config, jax.random.key(0))
    # Attention differs little between random tokens unless the weights are large.
    params["layers"] |= {k: 20 * params["layers"][k] for k in ("query", "key")}
    tokens = jnp.atleast_2d(tokens)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if segment_ids is None:
        segment_ids = jnp.ones(tokens.shape, jnp.int32)
    forward = jax.jit(transformer.make_forward(config, **options))
    return np.asarray(forward(params, tokens, positions, segment_ids), np.float32)


def draw(length, seed=0):
    return jax.random.randint(jax.random.key(seed), (length,), 0, 50)


def test_later_tokens_do_not_change_earlier_ones():
    tokens = draw(20)
    changed = tokens.at[13].add(1)
    before, after = run(tokens)[0], run(changed)[0]
    np.testing.assert_array_equal(before[:13], after[:13])
    assert np.all(np.abs(before[13:] - after[13:]).max(-1) > 1e-4)


@pytest.mark.parametrize("config", [CONFIG, GEMMA], ids=["llama", "gemma"])
def test_documents_of_a_row_do_not_see_each_other(config):
    tokens, segments = draw(20), jnp.array([[1] * 8 + [2] * 7 + [0] * 5])
    changed = tokens.at[2].add(1)
    before = run(tokens, config, segment_ids=segments)[0]
    after = run(changed, config, segment_ids=segments)[0]
    np.testing.assert_array_equal(before[8:], after[8:])
    assert np.abs(before[7] - after[7]).max() > 1e-4


def test_positions_count_only_relative_to_each_other():
    tokens = draw(12)
    shifted = run(tokens, positions=jnp.arange(12)[None] + 30)
    np.testing.assert_allclose(run(tokens), shifted, atol=2e-4)


def test_the_window_bounds_how_far_back_a_layer_reaches():
    config = dataclasses.replace(CONFIG, sliding_window=3, num_layers=1)
    tokens = draw(12)
    before, after = run(tokens, config)[0], run(tokens.at[4].add(1), config)[0]
    moved = np.abs(before - after).max(-1) > 1e-5
    np.testing.assert_array_equal(np.flatnonzero(moved), [4, 5, 6])


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones():
    scaling = transformer.Llama3RopeScaling(8.0, 1.0, 4.0, 512)
    config = dataclasses.replace(CONFIG, head_size=64, rope_theta=5e5)
    plain = transformer.rope_frequencies(config)
    scaled = transformer.rope_frequencies(
        dataclasses.replace(config, rope_scaling=scaling)
    )
    waves = 2 * np.pi / np.asarray(plain)
    ratio = np.asarray(plain / scaled)
    np.testing.assert_allclose(ratio[waves < 512 / 4], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[waves > 512], 8.0, rtol=1e-6)
    between = ratio[(waves > 512 / 4) & (waves < 512)]
    assert np.all((between > 1) & (between < 8))


def test_compute_dtype_is_apart_from_parameter_dtype():
    exact, rounded = run(draw(16)), run(draw(16), dtype=jnp.bfloat16)
    np.testing.assert_allclose(rounded, exact, atol=0.1)
    assert np.any(rounded != exact)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_shapes_axes_and_parameters_agree(tied, bias):
    settings = {"qkv_bias": bias, "qk_norm": tied, "post_norms": bias}
    settings |= {"qk_norm_over_heads": bias, "pre_norms": not tied}
    config = dataclasses.replace(CONFIG, tie_embeddings=tied, **settings)
    params = transformer.init_params(config, jax.random.key(0), jnp.bfloat16)
    abstract = transformer.abstract_params(config, jnp.bfloat16)
    axes = transformer.param_axes(config)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract
    )
    ranks = jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple))
    assert ranks == jax.tree.map(lambda x: x.ndim, params)
    assert transformer.logits(params, jnp.ones((3, 24))).shape == (3, 50)


def adapted(config=CONFIG, lora=LORA):
    """Parameters and adapters that all show in the result."""
    params = transformer.init_params(config, jax.random.key(0))
    adapters = lora_lib.init_adapters(config, lora, jax.random.key(1))
    leaves, structure = jax.tree.flatten((params, adapters))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return jax.tree.unflatten(
        structure,
        [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)],
    )


def inputs(rows=2, length=9):
    tokens = jax.random.randint(jax.random.key(3), (rows, length), 0, 50)
    return tokens, jnp.broadcast_to(jnp.arange(length), tokens.shape), tokens * 0


def adapter_loss(config, lora, remat="none"):
    """Of (adapters, params): a weighted sum of the hidden states."""
    forward = transformer.make_forward(config, remat=remat, lora=lora)
    weights = jax.random.normal(jax.random.key(4), (2, 9, config.hidden_size))

    def loss(adapters, params):
        hidden = forward(lora_lib.with_adapters(params, adapters), *inputs())
        return jnp.sum(hidden * weights)

    return loss


def assert_close(actual, expected, relative=1e-5):
    """Float32 noise of sums of a few dozen terms, against the largest entry."""

    def check(a, e):
        scale = np.abs(e).max()
        np.testing.assert_allclose(a, e, rtol=0, atol=relative * scale)

    jax.tree.map(check, actual, expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fresh_adapters_change_no_bit(dtype):
    params = transformer.init_params(BIASED, jax.random.key(0))
    adapters = lora_lib.init_adapters(BIASED, LORA, jax.random.key(1))
    base = jax.jit(transformer.make_forward(BIASED, dtype))(params, *inputs())
    forward = jax.jit(transformer.make_forward(BIASED, dtype, lora=LORA))
    hidden = forward(lora_lib.with_adapters(params, adapters), *inputs())
    np.testing.assert_array_equal(hidden, base)
    merged = lora_lib.merge_adapters(params, adapters, LORA)
    jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_fresh_adapters_keep_the_size_of_activations():
    config = dataclasses.replace(CONFIG, hidden_size=512, mlp_size=1024, head_size=64)
    lora = dataclasses.replace(LORA, rank=64)
    adapters = lora_lib.init_adapters(config, lora, jax.random.key(0))["layers"]
    for name in lora_lib.LORA_TARGETS:
        a = np.asarray(adapters[f"{name}_lora_a"])
        # Relative noise of a deviation from n samples: 1 / sqrt(2 n), here five times.
        spread = a.std() * np.sqrt(a.shape[1])
        assert abs(spread - 1) < 5 / np.sqrt(2 * a.size)
        assert not np.any(adapters[f"{name}_lora_b"])


@pytest.mark.parametrize(
    "targets", [lora_lib.LORA_TARGETS, ("query", "value"), ("down",)], ids="-".join
)
def test_merged_weights_give_the_same_network(targets):
    lora = dataclasses.replace(LORA, targets=targets)
    params, adapters = adapted(BIASED, lora)
    forward = jax.jit(transformer.make_forward(BIASED, lora=lora))
    hidden = forward(lora_lib.with_adapters(params, adapters), *inputs())
    merge = jax.jit(lora_lib.merge_adapters, static_argnames="lora")
    merged = merge(params, adapters, lora=lora)
    base = jax.jit(transformer.make_forward(BIASED))
    assert_close(hidden, base(merged, *inputs()))
    assert np.abs(hidden - base(params, *inputs())).max() > 0.1


def test_merging_rounds_once_to_the_bases_dtype():
    params, adapters = adapted()
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    merged = lora_lib.merge_adapters(rounded, adapters, LORA)
    for name, kernel in merged["layers"].items():
        exact = np.float64(rounded["layers"][name])
        if name in LORA.targets:
            a, b = (np.float64(adapters["layers"][f"{name}_lora_{x}"]) for x in "ab")
            exact += LORA.alpha / LORA.rank * a @ b
        assert kernel.dtype == jnp.bfloat16
        # Half a unit in the last place, and float32's noise where it is near a tie.
        bound = 2**-9 * 2 ** np.ceil(np.log2(np.abs(exact) + 1e-9))
        assert np.all(np.abs(np.float64(kernel) - exact) <= 1.001 * bound)


@pytest.mark.parametrize(
    ("config", "remat"),
    [(BIASED, "none"), pytest.param(GEMMA, "full", marks=pytest.mark.slow)],
    ids=["qwen2-none", "gemma-full"],
)
def test_adapter_gradients_follow_the_chain_rule(config, remat):
    params, adapters = adapted(config)
    gradients = jax.jit(jax.grad(adapter_loss(config, LORA, remat)))(adapters, params)
    forward = transformer.make_forward(config)
    weights = jax.random.normal(jax.random.key(4), (2, 9, config.hidden_size))
    merged = lora_lib.merge_adapters(params, adapters, LORA)
    through_kernels = jax.jit(
        jax.grad(lambda merged: jnp.sum(forward(merged, *inputs()) * weights))
    )(merged)
    expected = {}
    for name in LORA.targets:
        a, b = (adapters["layers"][f"{name}_lora_{x}"] for x in "ab")
        kernel_gradient = through_kernels["layers"][name] * LORA.alpha / LORA.rank
        expected[f"{name}_lora_a"] = kernel_gradient @ b.mT
        expected[f"{name}_lora_b"] = a.mT @ kernel_gradient
    assert_close(gradients, {"layers": expected})


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (BIASED, (2, 2, 2)),
        pytest.param(GEMMA, (1, 4, 2), marks=pytest.mark.slow),
        pytest.param(OTHERS, (2, 2, 2), marks=pytest.mark.slow),
    ],
    ids=["qwen2", "gemma", "others"],
)
def test_adapters_do_not_depend_on_the_mesh(config, sizes):
    config = dataclasses.replace(config, vocab_size=48)
    params, adapters = adapted(config)
    tokens = jax.random.randint(jax.random.key(3), (8, 9), 0, 48)
    positions = jnp.broadcast_to(jnp.arange(9), tokens.shape)
    forward = transformer.make_forward(config, lora=LORA)

    def loss(adapters, params):
        both = lora_lib.with_adapters(params, adapters)
        return jnp.mean(forward(both, tokens, positions, tokens * 0) ** 3)

    def both(adapters, params):
        merged = lora_lib.merge_adapters(params, adapters, LORA)
        return jax.value_and_grad(loss)(adapters, params), merged

    expected = jax.jit(both)(adapters, params)
    all_axes = lora_lib.adapter_axes(config, LORA), transformer.param_axes(config)
    mesh = sharding.make_mesh(dict(zip(mesh_shape.MESH_AXES, sizes)))
    with jax.set_mesh(mesh):
        placed = (
            jax.device_put(tree, sharding.shardings(mesh, axes))
            for tree, axes in zip((adapters, params), all_axes)
        )
        actual = jax.jit(both)(*placed)
    assert_close(actual, expected)


def test_adapters_lie_as_their_kernels_do():
    axes = lora_lib.adapter_axes(CONFIG, LORA)["layers"]
    assert axes["query_lora_a"] == ("layers", "hidden", None)
    assert axes["query_lora_b"] == ("layers", None, "heads")
    assert axes["down_lora_a"] == ("layers", "mlp", None)
    assert axes["down_lora_b"] == ("layers", None, "hidden")
    abstract = lora_lib.abstract_adapters(CONFIG, LORA, jnp.bfloat16)
    adapters = lora_lib.init_adapters(CONFIG, LORA, jax.random.key(0), jnp.bfloat16)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), adapters) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract
    )
    assert adapters["layers"]["gate_lora_a"].shape == (2, 24, 3)
    assert adapters["layers"]["gate_lora_b"].shape == (2, 3, 40)
    assert set(axes) == set(adapters["layers"])


def product_shapes(jaxpr):
    """Shapes of the results of all matrix products, those inside of loops too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        for inner in jaxprs_in_params(equation.params):
            yield from product_shapes(inner)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_on_a_tpu_a_product_swaps_the_halves_of_a_head(monkeypatch, dtype, fraction):
    """It is exact, and so are its gradients."""
    size, rotated = 8, int(8 * fraction)
    x = jax.random.normal(jax.random.key(1), (2, 5, 3, size)).astype(dtype)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    swapped = jnp.concatenate([-b, a], axis=-1)
    np.testing.assert_array_equal(transformer._swap_halves(x), swapped)
    config = dataclasses.replace(CONFIG, head_size=size, rope_fraction=fraction)
    angles = transformer.rope(config, jnp.arange(10).reshape(2, 5))
    assert 2 * angles.cos_BxLxP.shape[-1] == rotated

    def value_and_gradient(platform):
        monkeypatch.setattr(transformer, "platform", lambda: platform)
        out, pullback = jax.vjp(lambda x: transformer.rotate(x, angles), x)
        return out, *pullback(out)

    for on_tpu, elsewhere in zip(*map(value_and_gradient, ("tpu", "cpu")), strict=True):
        assert on_tpu.dtype == elsewhere.dtype == dtype
        one = 1e-6 if dtype == "float32" else 1e-2
        np.testing.assert_allclose(
            on_tpu.astype(jnp.float32), elsewhere.astype(jnp.float32), one, one
        )


def test_only_a_tpu_offloads(monkeypatch):
    policies = transformer.REMAT_POLICIES
    assert policies["full"] is transformer.remat_policy("offload")
    monkeypatch.setattr(transformer, "platform", lambda: "tpu")
    assert policies["offload"] is transformer.remat_policy("offload")
    assert policies["dots"] is transformer.remat_policy("dots")


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_the_backward_pass_makes_no_gradient_of_a_kernel(remat):
    params, adapters = adapted()
    kernels = {params["layers"][name].shape[1:] for name in LORA.targets}
    kernels |= {shape[::-1] for shape in kernels}
    loss = adapter_loss(CONFIG, LORA, remat)
    jaxpr = jax.make_jaxpr(jax.grad(loss))(adapters, params)
    shapes = list(product_shapes(jaxpr.jaxpr))
    assert (24, 3) in shapes or (3, 24) in shapes
    assert not kernels.intersection(shapes)
    # It would be seen.
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=1))(adapters, params)
    assert kernels.intersection(product_shapes(jaxpr.jaxpr))


@pytest.mark.parametrize(
    ("config", "lora"),
    [
        (CONFIG, LORA),
        *(
            pytest.param(config, None, marks=pytest.mark.slow)
            for config in (BIASED, WINDOWED, GEMMA, OTHERS)
        ),
    ],
    ids=["llama-lora", "qwen2", "window", "gemma", "others"],
)
def test_decoding_in_pieces_equals_the_forward_pass(config, lora):
    params, adapters = adapted(config)
    if lora is not None:
        params = lora_lib.with_adapters(params, adapters)
    tokens, positions, segments = inputs(length=20)
    forward = jax.jit(transformer.make_forward(config, lora=lora))
    expected = forward(params, tokens, positions, segments)
    decode = jax.jit(transformer.make_decode(config, lora=lora))
    cache = transformer.init_cache(config, batch=2, length=24)
    pieces = []
    for start, stop in ((0, 7), (7, 8), (8, 9), (9, 20)):
        piece = np.s_[:, start:stop]
        hidden, cache = decode(params, cache, tokens[piece], positions[piece])
        pieces.append(hidden)
    assert_close(jnp.concatenate(pieces, axis=1), expected)


def test_a_token_takes_the_slot_that_padding_had():
    params, _ = adapted()
    tokens, positions, segments = inputs(length=12)
    lengths = np.array([5, 9])
    is_prompt = np.arange(12)[None] < lengths[:, None]
    decode = jax.jit(transformer.make_decode(CONFIG))
    cache = transformer.init_cache(CONFIG, batch=2, length=16)
    padded = jnp.where(is_prompt, tokens, 49)
    _, cache = decode(params, cache, padded, positions)
    expected = jax.jit(transformer.make_forward(CONFIG))(
        params, tokens, positions, segments
    )
    for step in range(3):
        at = (lengths + step)[:, None]
        hidden, cache = decode(params, cache, jnp.take_along_axis(tokens, at, 1), at)
        wanted = jnp.take_along_axis(expected, at[:, :, None], axis=1)
        assert_close(hidden, wanted)


def test_the_cache_is_written_in_place():
    config = dataclasses.replace(CONFIG, num_layers=16)
    params = transformer.abstract_params(config)
    cache = jax.eval_shape(lambda: transformer.init_cache(config, 8, 4096))
    new = jax.ShapeDtypeStruct((8, 1), jnp.int32)
    decode = jax.jit(transformer.make_decode(config), donate_argnums=1)
    memory = decode.lower(params, cache, new, new).compile().memory_analysis()
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes == size
    # The keys and values of one layer may be copied, and there are scores of its heads.
    assert memory.temp_size_in_bytes < 4 * size / config.num_layers


def test_logits_of_rounded_states_are_not_rounded():
    params = transformer.init_params(CONFIG, jax.random.key(0))
    hidden = jax.random.normal(jax.random.key(1), (5, 24)).astype(jnp.bfloat16)
    logits = transformer.logits(params, hidden)
    assert logits.dtype == jnp.float32
    kernel = params["unembedding"].astype(jnp.bfloat16).astype(jnp.float32)
    assert_close(logits, hidden.astype(jnp.float32) @ kernel)


def test_only_kernels_have_adapters():
    with pytest.raises(InputError, match="choose one or more of query, key"):
        lora_lib.Lora(rank=4, alpha=8.0, targets=("query", "norm"))
    with pytest.raises(InputError, match="rank 0"):
        lora_lib.Lora(rank=0, alpha=8.0, targets=("query",))
