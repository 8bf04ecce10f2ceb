"""Documents that share a row share nothing else, in the student and in the teacher."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from mixcpt_jax import config as config_lib
from mixcpt_jax.data import formats, mixture
from mixcpt_jax.models import attention, transformer
from mixcpt_jax.objectives import over_tokens, teachers
from mixcpt_jax.training import steps

CONFIG = tiny.architecture(vocab_size=64, max_positions=64)
# The third document is longer than two rows.
LENGTHS = (9, 14, 60, 7, 3, 20, 11, 16)
ROW_LENGTH = 24
# Enough for all ways to pack; empty rows fill up, so that all batches have one shape.
NUM_ROWS = 10
FORWARD = transformer.make_forward(CONFIG)
OBJECTIVE = over_tokens.token_objective(
    FORWARD, teachers.running_teacher(FORWARD), ("text",)
)


@functools.cache
def params(seed):
    """Weights so large that attention and logits differ from token to token."""
    params = transformer.init_params(CONFIG, jax.random.key(seed))
    params["layers"] |= {k: 20 * params["layers"][k] for k in ("query", "key")}
    return params | {"unembedding": 10 * params["unembedding"]}


def draw_documents(changed=None):
    """Random tokens; all tokens of the document that is `changed` are others."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 64, length) for length in LENGTHS]
    if changed is not None:
        documents[changed] += rng.integers(1, 64, LENGTHS[changed])
    return [tokens % 64 for tokens in documents]


def pack(documents, strategy):
    """Rows of a training stream, and the document of each target, -1 for padding."""
    examples = formats.Examples.collect((ids, ids >= 0) for ids in documents)
    source = mixture.Source("text", examples)
    (packed,) = mixture.pack_sources([source], ROW_LENGTH, strategy)
    rows = [packed[number] for number in range(len(packed))]
    return rows, [packed.example_ids(number) for number in range(len(packed))]


def make_batch(rows):
    empty = {name: np.zeros_like(array) for name, array in rows[0].items()}
    rows = rows + [empty] * (NUM_ROWS - len(rows))
    return {name: np.stack([row[name] for row in rows]) for name in empty}


def pack_batch(documents, strategy):
    """As `pack`, `[B, L]`."""
    rows, owners = pack(documents, strategy)
    nobody = [np.full(ROW_LENGTH, -1)] * (NUM_ROWS - len(owners))
    return make_batch(rows), np.stack(owners + nobody)


@jax.jit
def weighted_losses(student, teacher, batch):
    """The loss if one token alone had a weight, by one objective, `[4, B, L]`."""

    def loss(weights):
        weighted = {f"{n}_weights": w for n, w in zip(config_lib.OBJECTIVES, weights)}
        return OBJECTIVE.loss_sum(student, teacher, batch | weighted, 1.0)[0]

    shape = len(config_lib.OBJECTIVES), *batch["tokens"].shape
    ones = jnp.eye(np.prod(shape)).reshape(-1, *shape)
    return jax.lax.map(loss, ones, batch_size=128).reshape(shape)


def losses_of(batch):
    """The student's losses by every objective, and the teacher's own, `[B, L]`."""
    student, teacher = params(0), params(1)
    found = dict(
        zip(
            config_lib.OBJECTIVES, weighted_losses(student, teacher, batch), strict=True
        )
    )
    found["teacher"] = weighted_losses(teacher, teacher, batch)[0]
    return {name: np.asarray(array) for name, array in found.items()}


def pieces(batch):
    """(row, where it is in the row) of each piece."""
    for row, segments in enumerate(batch["segment_ids"]):
        for segment in range(1, segments.max() + 1):
            yield row, segments == segment


@pytest.mark.parametrize("strategy", mixture.STRATEGIES)
def test_documents_share_rows_and_some_go_on_in_the_next(strategy):
    batch, owners = pack_batch(draw_documents(), strategy)
    assert sum(len(set(row) - {-1}) > 1 for row in owners) >= 3
    num_rows = [np.any(owners == i, axis=1).sum() for i in range(len(LENGTHS))]
    assert num_rows[2] >= 3
    assert sum(n > 1 for n in num_rows) >= (2 if strategy == "split" else 1)
    assert len(list(pieces(batch))) == sum(num_rows)


def test_packed_documents_have_the_losses_they_have_alone():
    """By every objective. What is longer than a row is cut the same way alone."""
    documents = draw_documents()
    packed, owners = pack_batch(documents, "best_fit")
    rows, alone_owners = [], []
    for number, tokens in enumerate(documents):
        rows += pack([tokens], "best_fit")[0]
        alone_owners += [number] * (len(rows) - len(alone_owners))
    alone = make_batch(rows)
    assert alone["segment_ids"].max() == 1
    # A piece is known by its tokens.
    places = {
        (owners[row][here][0], packed["tokens"][row][here].tobytes()): (row, here)
        for row, here in pieces(packed)
    }
    assert len(places) == len(rows)
    actual, expected = losses_of(packed), losses_of(alone)
    for row, here in pieces(alone):
        place = places[alone_owners[row], alone["tokens"][row][here].tobytes()]
        for name, losses in expected.items():
            # The same terms, summed in another order.
            atol = 8 * np.finfo(np.float32).eps * losses.max()
            np.testing.assert_allclose(
                actual[name][place], losses[row][here], rtol=0, atol=atol, err_msg=name
            )


