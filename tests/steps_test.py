"""The step's arithmetic: packing, masks, accumulation, meshes, objectives per source."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixcpt_jax import config as config_lib
from mixcpt_jax.core import mesh_shape
from mixcpt_jax.data import formats, mixture
from mixcpt_jax.evaluation import evaluator
from mixcpt_jax.models import lora as lora_lib
from mixcpt_jax.models import transformer
from mixcpt_jax.objectives import dense, over_pairs, over_tokens, streamed, teachers
from mixcpt_jax.runtime import metrics, sharding
from mixcpt_jax.training import optimizer, steps

CONFIG = transformer.ModelConfig(
    family="llama",
    vocab_size=64,
    hidden_size=32,
    mlp_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=8,
    head_size=4,
    max_positions=64,
    rope_theta=1e4,
)
SOURCES = ("domain", "general")


@functools.cache
def params(seed=0):
    return transformer.init_params(CONFIG, jax.random.key(seed))


def documents(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return formats.Examples.collect(
        (rng.integers(0, 64, n), np.ones(n, bool)) for n in lengths
    )


def make_batch(row_length=32, rows=8, seed=0):
    """Packed rows of two sources with objectives of their own, some padding."""
    packed = mixture.pack_sources(
        [
            mixture.Source("domain", documents([9, 30, 17, 5, 21, 40] * 4, seed)),
            mixture.Source(
                "general",
                documents([12, 7, 25] * 6, seed + 1),
                objectives=dict(zip(config_lib.OBJECTIVES, (0.7, 0.2, 0.1, 0.4))),
            ),
        ],
        row_length,
    )
    stream = mixture.mixture(packed, rows, seed=3)
    return next(iter(stream))


@functools.cache
def step_of(accumulation_steps, remat, soft_cap):
    """The transformations of the optimizer, and the compiled step."""
    axes = transformer.param_axes(CONFIG)
    config = config_lib.default().optimizer
    config.learning_rate = 1e-2
    transforms, schedule = optimizer.make_optimizer(config, 10)
    forward = transformer.make_forward(CONFIG, remat=remat)
    train_step = steps.make_train_step(
        over_tokens.token_objective(
            forward,
            teachers.running_teacher(forward),
            SOURCES,
            functools.partial(streamed.head_loss, soft_cap=soft_cap),
        ),
        transforms,
        schedule,
        accumulation_steps,
        param_specs=jax.tree.map(
            sharding.spec, axes, is_leaf=lambda x: isinstance(x, tuple)
        ),
    )
    return transforms, jax.jit(train_step)


def take_step(
    batch,
    accumulation_steps=1,
    mesh_sizes=None,
    num_steps=1,
    remat="none",
    soft_cap=None,
    slices=0,
):
    transforms, step = step_of(accumulation_steps, remat, soft_cap)
    state = steps.TrainState(jnp.zeros((), jnp.int32), params(), None)
    if mesh_sizes is None:
        state = state._replace(opt_state=transforms.init(params()))
        for _ in range(num_steps):
            state, metrics = step(state, params(1), batch)
        return state, metrics
    sizes = dict(zip(mesh_shape.MESH_AXES, mesh_sizes, strict=True))
    mesh = sharding.make_mesh(sizes | {"slices": slices})
    where = sharding.shardings(mesh, transformer.param_axes(CONFIG))
    moments = optimizer.state_shardings(
        transforms, params(), where, sharding.replicated(mesh)
    )
    with jax.set_mesh(mesh):
        state = jax.device_put(
            state._replace(opt_state=transforms.init(params())),
            steps.TrainState(sharding.replicated(mesh), where, moments),
        )
        teacher = jax.device_put(params(1), where)
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        for _ in range(num_steps):
            state, metrics = step(state, teacher, batch)
    return state, metrics


def assert_close(actual, expected, rtol=1e-4):
    for (path, a), e in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        e = np.asarray(e)
        np.testing.assert_allclose(
            np.asarray(a), e, atol=rtol * max(np.abs(e).max(), 1e-3), err_msg=str(path)
        )


def test_every_objective_of_the_config_has_its_weights():
    assert streamed.TokenWeights._fields == config_lib.OBJECTIVES


@pytest.mark.parametrize("soft_cap", [None, 0.1])
def test_the_loss_is_the_weighted_mean_of_the_dense_losses(soft_cap):
    batch = make_batch()
    _, found = take_step(batch, soft_cap=soft_cap)
    inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
    forward = jax.jit(transformer.make_forward(CONFIG))
    student, teacher = (
        transformer.logits(p, forward(p, *inputs), soft_cap)
        for p in (params(), params(1))
    )
    targets = batch["targets"]
    total = (
        batch["ntp_weights"] * dense.cross_entropy(student, targets)
        + batch["lssd_weights"] * dense.lssd(student, teacher, targets)
        + batch["kd_weights"] * dense.distillation(student, teacher)
        + batch["selective_weights"] * dense.selective(student, teacher, targets)
    ).sum()
    np.testing.assert_allclose(
        found["loss"][0], total / batch["loss_mask"].sum(), rtol=1e-5
    )
    # Per-source metrics add up to those of the batch.
    for name in ("ntp", "lssd", "kd", "correct", "agree", "swapped"):
        parts = [found[f"{source}/{name}"] for source in SOURCES]
        np.testing.assert_allclose(found[name], np.sum(parts, axis=0), rtol=1e-5)
    assert found["tokens"][0] == batch["loss_mask"].sum()


@pytest.mark.parametrize("top_k", [0, 8, pytest.param(63, marks=pytest.mark.slow)])
def test_what_a_prepared_teacher_does_not_hold_is_not_measured(top_k):
    """Each metric of a prepared teacher is the running one's, a bound of it, or absent."""
    batch, forward = make_batch(), transformer.make_forward(CONFIG)
    teacher_step = jax.jit(teachers.make_teacher_step(forward, top_k))
    in_general = batch["source_ids"] == 1
    assert 0 < in_general.mean() < 1
    outputs = {
        # As `teacher_cache.TeacherRows` fills in what is not there.
        name: np.where(in_general.reshape(*in_general.shape, *[1] * (x.ndim - 2)), 0, x)
        for name, x in teacher_step(params(1), batch).items()
    }
    outputs = {
        k: v.astype(np.uint16) if "hidden" in k else v for k, v in outputs.items()
    }
    prepared = (
        teachers.compact_teacher() if top_k else teachers.prepared_teacher("float32")
    )

    def measured(teacher, batch, **options):
        objective = over_tokens.token_objective(forward, teacher, SOURCES, **options)
        _, found = jax.jit(objective.loss_sum)(params(), params(1), batch, 1.0)
        return metrics.means(found)

    expected = measured(teachers.running_teacher(forward), batch)
    actual = measured(prepared, batch | outputs, without_teacher=["general"])
    assert {"ntp", "general/ntp", "domain/agree", "domain/swapped"} <= actual.keys()
    of_teacher = {k for k in actual if not k.endswith(("ntp", "correct"))}
    assert all(name.startswith("domain/") for name in of_teacher)
    assert ("domain/kd" in actual) == (top_k != 8)
    for name, value in actual.items():
        if name.endswith("_lower_bound"):
            assert value < expected[name.removesuffix("_lower_bound")]
        else:  # hidden states are rounded to bfloat16
            assert value == pytest.approx(expected[name], rel=1e-2), name


