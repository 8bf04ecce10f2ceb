import dataclasses
import itertools
import pickle

import grain
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from mixcpt_jax import config
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import mixture
from mixcpt_jax.data.formats import Examples

_ROW_LENGTHS = st.integers(1, 12)
_LENGTHS = st.lists(
    st.one_of(st.integers(0, 40), st.sampled_from([1, 2, 9, 17, 25])), max_size=40
)


def _examples(lengths):
    """Every token of its own kind, so that each can be found again."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    return Examples(tokens, tokens % 3 != 0, offsets)


def _rows(lengths, row_length, strategy="best_fit", **source):
    source = mixture.Source("a", _examples(lengths), **source)
    return mixture.pack_sources([source], row_length, strategy)[0]


def _expected_targets(examples):
    is_first = np.isin(np.arange(len(examples.tokens)), examples.offsets[:-1])
    return examples.tokens[~is_first]


@pytest.mark.parametrize("strategy", mixture.STRATEGIES)
@hypothesis.given(lengths=_LENGTHS, row_length=_ROW_LENGTHS, seed=st.integers(0, 9))
def test_every_target_occurs_once_after_its_own_input(
    strategy, lengths, row_length, seed
):
    examples = _examples(lengths)
    plan = mixture.pack(examples.lengths, row_length, strategy, seed)
    rows = mixture.PackedRows(mixture.Source("a", examples), 7, plan, pad_id=0)
    targets = []
    for number in range(len(rows)):
        row = rows[number]
        real = row["segment_ids"] > 0
        targets += row["targets"][real].tolist()
        np.testing.assert_array_equal(row["tokens"][real] + 1, row["targets"][real])
        # Padding stands at the end only, and is nothing.
        assert real[0]
        assert not np.diff(real.astype(int)).clip(0).any()
        for name in row.keys() - {"source_ids"}:
            assert not row[name][~real].any()
        # A piece's positions count from 0, and its tokens follow one another.
        for segment in range(1, row["segment_ids"].max() + 1):
            piece = row["segment_ids"] == segment
            np.testing.assert_array_equal(
                row["positions"][piece], np.arange(piece.sum())
            )
            assert (np.diff(row["tokens"][piece]) == 1).all()
        loss_mask = examples.loss_mask[row["targets"][real] - 1]
        np.testing.assert_array_equal(row["loss_mask"][real], loss_mask)
        assert (row["source_ids"] == 7).all()
    np.testing.assert_array_equal(np.sort(targets), _expected_targets(examples))


@hypothesis.given(lengths=_LENGTHS, row_length=_ROW_LENGTHS)
def test_split_pads_the_last_row_only(lengths, row_length):
    plan = mixture.pack(np.array(lengths, int), row_length, "split")
    targets = sum(max(length - 1, 0) for length in lengths)
    assert len(plan) == -(-targets // row_length)


@hypothesis.given(lengths=_LENGTHS, row_length=_ROW_LENGTHS)
def test_best_fit_cuts_only_what_is_longer_than_a_row(lengths, row_length):
    plan = mixture.pack(np.array(lengths, int), row_length, "best_fit")
    pieces = np.bincount(plan.example, minlength=len(lengths))
    for length, count in zip(lengths, pieces, strict=True):
        assert count == -(-max(length - 1, 0) // row_length)
    # No two rows could have been one.
    filled = np.add.reduceat(plan.length, plan.row_splits[:-1]) if len(plan) else []
    assert sum(np.sort(filled)[:2]) > row_length or len(filled) < 2


def test_best_fit_is_quick_and_tight():
    rng = np.random.default_rng(0)
    lengths = 2 + rng.lognormal(5, 1, 100_000).astype(int)
    plan = mixture.pack(lengths, 1024, "best_fit")
    assert plan.length.sum() > 0.999 * len(plan) * 1024


@pytest.mark.parametrize("strategy", mixture.STRATEGIES)
def test_packing_follows_its_seed(strategy):
    lengths = np.arange(2, 60)
    one, same, other = (mixture.pack(lengths, 16, strategy, s) for s in (0, 0, 1))
    np.testing.assert_array_equal(one.example, same.example)
    assert (one.example[:20] != other.example[:20]).any()


def test_neighbours_do_not_stay_together():
    plan = mixture.pack(np.full(1000, 5), 8, "best_fit")
    first, second = plan.example.reshape(-1, 2).T
    assert (abs(first - second) == 1).mean() < 0.05


def test_weights_are_the_mask_times_the_objective():
    objectives = {"ntp": 0.5, "selective": 2.0}
    rows = _rows([9, 4], 8, objectives=objectives)
    for number in range(len(rows)):
        row = rows[number]
        for name in config.OBJECTIVES:
            expected = objectives.get(name, 0.0) * row["loss_mask"]
            np.testing.assert_array_equal(row[f"{name}_weights"], expected)
        assert all(array.shape == (8,) for array in row.values())
        assert {str(array.dtype) for array in row.values()} == {"int32", "float32"}
        assert {name: array.dtype for name, array in row.items()} == {
            name: array.dtype for name, array in rows.empty_row().items()
        }


def test_rows_are_cheap_to_ship():
    rows = _rows([1000] * 100, 1000)
    pickled = pickle.dumps(rows)
    assert len(pickled) < 0.1 * rows.source.examples.tokens.nbytes
    for name, array in pickle.loads(pickled)[3].items():
        np.testing.assert_array_equal(array, rows[3][name])


def _mixture(shares=(0.5, 0.3, 0.2), row_length=32, seed=0):
    rng = np.random.default_rng(5)
    spans = [(2, 200), (2, 20), (30, 40), (5, 9), (5, 9)]
    sources = [
        mixture.Source(f"source {i}", _examples(rng.integers(*span, 50)), share)
        for i, (share, span) in enumerate(zip(shares, spans, strict=False))
    ]
    return mixture.pack_sources(sources, row_length, "best_fit", seed)


def _read(dataset, count):
    iterator = iter(dataset)
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def _assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


@pytest.mark.parametrize("shares", [(0.5, 0.3, 0.2), (5, 0, 95), (1, 1, 1e-3)])
def test_tokens_have_the_shares_asked_for(shares):
    rows = _mixture(shares)
    report = mixture.describe(rows, 1600)
    asked = np.array(shares) / sum(shares)
    delivered = np.array([source["share_delivered"] for source in report])
    # A row a source, of 1600.
    np.testing.assert_allclose(delivered, asked, atol=3 / 1600)
    np.testing.assert_allclose([source["share_asked"] for source in report], asked)

    batches = _read(mixture.mixture(rows, 16, seed=0), 100)
    read = np.zeros(3)
    num_loss = np.zeros(3)
    for batch in batches:
        source_ids = batch["source_ids"][:, 0]
        read += np.bincount(source_ids, minlength=3)
        num_loss += np.bincount(source_ids, batch["loss_mask"].sum(axis=1), minlength=3)
    epochs = [source["epochs"] * source["rows"] for source in report]
    np.testing.assert_allclose(read, epochs)
    # The last epoch of a source is unfinished, and its rows are not all alike.
    rows_off = 3 + np.array([source["rows"] for source in report])
    assert (abs(num_loss - num_loss.sum() * delivered) <= rows_off * 32).all()


def test_ten_million_tokens_have_the_shares_asked_for():
    shares = (0.55, 0.3, 0.15)
    rng = np.random.default_rng(0)
    sources = [
        mixture.Source(f"source {i}", _examples(rng.integers(*span, 3000)), share)
        for i, (share, span) in enumerate(
            zip(shares, [(2, 3000), (2, 300), (100, 120)])
        )
    ]
    packed = mixture.pack_sources(sources, 1024, "best_fit")
    num_loss = np.zeros(3)
    for batch in mixture.mixture(packed, 64, seed=0):
        counts = batch["loss_mask"].sum(axis=1)
        num_loss += np.bincount(batch["source_ids"][:, 0], counts, minlength=3)
        if num_loss.sum() > 1e7:
            break
    assert (abs(num_loss / num_loss.sum() - shares) < 0.005).all()


@pytest.mark.parametrize("batch_size", [1, 8])
def test_every_token_is_read_as_often_as_its_source_says(batch_size):
    rng = np.random.default_rng(2)
    epochs = (3, 1, 2)
    sources = [
        mixture.Source(f"source {i}", _examples(rng.integers(2, 40, 30)), 1.0, epochs=n)
        for i, n in enumerate(epochs)
    ]
    packed = mixture.pack_sources(sources, 32, "split")
    read = [[], [], []]
    for batch in mixture.mixture(packed, batch_size, seed=0):
        for row, number in enumerate(batch["source_ids"][:, 0]):
            real = batch["segment_ids"][row] > 0
            read[number] += batch["targets"][row][real].tolist()
        assert batch["tokens"].shape == (batch_size, 32)
    for number, times in enumerate(epochs):
        expected = np.repeat(_expected_targets(sources[number].examples), times)
        np.testing.assert_array_equal(np.sort(read[number]), np.sort(expected))


def _loss_tokens(batches):
    """Loss tokens of each of two sources, batch by batch, [batches, 2]."""
    return np.array(
        [
            np.bincount(
                batch["source_ids"][:, 0], batch["loss_mask"].sum(axis=1), minlength=2
            )
            for batch in batches
        ]
    )


def test_a_budget_of_tokens_is_kept_to_a_row():
    sources = [
        mixture.Source("a", _examples([30] * 40), 1.0, epochs=1, max_tokens=200),
        mixture.Source("b", _examples([30] * 40), 1.0),
    ]
    packed = mixture.pack_sources(sources, 32, "split")
    num_loss = _loss_tokens(_read(mixture.mixture(packed, 4, seed=0), 30))
    per_row = sources[0].examples.num_loss_tokens / len(packed[0])
    assert 200 / per_row <= mixture.describe(packed, 120)[0]["epochs"] * len(packed[0])
    # The rows of a source are not all alike: by so much may any of them differ.
    off = max(
        abs(packed[0][i]["loss_mask"].sum() - per_row) for i in range(len(packed[0]))
    )
    assert abs(num_loss[:, 0].sum() - 200) <= per_row + off * (200 / per_row + 1)
    assert num_loss[-10:, 0].sum() == 0


def test_shares_move_to_the_last_ones():
    sources = [
        mixture.Source("a", _examples([30] * 40), 0.9, final_share=0.1),
        mixture.Source("b", _examples([30] * 40), 0.1, final_share=0.9),
    ]
    packed = mixture.pack_sources(sources, 32, "split")
    dataset = mixture.mixture(packed, 10, seed=0, num_rows=2000)
    num_loss = _loss_tokens(_read(dataset, 240))

    def share(part):
        return num_loss[part, 1].sum() / num_loss[part].sum()

    assert share(slice(0, 20)) == pytest.approx(0.14, abs=0.02)
    assert share(slice(0, 200)) == pytest.approx(0.5, abs=0.01)
    assert share(slice(200, 240)) == pytest.approx(0.9, abs=0.01)
    report = mixture.describe(packed, 2000)
    assert report[0]["share_delivered"] == pytest.approx(0.5, abs=0.01)


def test_the_size_of_batches_may_change_on_the_way():
    rows = _mixture()
    whole = _read(mixture.mixture(rows, 4, seed=0), 12)
    wanted = np.concatenate([batch["tokens"] for batch in whole])
    first = _read(mixture.mixture(rows, 8, seed=0), 3)
    then = _read(mixture.mixture(rows, 12, seed=0, first_row=24), 2)
    read = np.concatenate([batch["tokens"] for batch in first + then])
    np.testing.assert_array_equal(read, wanted)


def test_a_source_without_share_is_left_out_and_keeps_its_number():
    rows = _mixture((1, 0, 1))
    seen = {
        int(i)
        for b in _read(mixture.mixture(rows, 8, 0), 20)
        for i in b["source_ids"][:, 0]
    }
    assert seen == {0, 2}
    left_out = mixture.describe(rows, 160)[1]
    assert left_out["name"] == "source 1"
    assert left_out["share_delivered"] == left_out["epochs"] == 0


def test_every_epoch_is_a_new_permutation():
    (rows,) = _mixture((1,))
    batches = _read(mixture.mixture([rows], 1, seed=0), 3 * len(rows))
    firsts = [int(batch["tokens"][0, 0]) for batch in batches]
    epochs = np.reshape(firsts, (3, len(rows)))
    expected = sorted(int(rows[i]["tokens"][0]) for i in range(len(rows)))
    for epoch in epochs:
        assert sorted(epoch.tolist()) == expected
    assert (epochs[0] != epochs[1]).any()
    assert (epochs[1] != epochs[2]).any()
    assert mixture.describe([rows], 3 * len(rows))[0]["epochs"] == 3


def test_one_row_is_enough():
    rows = _rows([5], 8)
    (batch,) = _read(mixture.mixture([rows], 4, seed=0), 1)
    assert (batch["tokens"] == rows[0]["tokens"]).all()


def test_the_stream_follows_its_seed():
    rows = _mixture()
    first = _read(mixture.mixture(rows, 8, seed=0), 3)
    _assert_same(first, _read(mixture.mixture(rows, 8, seed=0), 3))
    other = _read(mixture.mixture(rows, 8, seed=1), 3)
    assert any(
        (a["tokens"] != b["tokens"]).any() for a, b in zip(first, other, strict=True)
    )


@pytest.mark.parametrize("num_hosts", [2, 4])
def test_global_batches_are_the_same_for_any_number_of_hosts(num_hosts):
    rows = _mixture()
    whole = _read(mixture.mixture(rows, 8, seed=0), 5)
    parts = [
        _read(mixture.mixture(rows, 8, 0, num_hosts, host), 5)
        for host in range(num_hosts)
    ]
    for batch, *shares in zip(whole, *parts, strict=True):
        joined = {name: np.concatenate([s[name] for s in shares]) for name in batch}
        _assert_same([joined], [batch])


def test_the_stream_can_be_entered_anywhere():
    rows = _mixture()
    whole = _read(mixture.mixture(rows, 8, seed=0), 9)
    _assert_same(_read(mixture.mixture(rows, 8, 0, first_row=48), 3), whole[6:])
    # Another number of hosts resumes where one stopped.
    second = _read(mixture.mixture(rows, 8, 0, 2, 1, first_row=48), 1)[0]
    np.testing.assert_array_equal(second["tokens"], whole[6]["tokens"][4:])


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_resume_is_exact(num_workers):
    def start():
        return iter(mixture.mixture(_mixture(), 8, seed=0, num_workers=num_workers))

    whole = _read(mixture.mixture(_mixture(), 8, seed=0), 9)
    iterator = start()
    _assert_same([next(iterator) for _ in range(5)], whole[:5])
    state = iterator.get_state()
    _assert_same([next(iterator)], whole[5:6])
    iterator.close()
    fresh = start()
    fresh.set_state(state)
    _assert_same([next(fresh) for _ in range(4)], whole[5:])
    fresh.close()


def test_resume_is_exact_after_every_batch():
    finite = mixture.mixture(_mixture(), 8, seed=0)
    grain.experimental.assert_equal_output_after_checkpoint(
        grain.experimental.LimitIterDataset(finite, 4)
    )


def test_the_number_of_workers_changes_nothing():
    batches = _read(mixture.mixture(_mixture(), 8, seed=0), 7)
    for num_workers in (1, 3):
        dataset = mixture.mixture(_mixture(), 8, 0, num_workers=num_workers)
        _assert_same(_read(dataset, 7), batches)


def test_evaluation_reads_every_row_once_in_batches_of_one_shape():
    examples = _examples(list(range(1, 40)))
    documents = dataclasses.replace(examples, loss_mask=examples.tokens > 0)
    rows = mixture.pack_text("held out", documents, 16)
    targets = []
    batches = list(mixture.evaluation_batches(rows, 8))
    assert len(batches) == -(-len(rows) // 8)
    for batch in batches:
        assert {a.shape for a in batch.values()} == {(8, 16)}
        targets += batch["targets"][batch["segment_ids"] > 0].tolist()
    np.testing.assert_array_equal(
        np.sort(targets), _expected_targets(rows.source.examples)
    )


@pytest.mark.parametrize("row_length", [8, 19, 64])
def test_what_is_judged_in_its_context_is_never_cut(row_length):
    examples = _examples([3, 20, 1, 7])
    rows = mixture.pack_text("exam", examples, row_length)
    assert rows.plan.row_length == max(row_length, 19)
    pieces = dict(zip(rows.plan.example.tolist(), rows.plan.length.tolist()))
    assert pieces == {0: 2, 1: 19, 3: 6}
    mixture.pack_text("exam", examples, row_length, max_positions=19)
    for places, named in (
        ((), "exam: example 2"),
        (["f:1", "f:2", "f:3", "f:4"], "f:2"),
        (["f:1", "f:2"], "f:1"),  # pairs: two examples a record
    ):
        if row_length < 19:
            with pytest.raises(InputError, match=f"{named}: has 19 tokens"):
                mixture.pack_text("exam", examples, row_length, 18, places)


def test_targets_know_their_example():
    rows = mixture.pack_text("exam", _examples([3, 20, 1, 7]), 8)
    offsets = rows.source.examples.offsets
    for number in range(len(rows)):
        row, owners = rows[number], rows.example_ids(number)
        real = row["segment_ids"] > 0
        assert (owners[~real] == -1).all()
        found = np.searchsorted(offsets, row["targets"][real] - 1, side="right") - 1
        np.testing.assert_array_equal(owners[real], found)
    assert (rows.example_ids(len(rows)) == -1).all()


def test_describe_counts():
    rows = _rows([9, 1, 4], 8)
    (report,) = mixture.describe([rows], 3)
    assert report == {
        "name": "a",
        "documents": 3,
        "tokens": 14,
        "loss_tokens": int(sum(rows[i]["loss_mask"].sum() for i in range(2))),
        "rows": 2,
        "pieces": 2,
        "padding": 5 / 16,
        "share_asked": 1.0,
        "share_delivered": 1.0,
        "epochs": 1.5,
    }


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ((1, -1), "source 1: share is -1"),
        ((float("nan"), 1), "source 0: share is nan"),
        ((float("inf"), 1), "source 0: share is inf"),
        ((0, 0), "the share of every source is 0"),
    ],
)
def test_a_bad_share_is_named(shares, words):
    with pytest.raises(InputError, match=words):
        _mixture(shares)


def test_a_source_with_nothing_to_learn_is_named():
    with pytest.raises(InputError, match="source a: has no loss tokens"):
        _rows([1, 1], 8)
    assert len(_rows([1, 9], 8)) == 1


@hypothesis.given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30),
    row_length=st.integers(4, 24),
)
def test_by_format_only_documents_are_cut_where_they_would_fit(lengths, row_length):
    examples = [_examples(lengths) for _ in range(2)]
    sources = [
        mixture.Source("documents", examples[0], is_cut=True),
        mixture.Source("answers", examples[1]),
    ]
    documents, answers = mixture.pack_sources(sources, row_length, "by_format")
    pieces = np.bincount(answers.plan.example, minlength=len(lengths))
    targets = np.array(lengths) - 1
    np.testing.assert_array_equal(pieces, -(-targets // row_length))
    full = documents.plan.row_splits
    filled = np.add.reduceat(documents.plan.length, full[:-1])
    assert (filled[:-1] == row_length).all()


@pytest.mark.parametrize(
    ("row_length", "strategy", "words"),
    [
        (8, "next_fit", "packing 'next_fit' is unknown"),
        (0, "split", "row_length is 0"),
    ],
)
def test_a_bad_packing_setting_is_named(row_length, strategy, words):
    with pytest.raises(InputError, match=words):
        mixture.pack(np.array([5]), row_length, strategy)


def test_hosts_must_share_the_batch_evenly():
    with pytest.raises(
        InputError, match="batch_size is 6, must be a multiple of the 4"
    ):
        mixture.mixture(_mixture(), 6, 0, num_hosts=4)


@st.composite
def _pair_lengths(draw):
    row_length = draw(st.integers(6, 40))
    side = st.integers(2, row_length // 2 + 1)
    return row_length, draw(st.lists(st.tuples(side, side), max_size=30))


@hypothesis.given(_pair_lengths(), st.integers(0, 3))
def test_pairs_lie_whole_and_in_order_in_one_row(case, seed):
    row_length, pairs = case
    lengths = np.array(pairs, int).reshape(-1)
    plan = mixture.pack_pairs(lengths, row_length, seed)
    np.testing.assert_array_equal(np.sort(plan.example), np.arange(len(lengths)))
    np.testing.assert_array_equal(plan.example[1::2], plan.example[::2] + 1)
    assert not np.any(plan.example[::2] % 2)
    np.testing.assert_array_equal(plan.length, lengths[plan.example] - 1)
    assert not plan.start.any()
    for first, last in itertools.pairwise(plan.row_splits):
        assert first % 2 == last % 2 == 0
        assert 0 < plan.length[first:last].sum() <= row_length


def _sided(lengths, loss_from):
    return Examples.collect(
        (np.arange(n) + 100 * i, np.arange(n) >= start)
        for i, (n, start) in enumerate(zip(lengths, loss_from))
    )


def test_what_is_too_long_is_cut_dropped_or_refused():
    # Pairs of 4 + 4, 3 + 9 and 9 + 9 targets; the prompt of the last fills half a row.
    examples = _sided([5, 5, 4, 10, 10, 10], [2, 2, 2, 2, 6, 6])
    kept, counts = mixture.fit(examples, 8, "truncate", group=2)
    np.testing.assert_array_equal(kept.lengths, [5, 5, 4, 5])
    np.testing.assert_array_equal(kept.tokens[-5:], np.arange(5) + 300)
    assert counts == {"split": 0, "truncated": 1, "dropped": 1}
    kept, counts = mixture.fit(examples, 8, "drop", group=2)
    np.testing.assert_array_equal(kept.lengths, [5, 5])
    assert counts == {"split": 0, "truncated": 0, "dropped": 2}
    kept, counts = mixture.fit(examples, 8, "split", group=2)
    assert kept is examples
    with pytest.raises(InputError, match="f:2: 12 tokens, data.row_length is 8"):
        mixture.fit(examples, 8, "refuse", ["f:1", "f:2", "f:3"], group=2)
    kept, counts = mixture.fit(examples, 9, "refuse")
    assert kept is examples
    assert not any(counts.values())


def test_rows_of_pairs_know_their_reference():
    examples = _sided([5, 4, 6, 3, 3, 3], [2] * 6)
    logps = -np.arange(1, 7, dtype=np.float32)
    source = mixture.Source("p", examples, has_pairs=True, reference_logps=logps)
    (rows,) = mixture.pack_sources([source], 12)
    seen = {}
    for number in range(len(rows)):
        row = rows[number]
        assert row["reference_logps"].shape == (rows.num_segments,)
        owners = rows.example_ids(number)
        for segment in range(1, rows.num_segments + 1):
            mine = owners[row["segment_ids"] == segment]
            value = row["reference_logps"][segment - 1]
            if not len(mine):
                assert value == 0
                continue
            assert len(set(mine)) == 1
            assert mine[0] % 2 == (segment - 1) % 2  # the chosen answer comes first
            seen[mine[0]] = value
    assert seen == dict(enumerate(logps))


@hypothesis.given(
    st.lists(st.integers(0, 400), min_size=1, max_size=30),
    st.integers(1, 5000),
    st.booleans(),
)
def test_what_is_measured_keeps_to_its_tokens(lengths, budget, is_given):
    examples = mixture.Examples.collect(
        (np.arange(n) + 1000 * i, np.arange(n) >= (n // 2 if is_given else 0))
        for i, n in enumerate(lengths)
    )
    found, kept = mixture.within(examples, budget)
    assert len(kept) == len(found)
    assert found.num_tokens <= budget or len(found) == 1
    again, _ = mixture.within(found, budget)
    np.testing.assert_array_equal(again.tokens, found.tokens)
    # Beginnings of texts, in their order; the whole of them where some are given.
    owners = []
    for i in range(len(found)):
        tokens, _ = found.read(*found.offsets[i : i + 2])
        if len(tokens):
            owner = tokens[0] // 1000
            owners.append(owner)
            np.testing.assert_array_equal(tokens, np.arange(len(tokens)) + 1000 * owner)
            if examples.is_continuation:
                assert len(tokens) == lengths[owner]
    assert owners == sorted(set(owners))
    if sum(lengths) <= budget:
        assert found is examples
    elif not examples.is_continuation and len(found) == len(examples) > 1:
        # None could be longer: one more token of each that is cut is too many.
        cut = np.sum(found.lengths < examples.lengths)
        assert cut
        assert found.num_tokens + cut > budget


@hypothesis.given(
    st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(1, 2000)
)
def test_what_is_left_out_is_left_out_all_over(sizes, budget):
    kept = mixture.spread(np.array(sizes), budget)
    assert (np.diff(kept) > 0).all()
    assert len(kept)
    total = np.array(sizes)[kept].sum()
    assert total <= budget or len(kept) == 1
    if total + max(sizes) <= budget:
        assert len(kept) == len(sizes)
    # The three-gap theorem: no gap is more than a few times the mean.
    gaps = np.diff([-1, *kept, len(sizes)])
    assert gaps.max() <= 3.7 * (len(sizes) + 1) / len(kept) + 1
    np.testing.assert_array_equal(mixture.spread(np.array(sizes), 0), range(len(sizes)))
