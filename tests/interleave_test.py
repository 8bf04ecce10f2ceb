"""The order of rows from several sources."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixcpt_jax.data import interleave
from mixcpt_jax.data.interleave import Interleaving

SHARES = st.lists(st.floats(0.01, 1), min_size=1, max_size=4)


@pytest.fixture(params=[16, 4096], autouse=True, scope="module")
def block(request):
    """Few rows need several blocks, and one that is far from full."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interleave, "_BLOCK", request.param)
        yield


def integral(shares, final, end, limits, num_rows):
    """C_s by summing small steps; a source that has given all leaves its share."""
    steps = 200
    given = np.zeros(len(shares))
    start, final = (np.array(x) / sum(x) for x in (shares, final or shares))
    for i in range(num_rows * steps):
        moved = min(i / steps / end, 1.0) if end else 1.0
        share = (1 - moved) * start + moved * final
        share = np.where(given < limits, share, 0.0)
        if not share.sum():
            break
        given = np.minimum(given + share / share.sum() / steps, limits)
    return given


@given(st.data(), SHARES, st.booleans(), st.booleans())
def test_every_source_is_within_a_row_of_its_due(data, shares, anneals, is_limited):
    size = len(shares)
    lists = st.lists(st.floats(0.01, 1), min_size=size, max_size=size)
    final = data.draw(lists) if anneals else None
    limits = [math.inf] * size
    if is_limited:
        numbers = st.lists(st.integers(1, 40), min_size=size, max_size=size)
        limits = data.draw(numbers)
    end = data.draw(st.sampled_from([1, 20, 50])) if anneals else 0
    order = Interleaving(shares, final, end, limits if is_limited else None)
    num_rows = min(60, int(min(order.num_rows, 60)))
    counts = np.zeros(size, int)
    for row in range(num_rows):
        source, nth = order[row]
        assert nth == counts[source]
        counts[source] += 1
        np.testing.assert_array_equal(order.given(row + 1), counts)
    due = integral(shares, final, end, np.array(limits, float), num_rows)
    # Half a row for rounding, and as much again for each source that is rounded the
    # other way, since rows and not time are counted here.
    assert np.abs(counts - due).max() <= 0.5 + size / 2 + 0.05


@given(
    st.lists(st.tuples(st.floats(0.01, 1), st.integers(1, 200)), min_size=1, max_size=5)
)
def test_limits_are_met_exactly_and_end_the_stream(sources):
    shares, limits = zip(*sources)
    order = Interleaving(shares, limits=limits)
    assert order.num_rows == sum(limits)
    rows = [order[row] for row in range(sum(limits))]
    assert sorted(rows) == [
        (s, k) for s, limit in enumerate(limits) for k in range(limit)
    ]
    with pytest.raises(IndexError):
        order[sum(limits)]


def test_shares_move_from_the_first_to_the_last():
    order = Interleaving([1, 0], [0, 1], 1000)
    sources = np.array([order[row][0] for row in range(1500)])
    assert sources[:20].sum() <= 1
    assert sources[1001:].all()
    assert abs(sources[:1000].mean() - 0.5) < 0.005
    assert abs(sources[250:500].mean() - 0.375) < 0.02


def test_rows_far_away_are_found_at_once():
    order = Interleaving([0.3, 0.6999, 0.0001])
    far = 10**12
    first = [order[row] for row in range(far, far + 2000)]
    again = [order[row] for row in reversed(range(far, far + 2000))]
    assert first == again[::-1]
    given = order.given(far)
    assert given.sum() == far
    assert np.abs(given / far - [0.3, 0.6999, 0.0001]).max() < 1e-9


def test_copies_in_other_processes_say_the_same():
    order = Interleaving([1, 2], [3, 1], 50, [40, 60])
    copy = pickle.loads(pickle.dumps(order))
    assert [order[i] for i in range(100)] == [copy[i] for i in range(100)]


@given(st.data(), SHARES, st.booleans())
def test_rows_to_limits_are_the_fewest_that_give_them_all(data, shares, anneals):
    size = len(shares)
    limits = data.draw(
        st.lists(
            st.one_of(st.integers(1, 60), st.just(math.inf)),
            min_size=size,
            max_size=size,
        )
    )
    final = shares[::-1] if anneals else None
    order = Interleaving(shares, final, 30 if anneals else 0, limits)
    limited = np.flatnonzero(np.isfinite(limits))
    if not len(limited):
        assert order.rows_to_limits() == math.inf
        return
    rows = int(order.rows_to_limits())
    wanted = np.array(limits)[limited]
    assert (order.given(rows)[limited] == wanted).all()
    assert (order.given(rows - 1)[limited] < wanted).any()