@pytest.mark.parametrize("zeroed", ["loss_mask", "weights"])
def test_a_step_to_which_nothing_contributes_has_no_loss(zeroed):
    batch = make_batch()
    assert metrics.means(take_step(batch)[1])["loss"] > 0
    batch |= {k: 0 * v for k, v in batch.items() if k.endswith("_weights")}
    if zeroed == "loss_mask":
        batch["loss_mask"] = 0 * batch["loss_mask"]
    found = metrics.means(take_step(batch)[1])
    assert "loss" not in found
    assert ("ntp" in found) == (zeroed == "weights")


def test_padding_and_segments_of_others_change_nothing():
    batch = make_batch()
    altered = dict(batch)
    padding = batch["segment_ids"] == 0
    assert padding.any()
    altered["tokens"] = np.where(padding, 63, batch["tokens"])
    altered["targets"] = np.where(padding, 1, batch["targets"])
    expected, actual = take_step(batch), take_step(altered)
    assert_close(actual[1]["loss"], expected[1]["loss"], rtol=1e-7)
    assert_close(actual[0].params, expected[0].params, rtol=1e-6)


@pytest.mark.parametrize("strategy", ["best_fit", "split"])
def test_a_packed_row_gives_each_document_the_losses_it_has_alone(strategy):
    lengths = [9, 14, 7, 3, 20, 11]
    examples = documents(lengths)
    rows = mixture.PackedRows(
        mixture.Source("text", examples),
        0,
        mixture.pack(examples.lengths, 70, strategy),
        0,
    )
    score = jax.jit(steps.make_eval_step(transformer.make_forward(CONFIG)))
    assert len(rows) == 1
    row = {name: value[None] for name, value in rows[0].items()}
    packed = np.asarray(score(params(), row)["ntp"])[0]
    owners = rows.example_ids(0)
    for number, length in enumerate(lengths):
        tokens = examples.tokens[slice(*examples.offsets[number : number + 2])]
        alone = {
            "tokens": tokens[:-1],
            "targets": tokens[1:],
            "positions": np.arange(length - 1),
            "segment_ids": np.ones(length - 1, np.int32),
        }
        # Padded behind its end, so that one program serves all lengths.
        alone = {k: np.pad(x, (0, 70 - len(x)))[None] for k, x in alone.items()}
        np.testing.assert_allclose(
            packed[owners == number],
            np.asarray(score(params(), alone)["ntp"])[0, : length - 1],
            rtol=2e-5,
            atol=2e-6,
        )


