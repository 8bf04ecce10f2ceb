"""Mixture of experts: products, gradients, meshes, statistics; see `families_test` too."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mixcpt_jax.core.errors import InputError
from mixcpt_jax.evaluation import load_model
from mixcpt_jax.jobs import train
from mixcpt_jax.models import experts, pretrained, tokenizer, transformer
from mixcpt_jax.models import lora as lora_lib
from mixcpt_jax.objectives import over_tokens, streamed, teachers
from mixcpt_jax.planning import step_plan
from mixcpt_jax.runtime import metrics, sharding
from mixcpt_jax.training import steps

CONFIG = transformer.ModelConfig(
    family="qwen3_moe",
    vocab_size=64,
    hidden_size=16,
    mlp_size=12,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    max_positions=64,
    rope_theta=1e4,
    num_experts=8,
    experts_per_token=3,
    normalize_routing=True,
    qk_norm=True,
)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def assert_close(actual, expected, rtol=1e-5):
    for (path, a), e in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        atol = rtol * max(np.abs(e).max(), 1e-3)
        np.testing.assert_allclose(a, e, rtol=0, atol=atol, err_msg=str(path))


@pytest.mark.parametrize("sizes", [(140, 0, 3, 57), (0, 0, 0, 0), (0, 0, 0, 256)])
def test_a_grouped_product_multiplies_each_run_by_its_kernel(sizes):
    rows, kernels, weights = normal(0, 256, 5), normal(1, 4, 5, 7), normal(2, 256, 7)
    owners = np.repeat(np.arange(5), [*sizes, 256 - sum(sizes)])

    def literal(rows, kernels):
        padded = jnp.concatenate([kernels, jnp.zeros((1, 5, 7))])
        return jnp.einsum("ri,rio->ro", rows, padded[owners])

    def grouped(rows, kernels):
        return experts.product(rows, kernels, jnp.array(sizes, jnp.int32))

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradients(function, *operands):
        gradient = jax.grad(
            lambda *operands: jnp.sum(function(*operands) * weights), argnums=(0, 1)
        )
        return function(*operands), gradient(*operands)

    expected = with_gradients(literal, rows, kernels)
    assert_close(with_gradients(grouped, rows, kernels), expected)


def operands(tokens=16):
    x = normal(0, tokens, 16)
    kernels = experts.Kernels(
        normal(2, 8, 16, 12), normal(3, 8, 16, 12), normal(4, 8, 12, 16)
    )
    return x, normal(1, 16, 8), kernels


def literal_mix(x, router, kernels):
    """All experts compute all tokens; the weights of the others are 0."""
    probabilities = jax.nn.softmax(x @ router)
    top, chosen = jax.lax.top_k(probabilities, 3)
    weights = jnp.sum(
        jax.nn.one_hot(chosen, 8) * (top / top.sum(-1, keepdims=True))[..., None], 1
    )
    gate = jax.nn.silu(jnp.einsum("td,edf->tef", x, kernels.gate_ExDxF))
    up = jnp.einsum("td,edf->tef", x, kernels.up_ExDxF)
    return jnp.einsum("tef,efd,te->td", gate * up, kernels.down_ExFxD, weights)


def our_mix(x, router, kernels):
    return experts.mix(x, experts.choose(x, router, 3, True), kernels, jax.nn.silu)


def gradients(mix, *given):
    weights = normal(9, *given[0].shape)
    return mix(*given), jax.grad(
        lambda *operands: jnp.sum(mix(*operands) * weights), argnums=(0, 1, 2)
    )(*given)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "load"),
    [
        ({"data": 2, "fsdp": 4, "tensor": 1}, "any"),
        ({"data": 1, "fsdp": 8, "tensor": 1, "expert": 2}, "any"),
        ({"data": 1, "fsdp": 4, "tensor": 2, "expert": 2}, "any"),
        ({"data": 2, "fsdp": 4, "tensor": 1, "expert": 4}, "three experts"),
    ],
)
def test_every_mesh_computes_the_same_mixture(sizes, load):
    x, router, kernels = operands(256)
    if load == "three experts":
        # They lie on two of the four parts.
        router = router.at[:, 3:].set(0.0)
        x = jnp.abs(x)
        router = router.at[:, :3].set(jnp.abs(router[:, :3]))
    expected = jax.jit(functools.partial(gradients, literal_mix))(x, router, kernels)
    wide = ("experts", "expert_hidden", "mlp")
    axes = (
        ("batch", None),
        ("hidden", None),
        experts.Kernels(wide, wide, ("experts", "mlp", "expert_hidden")),
    )
    mesh = sharding.make_mesh(sizes)
    with jax.set_mesh(mesh):
        where = tuple(
            jax.tree.map(
                lambda leaf: jax.sharding.NamedSharding(mesh, sharding.spec(leaf)),
                part,
                is_leaf=lambda leaf: type(leaf) is tuple,
            )
            for part in axes
        )
        placed = jax.device_put((x, router, kernels), where)
        actual = jax.jit(functools.partial(gradients, our_mix))(*placed)
    assert_close(jax.device_get(actual), expected)


def test_the_mixture_is_the_weighted_sum_of_the_chosen_experts():
    given = operands()
    ours, literal = (
        jax.jit(functools.partial(gradients, mix))(*given)
        for mix in (our_mix, literal_mix)
    )
    assert_close(ours, literal)


def test_no_array_has_tokens_experts_and_columns():
    """The products of 8 experts need no more memory for tokens than those of 4."""

    def largest(num_experts):
        kernels = experts.Kernels(
            *(
                jnp.zeros((num_experts, *shape))
                for shape in ((16, 12),) * 2 + ((12, 16),)
            )
        )
        given = jnp.zeros((4096, 16)), jnp.zeros((16, num_experts)), kernels
        jaxpr = jax.make_jaxpr(functools.partial(gradients, our_mix))(*given)
        return max(sizes(jaxpr.jaxpr))

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (np.prod(v.aval.shape, dtype=int) for v in equation.outvars)
            for inner in jax.tree.leaves(
                list(equation.params.values()),
                is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
            ):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from sizes(getattr(inner, "jaxpr", inner))

    assert largest(4) == largest(8)


@functools.cache
def params(seed=0):
    made = transformer.init_params(CONFIG, jax.random.key(seed))
    # Routers that prefer some experts.
    made["layers"]["router"] = normal(seed, *made["layers"]["router"].shape)
    return made


def make_batch(rows=8, length=16):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (rows, length))
    ones = np.ones((rows, length), np.float32)
    segments = np.ones((rows, length), np.int32)
    segments[:, -3:] = 0
    mask = ones * (segments > 0)
    weights = {f"{name}_weights": mask for name in streamed.TokenWeights._fields}
    return weights | {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "positions": np.broadcast_to(np.arange(length), tokens.shape),
        "segment_ids": segments,
        "source_ids": np.repeat([[0], [1]], rows // 2, 0) + np.zeros_like(tokens),
        "loss_mask": mask,
    }


def objective(load_balance=0.0, remat="none", lora=None, teacher=None):
    return over_tokens.token_objective(
        transformer.make_forward(CONFIG, remat=remat, lora=lora),
        teacher or teachers.running_teacher(transformer.make_forward(CONFIG)),
        ("domain", "general"),
        load_balance=load_balance,
    )


@functools.cache
def loss_and_gradients(**settings):
    def loss(student, teacher, batch):
        return objective(**settings).loss_sum(student, teacher, batch, 1 / 104)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.slow
def test_a_loss_with_experts_is_the_same_on_every_mesh():
    batch = make_batch()
    expected = loss_and_gradients(load_balance=0.1)(params(), params(1), batch)
    for expert in (1, 2, 4):
        mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 2, "expert": expert})
        where = sharding.shardings(mesh, transformer.param_axes(CONFIG))
        with jax.set_mesh(mesh):
            actual = loss_and_gradients(load_balance=0.1, remat="full")(
                jax.device_put(params(), where),
                jax.device_put(params(1), where),
                jax.device_put(batch, sharding.batch_sharding(mesh)),
            )
        assert_close(jax.device_get(actual), expected, 1e-4)


@pytest.mark.slow
def test_metrics_show_the_load_and_how_far_routing_has_drifted():
    batch = make_batch()
    (_, found), _ = loss_and_gradients()(params(), params(), batch)
    means = {name: total / count for name, (total, count) in found.items()}
    assert means["router_drift"] == 0
    assert 0 < means["router_entropy"] < np.log(8)
    assert 1 <= means["router_load_max"] <= 8
    (loss, moved), _ = loss_and_gradients()(params(), params(1), batch)
    for source in ("domain/", "general/", ""):
        total, count = moved[f"{source}router_drift"]
        assert 0.2 < total / count <= 1
    (balanced, _), gradient = loss_and_gradients(load_balance=0.1)(
        params(), params(1), batch
    )
    balance = 0.1 * means["router_balance"]
    np.testing.assert_allclose(balanced - loss, balance, atol=1e-5)
    assert np.abs(gradient["layers"]["router"]).max() > 0

    score = jax.jit(steps.make_eval_step(transformer.make_forward(CONFIG)))
    scores = score(params(), batch, params(1))
    drift = np.sum(scores["router_drift"] * batch["loss_mask"])
    np.testing.assert_allclose(drift, moved["router_drift"][0], rtol=1e-5)
    assert "router_drift" not in score(params(), batch)


def test_a_prepared_teacher_gives_the_loss_of_a_running_one():
    """With experts too; only the drift of the routers needs a running teacher."""
    # Logits far from equal, so that the loss depends on the teacher.
    teacher = params(1) | {"unembedding": 50 * params(1)["unembedding"]}
    forward, batch = transformer.make_forward(CONFIG), make_batch()

    def loss(batch, source=None):
        function = objective(teacher=source).loss_sum
        return jax.jit(function)(params(), teacher, batch, 1 / 104)

    expected, theirs = loss(batch)
    for top_k, prepared in (
        (0, teachers.prepared_teacher("float32")),
        (CONFIG.vocab_size, teachers.compact_teacher()),
    ):
        outputs = jax.jit(teachers.make_teacher_step(forward, top_k))(teacher, batch)
        found, ours = loss(batch | outputs, prepared)
        # What is stored has the digits of bfloat16.
        np.testing.assert_allclose(found, expected, rtol=2**-9)
        assert "router_load_max" in ours
        assert {name for name in theirs if name.endswith("router_drift")} == {
            name for name in theirs if name not in ours
        }


def test_drift_counts_choices_in_any_order():
    now = jnp.array([[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
    start = jnp.array([[[1, 0], [2, 5]], [[0, 1], [7, 6]]])
    np.testing.assert_array_equal(experts.drift(now, start), [0.5, 0.25])


def test_a_uniform_router_is_balanced_and_padding_is_no_load():
    probabilities = jnp.full((4, 4), 0.25)
    chosen = jnp.array([[0], [1], [2], [3]])
    choices = experts.Choices(chosen, jnp.ones((4, 1)), probabilities)
    even = experts.survey(choices, jnp.ones(4, bool))
    assert even.balance == even.load_max == 1
    np.testing.assert_allclose(even.entropy_T, np.log(4), rtol=1e-6)
    padded = experts.survey(choices, jnp.array([True, True, False, False]))
    assert (padded.load_max, padded.balance) == (2, 1)


def test_attention_has_adapters_and_experts_have_none():
    lora = lora_lib.Lora(2, 4.0, ("query", "output"))
    adapters = lora_lib.abstract_adapters(CONFIG, lora)["layers"]
    assert adapters["query_lora_a"].shape == (2, 16, 2)
    with pytest.raises(InputError, match="gate, up are kernels of experts"):
        lora_lib.abstract_adapters(CONFIG, lora_lib.Lora(2, 4.0, ("gate", "up")))


@pytest.mark.slow
def test_adapters_learn_and_rematerialization_changes_nothing():
    batch, teacher = make_batch(), params()
    lora = lora_lib.Lora(2, 4.0, ("query", "output"))
    adapters = lora_lib.init_adapters(CONFIG, lora, jax.random.key(0))
    both = {}
    for policy in ("none", "dots", "full"):
        step = steps.make_train_step(
            objective(remat=policy, lora=lora),
            transforms := optax.sgd(0.1),
            optax.constant_schedule(0.1),
            has_adapters=True,
        )
        state = steps.TrainState(
            jnp.zeros((), jnp.int32), adapters, transforms.init(1.0)
        )
        both[policy] = jax.jit(step)(state, teacher, batch)
    assert_close(both["dots"], both["none"])
    assert_close(both["full"], both["none"])
    moved = both["none"][0].params["layers"]["query_lora_b"]
    assert np.abs(moved).max() > 0


@pytest.mark.slow
def test_a_phase_trains_measures_and_exports_experts(tiny_config, tiny_model, tmp_path):
    tokens = tokenizer.load(tiny_model)
    model_config = dataclasses.replace(CONFIG, vocab_size=512, max_positions=256)
    start = transformer.init_params(model_config, jax.random.key(0))
    model = str(tmp_path / "model")
    pretrained.save_pretrained(model, start, model_config, tokens, dtype="float32")
    config = tiny_config
    config.model.path, config.train.num_steps = model, 2
    config.mesh.update(data=1, fsdp=8, expert=2)
    config.objective.load_balance = 0.01
    results = train.run(config, str(tmp_path / "run"), "cpt")
    before, after = (results[at]["domain/router_drift"] for at in ("before", "after"))
    assert before == 0 < after < 1
    rows = (tmp_path / "run" / metrics.FILE).read_text().splitlines()
    steps_of_run = [row for row in map(json.loads, rows) if "router_load_max" in row]
    assert steps_of_run[0]["router_drift"] == 0
    loaded = load_model.load(str(tmp_path / "run"), "float32")
    exported = str(tmp_path / "export")
    pretrained.save_pretrained(
        exported, loaded.params, model_config, tokens, dtype="float32"
    )
    template = transformer.abstract_params(model_config)
    again = pretrained.load_params(exported, template)
    jax.tree.map(np.testing.assert_array_equal, again, loaded.params)


def test_flops_count_the_experts_that_a_token_passes():
    dense = dataclasses.replace(
        CONFIG, mlp_size=3 * 12, num_experts=0, experts_per_token=0
    )
    of_experts, of_dense = (step_plan.count_flops(c, 32) for c in (CONFIG, dense))
    routers = 3 * 2 * CONFIG.num_layers * 16 * 8
    assert of_experts.student == of_dense.student + routers
    assert of_experts.attention == of_dense.attention
