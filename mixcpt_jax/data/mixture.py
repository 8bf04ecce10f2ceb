"""Examples to batches: packing, a weighted mixture, hosts and workers, exact resume.

The whole stream is planned from the lengths of the examples. Packing is computed once.
After that, row `i` of the stream is a function of (sources, seed, i) alone, so it is the
same for any number of hosts and worker processes and any batch size, and reading can start
at any row. `interleave` determines which source gives row `i`; `token_weights` gives the
weight of each of its tokens.

Terms: an example of `n` tokens has `n - 1` targets. A piece is a run of one example's
targets together with their inputs. A row is one or more pieces, then padding. A pair is two
examples, `2 i` and `2 i + 1` of its source: the chosen and the rejected answer to one
prompt. A pair lies in one row, as two consecutive pieces.
"""

import bisect
import dataclasses
import functools
import hashlib
import math
import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np
from absl import flags, logging

from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import token_weights
from mixcpt_jax.data.formats import Examples
from mixcpt_jax.data.interleave import Interleaving
from mixcpt_jax.data.teacher_cache import TeacherRows
from mixcpt_jax.data.token_cache import PreparedExamples
from mixcpt_jax.runtime import terminal

STRATEGIES = ("best_fit", "split")

# Rows of the stream. Grain computes lengths in floating point, which overflows at the
# maximum integer, the length of a dataset that repeats endlessly.
_ENDLESS = 2**62


@dataclasses.dataclass(frozen=True)
class Source:
    """Examples and their part in the mixture.

    Attributes:
      name: for logs and errors.
      examples: what it holds.
      share: its share of the loss tokens relative to the other sources (any positive
        scale); 0 excludes it from the stream, but it keeps its name and number.
      final_share: its share at the end of the stream; shares change linearly with the row
        number. None: the share is constant.
      epochs: the maximum number of times that each of its rows occurs in the stream; 0: no
        limit.
      max_tokens: the maximum number of its loss tokens in the stream, to within a row; 0:
        no limit.
      objectives: objective -> weight on its tokens, see `token_weights`.
      has_pairs: its examples are pairs.
      is_cut: packing 'by_format' may cut its examples anywhere.
      reference_logps: log-probability of each example's loss tokens under the reference,
        nats, float32 [examples]; None: the step computes it.
      teacher_rows: teacher outputs of its rows; None: the step computes them.
    """

    name: str
    examples: Examples | PreparedExamples
    share: float = 1.0
    final_share: float | None = None
    epochs: float = 0.0
    max_tokens: int = 0
    objectives: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"lssd": 1.0}
    )
    has_pairs: bool = False
    is_cut: bool = False
    reference_logps: np.ndarray | None = None
    teacher_rows: TeacherRows | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class PackingPlan:
    """The pieces of each row.

    Piece `p` reads `tokens[start:start + length]` of its example and predicts
    `tokens[start + 1:start + length + 1]`. Row `r` is the pieces
    `row_splits[r]:row_splits[r + 1]`.

    Attributes:
      row_length: targets that fit a row.
      example, start, length: int64 [pieces].
      row_splits: int64 [rows + 1].
    """

    row_length: int
    example: np.ndarray
    start: np.ndarray
    length: np.ndarray
    row_splits: np.ndarray

    def __len__(self) -> int:
        return len(self.row_splits) - 1

    @property
    def max_pieces(self) -> int:
        """The largest number of pieces in a row."""
        return int(np.diff(self.row_splits).max(initial=0))

    @property
    def fingerprint(self) -> str:
        """A hash of the plan, 16 hex digits."""
        digest = hashlib.blake2b(f"{self.row_length}".encode(), digest_size=8)
        for array in (self.example, self.start, self.length, self.row_splits):
            digest.update(np.ascontiguousarray(array, np.int64))
        return digest.hexdigest()