def test_slices_change_nothing_but_the_order_of_sums():
    batch = make_batch(rows=16)
    settings = {"accumulation_steps": 2, "mesh_sizes": (4, 2, 1), "num_steps": 2}
    expected = take_step(batch, **settings)
    actual = take_step(batch, slices=2, **settings)
    assert_close(actual[1], expected[1])
    assert_close(actual[0].params, expected[0].params)
    assert_close(actual[0].opt_state, expected[0].opt_state)


def test_accumulation_changes_nothing():
    batch = make_batch()
    expected, actual = take_step(batch), take_step(batch, accumulation_steps=4)
    assert_close(actual[1], expected[1])
    assert_close(actual[0].opt_state, expected[0].opt_state)


@pytest.mark.parametrize("remat", ["dots", "full", "offload"])
def test_rematerialization_changes_nothing(remat):
    batch = make_batch()
    assert_close(take_step(batch, remat=remat)[1], take_step(batch)[1], rtol=1e-6)


@pytest.mark.parametrize(
    "shape", [(2, 2, 2), pytest.param((1, 8, 1), marks=pytest.mark.slow)]
)
def test_any_mesh_takes_the_same_steps(shape):
    batch = make_batch()
    expected = take_step(batch, num_steps=3)
    actual = take_step(batch, mesh_sizes=shape, num_steps=3)
    assert_close(actual[1], expected[1])
    assert int(actual[0].step) == 3


def test_the_teacher_stays_and_the_student_moves():
    state, _ = take_step(make_batch())
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.params, params())
    assert all(jax.tree.leaves(moved))


def test_several_steps_lower_the_loss():
    batch = make_batch()
    _, first = take_step(batch)
    _, last = take_step(batch, num_steps=10)
    assert last["loss"][0] < 0.8 * first["loss"][0]


# Preference pairs.

PREFERENCE = {"beta": 0.5, "label_smoothing": 0.1, "sft_weight": 0.3}