@pytest.mark.parametrize("strategy", mixture.STRATEGIES)
def test_changing_a_document_changes_no_bit_of_the_losses_of_others(strategy):
    batch, owners = pack_batch(draw_documents(), strategy)
    before = losses_of(batch)
    for number in range(len(LENGTHS)):
        changed, _ = pack_batch(draw_documents(changed=number), strategy)
        is_own = owners == number
        np.testing.assert_array_equal(changed["tokens"] != batch["tokens"], is_own)
        for name, after in losses_of(changed).items():
            moved = after != before[name]
            assert not moved[~is_own].any(), (number, name)
            assert moved[is_own].any(), (number, name)


@pytest.mark.parametrize("top_k", [0, 4])
def test_changing_a_document_changes_no_bit_of_what_is_prepared_for_others(top_k):
    prepare = jax.jit(teachers.make_teacher_step(FORWARD, top_k))
    batch, owners = pack_batch(draw_documents(), "split")
    before = prepare(params(1), batch)
    for number in range(len(LENGTHS)):
        changed, _ = pack_batch(draw_documents(changed=number), "split")
        for name, after in prepare(params(1), changed).items():
            moved = np.asarray(after != before[name])
            assert not moved[owners != number].any(), (number, name)
            assert moved[owners == number].any(), (number, name)


@pytest.mark.parametrize("strategy", mixture.STRATEGIES)
def test_a_document_that_goes_on_sees_nothing_of_its_last_row(strategy):
    """Pieces are apart from each other, whether they are of one document or of two."""
    batch, owners = pack_batch(draw_documents(), strategy)
    before = losses_of(batch)
    for row, here in pieces(batch):
        if (owners == owners[row][here][0]).sum() == here.sum():
            continue
        changed = {name: array.copy() for name, array in batch.items()}
        for name in ("tokens", "targets"):
            changed[name][row] = (batch[name][row] + here) % 64
        for name, after in losses_of(changed).items():
            moved = after != before[name]
            assert moved[row][here].any(), name
            moved[row][here] = False
            assert not moved.any(), name


def test_without_segments_a_change_would_be_seen():
    batch, owners = pack_batch(draw_documents(), "best_fit")
    changed, _ = pack_batch(draw_documents(changed=0), "best_fit")
    for each in (batch, changed):
        each["segment_ids"] = np.ones_like(each["segment_ids"])
    before, after = losses_of(batch), losses_of(changed)
    for name in before:
        assert (before[name] != after[name])[owners != 0].any(), name


@functools.cache
def make_gradient(accumulation_steps):
    """`(params, teacher, batch) -> gradients` of the jitted training step."""
    keep = optax.GradientTransformation(
        lambda params: params,
        lambda grads, _, params: (jax.tree.map(jnp.zeros_like, grads), grads),
    )
    train_step = jax.jit(
        steps.make_train_step(
            OBJECTIVE, keep, optax.constant_schedule(0.0), accumulation_steps
        )
    )

    def gradient(params, teacher, batch):
        state = steps.TrainState(jnp.zeros((), jnp.int32), params, params)
        return train_step(state, teacher, batch)[0].opt_state

    return gradient


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("strategy", mixture.STRATEGIES)
def test_the_loss_of_a_document_has_no_gradient_for_tokens_of_others(
    strategy, accumulation_steps
):
    """Each document has tokens of its own; the loss of one alone counts."""
    rng = np.random.default_rng(1)
    documents = [8 * i + rng.integers(0, 8, n) for i, n in enumerate(LENGTHS)]
    batch, owners = pack_batch(documents, strategy)
    gradient = make_gradient(accumulation_steps)
    for number in range(len(LENGTHS)):
        weights = (owners == number).astype(np.float32)
        batch |= {f"{name}_weights": weights for name in config_lib.OBJECTIVES}
        embedding = np.asarray(gradient(params(0), params(1), batch)["embedding"])
        read = np.unique(batch["tokens"][owners == number])
        np.testing.assert_array_equal(np.flatnonzero(embedding.any(axis=1)), read)


def splash(*operands):
    return attention.splash(*operands, None, interpret=True)


def in_blocks(*operands):
    return attention.in_blocks(*operands, None)


@pytest.mark.parametrize("form", [in_blocks, splash])
def test_attention_moves_no_bit_for_keys_and_values_of_others(form):
    """The TPU kernel is interpreted."""
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (
        jax.random.normal(k, (1, 256, heads, 128)) for k, heads in zip(keys, (4, 2, 2))
    )
    segments = jnp.repeat(jnp.arange(1, 5), 64)[None]
    is_second = (segments == 2)[..., None, None]
    form = jax.jit(form)
    before = form(query, key, value, segments)
    after = form(
        query, *(jnp.where(is_second, 9 - 5 * x, x) for x in (key, value)), segments
    )
    moved = np.asarray(before != after).any((0, 2, 3))
    np.testing.assert_array_equal(moved, np.asarray(segments[0] == 2))