def fit(
    examples: Examples | PreparedExamples,
    row_length: int,
    rule: str,
    places: Sequence[str] = (),
    group: int = 1,
) -> tuple[Examples | PreparedExamples, dict[str, int]]:
    """Applies a rule to groups of examples that are longer than a row.

    Args:
      examples: in groups of `group` examples; each group must fit one row.
      row_length: targets in a row.
      rule: 'split' changes nothing: `pack` continues examples in the next row.
        'truncate' truncates each example of an overlong group to `row_length / group`
        targets, and drops the group if one of its examples has no loss token left. 'drop'
        drops the group, 'refuse' raises.
      places: where each group comes from, for the error.
      group: 1, or 2 for pairs.

    Returns:
      The examples, and how many groups are `split`, `truncated` and `dropped`.

    Raises:
      InputError: the rule is 'refuse' and a group is too long.
    """
    counts = {"split": 0, "truncated": 0, "dropped": 0}
    targets = np.maximum(examples.lengths - 1, 0).reshape(-1, group).sum(1)
    is_long = targets > row_length
    if rule == "split" or not is_long.any():
        return examples, counts | {"split": int(is_long.sum())}
    if rule == "refuse":
        number = int(is_long.argmax())
        place = f"{places[number]}: " if places else ""
        raise InputError(
            f"{place}{targets[number]} tokens, data.row_length is {row_length}; make it "
            "larger or set data.overlong to truncate or drop"
        )
    if isinstance(examples, PreparedExamples):
        examples = examples.load()
    lengths = examples.lengths.reshape(-1, group)
    is_kept = ~is_long
    if rule == "truncate":
        lengths[is_long] = np.minimum(lengths[is_long], row_length // group + 1)
        starts = examples.offsets[:-1].reshape(-1, group)
        for number in np.flatnonzero(is_long):
            is_kept[number] = all(
                examples.loss_mask[start + 1 : start + length].any()
                for start, length in zip(starts[number], lengths[number], strict=True)
            )
    members = np.flatnonzero(np.repeat(is_kept, group))
    counts["truncated"] = int((is_long & is_kept).sum())
    counts["dropped"] = int((~is_kept).sum())
    return examples.take(members, lengths.ravel()[members]), counts


# Texts are not cut below this many tokens, so that measured tokens still have context.
_LEAST_TEXT = 128


def within(
    examples: Examples, max_tokens: int, group: int = 1
) -> tuple[Examples, np.ndarray]:
    """Limits the number of measured tokens; the selection is the same in every run.

    Plain texts are truncated to one length: the greatest with which all of them stay within
    the limit, but at least 128 tokens. If that is not enough, some texts are dropped.
    Groups, and examples that begin with given tokens, are never cut, only dropped. Those
    that remain are spread evenly over the file.

    Args:
      examples: in groups of `group` that are kept or dropped together.
      max_tokens: 0: no limit. At least one group is kept.
      group: 1, or 2 for pairs.

    Returns:
      The examples, and the indices of the kept groups.
    """
    lengths = examples.lengths
    if not max_tokens or lengths.sum() <= max_tokens:
        return examples, np.arange(len(examples) // max(group, 1))
    if not examples.is_continuation:
        # If the k longest texts are cut to one length: that length, for each k.
        ordered = np.sort(lengths)
        shared = (max_tokens - np.cumsum(ordered) + ordered) // np.arange(
            len(ordered), 0, -1
        )
        fits = np.flatnonzero(ordered > shared)
        length = shared[fits[0]] if len(fits) else ordered[-1]
        lengths = np.minimum(lengths, max(length, _LEAST_TEXT))
    kept = spread(lengths.reshape(-1, group).sum(1), max_tokens)
    members = (kept[:, None] * group + np.arange(group)).ravel()
    return examples.take(members, lengths[members]), kept


def of_context(
    examples: Examples, max_positions: int | None, group: int = 1
) -> tuple[Examples, np.ndarray]:
    """Drops examples that must not be cut and are longer than the model's context.

    Args:
      examples: in groups of `group` that are kept or dropped together. Plain texts are all
        kept. If no group fits, all are kept, and `pack_text` refuses them.
      max_positions: targets that fit the context; None: any number.
      group: 1, or 2 for pairs.

    Returns:
      The examples, and the indices of the kept groups.
    """
    longest = (examples.lengths - 1).reshape(-1, max(group, 1)).max(axis=1)
    kept = np.arange(len(longest))
    if max_positions is None or not examples.is_continuation:
        return examples, kept
    fitting = kept[longest <= max_positions]
    if len(fitting) in (0, len(kept)):
        return examples, kept
    members = (fitting[:, None] * group + np.arange(group)).ravel()
    return examples.take(members), fitting


def spread(sizes: np.ndarray, budget: int) -> np.ndarray:
    """Selects items, spread evenly over all, whose sizes add up to at most a budget.

    Args:
      sizes: [items].
      budget: 0: no limit. At least one item is selected.

    Returns:
      The indices, ascending.
    """
    if not budget:
        return np.arange(len(sizes))
    # Multiples of the golden ratio, modulo 1, are spread evenly, whatever their number.
    order = np.argsort(np.arange(len(sizes)) * ((math.sqrt(5) - 1) / 2) % 1)
    count = np.searchsorted(np.cumsum(np.asarray(sizes)[order]), budget, side="right")
    return np.sort(order[: max(count, 1)])


def pack(
    lengths: np.ndarray, row_length: int, strategy: str = "best_fit", seed: int = 0
) -> PackingPlan:
    """Plans rows in which every target of every example occurs exactly once.

    Examples are shuffled first, so that neighbors in the source, such as the chapters of a
    book, share a row only by chance.

    Args:
      lengths: tokens of each example, int [examples]; fewer than 2 give no target.
      row_length: targets in a row.
      strategy: 'split' joins all examples and cuts at row boundaries: only the last row has
        padding. 'best_fit' cuts only examples that are longer than a row. It places the
        pieces, longest first, each into the fullest row that has room for it (Ding et al.
        2024, arXiv 2404.10830): no unnecessary cut, a little padding.
      seed: of the order.

    Raises:
      InputError: unknown strategy or a row length below 1.
    """
    if strategy not in STRATEGIES:
        raise InputError(
            f"packing {strategy!r} is unknown; use one of {list(STRATEGIES)}"
        )
    if row_length < 1:
        raise InputError(f"row_length is {row_length}, must be >= 1")
    order = np.random.default_rng(seed).permutation(len(lengths))
    targets = np.maximum(np.asarray(lengths, np.int64)[order] - 1, 0)
    ends = np.cumsum(targets)
    begins = ends - targets
    total = int(targets.sum())
    # Positions in the examples' joined targets at which a piece begins.
    if strategy == "split":
        cuts = np.arange(0, total, row_length)
    else:
        per_example = -(-targets // row_length)
        nth = np.arange(per_example.sum()) - np.repeat(
            np.cumsum(per_example) - per_example, per_example
        )
        cuts = np.repeat(begins, per_example) + nth * row_length
    cuts = np.union1d(cuts, begins[targets > 0])
    length = np.diff(cuts, append=total)
    # Examples without targets begin where the next one does; `ends` differ.
    owner = np.searchsorted(ends, cuts, side="right")
    row = cuts // row_length if strategy == "split" else _best_fit(length, row_length)
    by_row = np.argsort(row, kind="stable")
    return PackingPlan(
        row_length=row_length,
        example=order[owner][by_row],
        start=(cuts - begins[owner])[by_row],
        length=length[by_row],
        row_splits=np.concatenate([[0], np.cumsum(np.bincount(row))]).astype(np.int64),
    )


def pack_pairs(lengths: np.ndarray, row_length: int, seed: int = 0) -> PackingPlan:
    """Plans rows of whole pairs, best fit as in `pack`.

    Args:
      lengths: tokens of each example, int [2 pairs]; a pair's targets fit a row.
      row_length, seed: as for `pack`.
    """
    targets_Px2 = np.asarray(lengths, np.int64).reshape(-1, 2) - 1
    order = np.random.default_rng(seed).permutation(len(targets_Px2))
    row = _best_fit(targets_Px2.sum(1)[order], row_length)
    pair = order[np.argsort(row, kind="stable")]
    return PackingPlan(
        row_length=row_length,
        example=(2 * pair[:, None] + np.arange(2)).reshape(-1),
        start=np.zeros(2 * len(pair), np.int64),
        length=targets_Px2[pair].reshape(-1),
        row_splits=np.concatenate([[0], np.cumsum(2 * np.bincount(row))]),
    )


def _best_fit(sizes: np.ndarray, row_length: int) -> np.ndarray:
    """The row of each piece, int64 [pieces]; sizes are 1 to `row_length`.

    Sizes are integers, so rows are grouped by their free space, and the best fit is one
    bisection in the sorted list of the free-space values.
    """
    row_of = np.empty(len(sizes), np.int64)
    rows_with_room = [[] for _ in range(row_length + 1)]
    rooms = []
    num_rows = 0
    longest_first = np.argsort(-sizes, kind="stable")
    for piece, size in zip(
        longest_first.tolist(), sizes[longest_first].tolist(), strict=True
    ):
        at = bisect.bisect_left(rooms, size)
        if at < len(rooms):
            room = rooms[at]
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                del rooms[at]
        else:
            room = row_length
            row = num_rows
            num_rows += 1
        row_of[piece] = row
        if room > size:
            if not rows_with_room[room - size]:
                bisect.insort(rooms, room - size)
            rows_with_room[room - size].append(row)
    return row_of


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PackedRows:
    """The rows of one source, by index; a grain random access data source.

    A row is a dict of arrays [row_length]:
      tokens, targets: int32 ids.
      positions: int32, from 0 in each piece, so they stay within the model's context.
      segment_ids: int32, 1, 2, ... for the pieces of the row, 0 for padding.
      source_ids: int32, the number of the source at every position, including padding.
      loss_mask: float32, 1 where the target is a loss token.
      ntp_weights, ..., one for each objective: float32, see `token_weights`.
    Rows of pairs with known `reference_logps` have one more array, [num_segments]:
      reference_logps: float32; index `i` is for segment `i + 1`; 0 after the last.
    Their segments `2 i + 1` and `2 i + 2` are a pair. Rows of a source with
    `teacher_rows` have the arrays of its `teacher_cache.Form`.

    Attributes:
      source: what is packed.
      source_id: its number in the mixture.
      plan: which pieces make up which row.
      pad_id: the token of padding.
      num_segments: the largest number of pieces in a row, of all sources.
      places: where examples are from, for errors; see `pack_text`.
    """

    source: Source
    source_id: int
    plan: PackingPlan
    pad_id: int
    num_segments: int = 0
    places: Sequence[str] = ()

    def place(self, example: int) -> str:
        """Where an example is from, for errors."""
        group, rest = divmod(len(self.source.examples), len(self.places) or 1)
        if not self.places or rest:
            return f"{self.source.name}: example {example + 1}"
        return self.places[example // group]

    def __len__(self) -> int:
        return len(self.plan)

    def num_batches(self, batch_size: int) -> int:
        """How many batches `evaluation_batches` yields."""
        return -(-len(self) // batch_size)

    def __repr__(self) -> str:
        # Grain compares it when an iterator's state is restored.
        return f"PackedRows({self.source.name}, {len(self)} rows)"

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        plan, examples = self.plan, self.source.examples
        pieces = slice(plan.row_splits[row], plan.row_splits[row + 1])
        length = plan.length[pieces]
        first = examples.offsets[plan.example[pieces]] + plan.start[pieces]

        arrays = self.empty_row()
        mask = arrays["loss_mask"]
        begin = 0
        for number, (start, size) in enumerate(zip(first, length, strict=True), 1):
            tokens, loss_mask = examples.read(start, start + size + 1)
            here = slice(begin, begin + size)
            arrays["tokens"][here] = tokens[:-1]
            arrays["targets"][here] = tokens[1:]
            arrays["positions"][here] = np.arange(size)
            arrays["segment_ids"][here] = number
            mask[here] = loss_mask[1:]
            begin += size
        arrays |= token_weights.of_row(mask, self.source.objectives)
        if self.source.reference_logps is not None:
            logps = self.source.reference_logps[plan.example[pieces]]
            arrays["reference_logps"][: len(logps)] = logps
        if self.source.teacher_rows is not None:
            arrays |= self.source.teacher_rows.read(row, plan.row_length)
        return arrays

    def example_ids(self, row: int) -> np.ndarray:
        """The example each target of a row belongs to, -1 for padding, [row_length]."""
        ids = np.full(self.plan.row_length, -1)
        if row < len(self):
            pieces = slice(*self.plan.row_splits[row : row + 2])
            owners = np.repeat(self.plan.example[pieces], self.plan.length[pieces])
            ids[: len(owners)] = owners
        return ids

    def empty_row(self) -> dict[str, np.ndarray]:
        """A row of padding: it has weight 0 in every sum."""
        shape = (self.plan.row_length,)
        arrays = {
            "tokens": np.full(shape, self.pad_id, np.int32),
            "targets": np.full(shape, self.pad_id, np.int32),
            "positions": np.zeros(shape, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
            "source_ids": np.full(shape, self.source_id, np.int32),
            "loss_mask": np.zeros(shape, np.float32),
        }
        arrays |= token_weights.of_row(arrays["loss_mask"], {})
        if self.source.reference_logps is not None:
            arrays["reference_logps"] = np.zeros(self.num_segments, np.float32)
        if self.source.teacher_rows is not None:
            arrays |= self.source.teacher_rows.form.empty(self.plan.row_length)
        return arrays


def pack_sources(
    sources: Sequence[Source],
    row_length: int,
    strategy: str = "best_fit",
    seed: int = 0,
    pad_id: int | None = None,
) -> list[PackedRows]:
    """Packs each source separately, so that a row has one source; numbers them in order.

    Args:
      sources: what to pack.
      row_length, seed: as for `pack`.
      strategy: as for `pack`; or 'by_format': 'split' for sources whose examples may be
        cut, 'best_fit' for the others.
      pad_id: the token of padding; None: 0.

    Raises:
      InputError: a share is negative or not finite, all are 0, or a source with a share
        has no loss tokens.
    """
    for source in sources:
        final = source.final_share
        if not 0 <= source.share < math.inf:
            raise InputError(
                f"source {source.name}: share is {source.share}, must be >= 0"
            )
        if final is not None and not 0 < final < math.inf:
            raise InputError(
                f"source {source.name}: final share is {final}, must be > 0"
            )
        if source.share and not source.examples.num_loss_tokens:
            raise InputError(
                f"source {source.name}: has no loss tokens; set its share to 0 or give it "
                "documents"
            )
    if not any(source.share for source in sources):
        raise InputError("the share of every source is 0; give one a share")
    plans = []
    for number, source in enumerate(sources):
        lengths, own_seed = source.examples.lengths, _seed(seed, number)
        by_format = "split" if source.is_cut else "best_fit"
        if source.has_pairs:
            plans.append(pack_pairs(lengths, row_length, own_seed))
        else:
            chosen = by_format if strategy == "by_format" else strategy
            plans.append(pack(lengths, row_length, chosen, own_seed))
    num_segments = max(plan.max_pieces for plan in plans)
    return [
        PackedRows(source, number, plan, pad_id or 0, num_segments)
        for number, (source, plan) in enumerate(zip(sources, plans, strict=True))
    ]


def pack_text(
    name: str,
    examples: Examples,
    row_length: int,
    max_positions: int | None = None,
    places: Sequence[str] = (),
) -> PackedRows:
    """Packs text that is measured and not trained on.

    Documents longer than a row continue in the next row, without the preceding context.
    Examples that are scored in context (a cloze, a conversation, an exam's choice, an
    answer of a pair) are never cut: rows are then as long as the longest example.

    Args:
      name: for logs and errors.
      examples: what is measured.
      row_length: minimum number of targets in a row.
      max_positions: targets that fit the model's context; None: any number.
      places: where examples are from, one for each or for as many consecutive ones, such
        as the two of a pair.

    Raises:
      InputError: an example that must not be cut does not fit the context; the error names
        it.
    """
    targets = examples.lengths - 1
    longest = int(targets.max(initial=0))
    is_longer = examples.is_continuation and longest > row_length
    if is_longer:
        logging.warning(
            "%s: %d of %d items are longer than rows of %d tokens; they are measured "
            "whole, in rows of %d",
            name,
            np.sum(targets > row_length),
            len(targets),
            row_length,
            longest,
        )
    plan = pack(examples.lengths, longest if is_longer else row_length, "best_fit")
    rows = PackedRows(Source(name, examples), 0, plan, pad_id=0, places=places)
    if is_longer and max_positions is not None and longest > max_positions:
        raise InputError(
            f"{rows.place(int(targets.argmax()))}: has {longest} tokens, the model's "
            f"context is {max_positions}; leave it out"
        )
    return rows


def mixture(
    sources: Sequence[PackedRows],
    batch_size: int,
    seed: int,
    num_hosts: int = 1,
    host: int = 0,
    num_workers: int = 0,
    first_row: int = 0,
    num_rows: int = 0,
) -> grain.IterDataset:
    """A stream of batches in which the loss tokens of the sources have their shares.

    Rows of the sources are interleaved evenly; each source is read in a new random order
    every epoch. Each global batch is cut into as many equal parts as there are hosts, and
    host `h` takes part `h`: the place of rows in the batch is that of its devices in the
    mesh, so no number depends on how many hosts share the devices. The stream is endless
    unless every source has a limit; then empty rows fill the last batch.

    Args:
      sources: see `pack_sources`.
      batch_size: rows of the global batch, over all hosts.
      seed: of the order of rows.
      num_hosts, host: how many hosts there are, and which one this is.
      num_workers: worker processes; 0 prefetches in a thread of this one.
      first_row: the row of the stream to begin with.
      num_rows: the row at which final shares are reached; not needed if no source has one.

    Returns:
      A dataset of batches: the arrays of `PackedRows`, [batch_size / num_hosts,
      row_length]. To resume after `k` batches, restore the iterator's `get_state`, or call
      this again with `first_row`; only the second way allows a different number of hosts or
      workers or a different batch size.

    Raises:
      InputError: the batch does not divide evenly among the hosts.
    """
    if batch_size < 1 or batch_size % num_hosts:
        raise InputError(
            f"batch_size is {batch_size}, must be a multiple of the {num_hosts} hosts"
        )
    stream = _Stream(sources, seed, num_rows)
    part = _Part(stream, first_row, batch_size // num_hosts, num_hosts, host)
    end = _ENDLESS
    if stream.num_rows < _ENDLESS:
        batches = math.ceil((stream.num_rows - first_row) / batch_size)
        end = batches * part.num_rows
    dataset = grain.MapDataset.source(part)[:end]
    dataset = dataset.batch(part.num_rows).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    )
    if not num_workers:
        return dataset
    # Grain reads absl flags, which raise if no command line was parsed.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    # Workers take turns batch by batch. This comes after all transformations of the stream.
    return dataset.mp_prefetch(
        grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2),
        functools.partial(_begin_worker, terminal.is_json()),
    )


def _begin_worker(is_json: bool, worker: int, num_workers: int) -> None:
    """Prepares a worker process: its output, and its end.

    It ends with its parent, because grain's workers outlive a parent that is killed.
    """
    del worker, num_workers
    terminal.begin_worker(is_json)

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class _Stream:
    """The rows of all sources in the order of the stream; a grain data source.

    The last row is followed by endless rows of padding.
    """

    def __init__(self, sources, seed: int, num_rows: int):
        self._used = [rows for rows in sources if rows.source.share]
        self._epochs = [
            grain.MapDataset.source(rows)
            .shuffle(seed=_seed(seed, rows.source_id))
            .repeat(None)
            for rows in self._used
        ]
        self._order = interleaving(self._used, num_rows)

    @property
    def num_rows(self) -> float:
        return self._order.num_rows

    def __len__(self) -> int:
        return _ENDLESS

    def __repr__(self) -> str:
        # Grain compares it when an iterator's state is restored.
        return f"Stream({self._used})"

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if row >= self.num_rows:
            return self._used[0].empty_row()
        source, nth = self._order[row]
        return self._epochs[source][nth]


@dataclasses.dataclass(frozen=True)
class _Part:
    """The rows of one host, from a given row of the stream; a grain data source.

    Attributes:
      stream: all rows.
      first_row: the row at which the first global batch begins.
      num_rows: of each global batch.
      num_hosts, host: how many parts there are, and which one this is.
    """

    stream: _Stream
    first_row: int
    num_rows: int
    num_hosts: int
    host: int

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batch, row = divmod(index, self.num_rows)
        part = batch * self.num_hosts + self.host
        return self.stream[self.first_row + part * self.num_rows + row]


def interleaving(sources: Sequence[PackedRows], num_rows: int) -> Interleaving:
    """The order of the rows of sources that have a share.

    Args:
      sources: see `pack_sources`.
      num_rows: when final shares are reached.
    """
    density_M = np.array([_density(rows) for rows in sources])
    shares_M = np.array([rows.source.share for rows in sources], float)
    finals = (rows.source.final_share for rows in sources)
    final_M = np.array(
        [s if f is None else f for s, f in zip(shares_M, finals, strict=True)], float
    )
    moves = bool((final_M != shares_M).any())
    return Interleaving(
        (shares_M / density_M).tolist(),
        (final_M / density_M).tolist() if moves else None,
        num_rows if moves else 0,
        [_limit(rows) for rows in sources],
    )


def _limit(rows: PackedRows) -> float:
    """The maximum number of rows that a source gives."""
    source = rows.source
    epochs = round(source.epochs * len(rows)) if source.epochs else math.inf
    budget = math.inf
    if source.max_tokens:
        budget = math.ceil(source.max_tokens / _density(rows))
    return max(1, min(epochs, budget))


def evaluation_batches(
    rows: PackedRows, batch_size: int, first_batch: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Every row once, in order, in full batches; empty rows fill the last one."""
    for first in range(first_batch * batch_size, len(rows), batch_size):
        batch = [
            rows[row] if row < len(rows) else rows.empty_row()
            for row in range(first, first + batch_size)
        ]
        yield {name: np.stack([row[name] for row in batch]) for name in batch[0]}


def describe(sources: Sequence[PackedRows], num_rows: int) -> list[dict]:
    """Statistics of each source, and how much of it the first rows of the stream read.

    Args:
      sources: see `pack_sources`.
      num_rows: how many rows of the stream are read.

    Returns:
      One dict per source: name, documents, tokens, loss_tokens (of one epoch), rows,
      pieces, padding (share of an epoch's row positions), share_asked (of the loss tokens,
      at the beginning), share_delivered (of those in the `num_rows`) and epochs (how often
      the source is read in them).
    """
    used = [rows for rows in sources if rows.source.share]
    given = interleaving(used, num_rows).given(num_rows).tolist()
    rows_of = dict(zip((rows.source_id for rows in used), given, strict=True))
    tokens_of = {
        rows.source_id: rows_of.get(rows.source_id, 0) * _density(rows)
        for rows in sources
    }
    total, asked = sum(tokens_of.values()), sum(rows.source.share for rows in sources)
    return [
        {
            "name": rows.source.name,
            "documents": len(rows.source.examples),
            "tokens": rows.source.examples.num_tokens,
            "loss_tokens": rows.source.examples.num_loss_tokens,
            "rows": len(rows),
            "pieces": len(rows.plan.length),
            "padding": 1
            - int(rows.plan.length.sum()) / max(1, len(rows) * rows.plan.row_length),
            "share_asked": rows.source.share / asked,
            "share_delivered": tokens_of[rows.source_id] / total,
            "epochs": rows_of.get(rows.source_id, 0) / max(1, len(rows)),
        }
        for rows in sources
    ]


def _density(rows: PackedRows) -> float:
    """Mean number of loss tokens in a row."""
    return rows.source.examples.num_loss_tokens / max(1, len(rows))


def _seed(seed: int, number: int) -> int:
    """A separate seed for each source, uint32."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