def make_pairs(rows=8, row_length=48, reference_params=None, seed=0):
    """Rows of whole pairs of two sources; with the reference's numbers if asked for."""
    rng = np.random.default_rng(seed)
    packed = mixture.pack_sources(
        [
            mixture.Source(
                name,
                formats.Examples.collect(
                    (rng.integers(0, 64, n), np.arange(n) >= n // 2)
                    for n in rng.integers(4, 20, 2 * 30)
                ),
                has_pairs=True,
            )
            for name in SOURCES
        ],
        row_length,
    )
    if reference_params is not None:
        score = jax.jit(steps.make_eval_step(transformer.make_forward(CONFIG)))
        for number, part in enumerate(packed):
            sums = evaluator.sums_per_example(
                lambda batch: score(reference_params, batch), part, rows
            )
            source = dataclasses.replace(
                part.source, reference_logps=-sums[0].astype(np.float32)
            )
            packed[number] = mixture.PackedRows(
                source, part.source_id, part.plan, part.pad_id, part.num_segments
            )
    stream = mixture.mixture(packed, rows, seed=3)
    return next(iter(stream)), packed[0].num_segments


def take_preference_step(
    batch, num_segments, accumulation_steps=1, normalised=False, mesh_sizes=None, **loss
):
    config = config_lib.default().optimizer
    config.learning_rate = 1e-2
    transforms, schedule = optimizer.make_optimizer(config, 10)
    forward = transformer.make_forward(CONFIG)
    objective = over_pairs.preference_objective(
        forward,
        None if "reference_logps" in batch else forward,
        SOURCES,
        num_segments,
        functools.partial(dense.preference_loss, **(PREFERENCE | loss)),
        normalised,
    )
    step = jax.jit(
        steps.make_train_step(objective, transforms, schedule, accumulation_steps)
    )
    state = steps.TrainState(
        jnp.zeros((), jnp.int32), params(), transforms.init(params())
    )
    if mesh_sizes is None:
        return step(state, params(1), batch)
    mesh = sharding.make_mesh(dict(zip(mesh_shape.MESH_AXES, mesh_sizes, strict=True)))
    with jax.set_mesh(mesh):
        where = sharding.shardings(mesh, transformer.param_axes(CONFIG))
        reference = jax.device_put(params(1), where)
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        return step(state, reference, batch)


def assert_same_step(actual, expected):
    """Rewards are small differences of log-probabilities, and have their noise."""
    noise = 4 * np.finfo(np.float32).eps * abs(float(expected[1]["chosen_logp"][0]))
    for name, pair in expected[1].items():
        np.testing.assert_allclose(
            actual[1][name], pair, rtol=1e-4, atol=noise, err_msg=name
        )
    assert_close(actual[0].opt_state, expected[0].opt_state)


def pairs_alone(batch, normalised):
    """Dense log-probabilities of each answer by itself: `(policy, reference)`, pairs."""
    forward = transformer.make_forward(CONFIG)
    row_length = batch["tokens"].shape[1]

    # Padded behind its end, so that one program serves all lengths.
    @jax.jit
    def logp_of(params, tokens, targets, mask, length):
        positions = jnp.arange(row_length)
        inputs = tokens, positions, (positions < length).astype(jnp.int32)
        hidden = forward(params, *(x[None] for x in inputs))
        logits = transformer.logits(params, hidden)[0]
        return -jnp.sum(dense.cross_entropy(logits, targets) * mask)

    answers = []
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            here = batch["segment_ids"][row] == segment
            tokens, targets, mask = (
                batch[name][row][here] for name in ("tokens", "targets", "loss_mask")
            )
            padded = (
                np.pad(x, (0, row_length - len(x))) for x in (tokens, targets, mask)
            )
            operands = *padded, len(tokens)
            logps = [
                float(logp_of(which, *operands)) / (mask.sum() if normalised else 1)
                for which in (params(), params(1))
            ]
            answers.append((*logps, 1.0 if normalised else mask.sum()))
    return np.array(answers).reshape(-1, 2, 3)


@pytest.mark.parametrize(
    ("normalised", "loss"),
    [
        (False, {}),
        (True, {}),
        (True, {"kind": "ipo", "label_smoothing": 0.0, "sft_weight": 0.0}),
    ],
)
def test_the_loss_of_pairs_is_the_mean_over_answers_taken_alone(normalised, loss):
    batch, num_segments = make_pairs()
    _, metrics = take_preference_step(
        batch, num_segments, normalised=normalised, **loss
    )
    answers = pairs_alone(batch, normalised)
    expected, chosen, rejected = dense.preference_loss(
        answers[:, 0, 0],
        answers[:, 1, 0],
        answers[:, 0, 1],
        answers[:, 1, 1],
        chosen_lengths_P=answers[:, 0, 2],
        **(PREFERENCE | loss),
    )
    assert metrics["pairs"][0] == len(answers) == metrics["margin"][1]
    np.testing.assert_allclose(metrics["loss"][0], expected.mean(), rtol=2e-5)
    for name, value in (
        ("chosen_reward", chosen),
        ("rejected_reward", rejected),
        ("margin", chosen - rejected),
        ("accuracy", chosen > rejected),
        ("chosen_logp", answers[:, 0, 0]),
    ):
        total, count = metrics[name]
        np.testing.assert_allclose(total / count, value.mean(), rtol=1e-4, atol=1e-5)
        parts = [metrics[f"{source}/{name}"] for source in SOURCES]
        np.testing.assert_allclose(
            (total, count), np.sum(parts, axis=0), rtol=1e-4, atol=1e-4
        )


def test_the_reference_may_run_ahead():
    batch, num_segments = make_pairs()
    ahead, _ = make_pairs(reference_params=params(1))
    assert ahead["reference_logps"].shape == (8, num_segments)
    expected = take_preference_step(batch, num_segments)
    actual = take_preference_step(ahead, num_segments)
    assert_same_step(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "parts"), [((2, 2, 2), 2), ((1, 8, 1), 1)])
def test_any_mesh_and_any_accumulation_take_the_same_preference_step(shape, parts):
    batch, num_segments = make_pairs(rows=16)
    expected = take_preference_step(batch, num_segments)
    actual = take_preference_step(
        batch, num_segments, accumulation_steps=parts, mesh_sizes=shape
    )
    assert_same_step(actual, expected)


def test_padding_and_pairs_of_no_answer_count_nothing():
    batch, num_segments = make_pairs()
    altered = dict(batch)
    padding = batch["segment_ids"] == 0
    assert padding.any()
    altered["tokens"] = np.where(padding, 63, batch["tokens"])
    altered["targets"] = np.where(padding, 1, batch["targets"])
    expected = take_preference_step(batch, num_segments)
    # More room than any row needs changes nothing either.
    actual = take_preference_step(altered, num_segments + 4)
    assert_same_step(actual, expected)


# Adapters.


def test_adapters_train_and_what_they_adapt_stays():
    lora = lora_lib.Lora(4, 8.0, ("query", "value", "down"))
    config = config_lib.default().optimizer
    config.learning_rate = 1e-2
    transforms, schedule = optimizer.make_optimizer(config, 10)
    objective = over_tokens.token_objective(
        transformer.make_forward(CONFIG, lora=lora),
        teachers.running_teacher(transformer.make_forward(CONFIG)),
        SOURCES,
    )
    step = jax.jit(
        steps.make_train_step(objective, transforms, schedule, has_adapters=True)
    )
    adapters = lora_lib.init_adapters(CONFIG, lora, jax.random.key(3), jnp.float32)
    state = steps.TrainState(
        jnp.zeros((), jnp.int32), adapters, transforms.init(adapters)
    )
    batch = make_batch()
    state, first = step(state, params(), batch)
    # The base is the teacher, and fresh adapters change nothing.
    assert first["kd"][0] == pytest.approx(0.0, abs=1e-3)
    assert first["agree"][0] == first["agree"][1]
    for _ in range(20):
        state, last = step(state, params(), batch)
    assert last["loss"][0] < first["loss"][0]
    assert set(state.params["layers"]) == {
        f"{name}_lora_{part}" for name in lora.targets for part in "ab"
    }
    merged = lora_lib.merge_adapters(params(), state.params, lora)
    score = jax.jit(steps.make_eval_step(transformer.make_forward(CONFIG)))
    ntp = np.asarray(score(merged, batch)["ntp"])[batch["loss_mask"] > 0].mean()
    _, after = step(state, params(), batch)
    np.testing.assert_allclose(ntp, after["ntp"][0] / after["ntp"][1], rtol=1e-5)
