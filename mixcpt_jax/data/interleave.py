"""Which source each row of a mixture comes from, in closed form.

Let `C_s(t)`, a real number, be the number of rows that source `s` should contribute to the
first `t` rows: the integral of its share. Its row `k` is due when `C_s` passes `k + 1/2`,
and rows are read in the order in which they are due. So every source is always within one
row of its share. Row `i` of the stream is found without computing the rows before it: time
is cut into blocks, and the rows due in a block are counted and sorted independently.

Shape suffixes: M sources, K rows of a block, N times in it.
"""

import bisect
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_BLOCK = 4096  # rows, give or take one per source
_TIMES = 65  # at which C_s is evaluated in a block


class _Piece(NamedTuple):
    """An interval of time in which the same sources give rows."""

    start: float
    given_M: np.ndarray  # C_s(start)
    active_M: np.ndarray  # bool


class Interleaving:
    """The order of rows from several sources; a sequence of (source, its row)."""

    def __init__(
        self,
        shares: Sequence[float],
        final_shares: Sequence[float] | None = None,
        num_rows: float = 0,
        limits: Sequence[float] | None = None,
    ):
        """
        Args:
          shares: share of the rows of each source at the beginning, on any scale.
          final_shares: shares from row `num_rows` on; before it, shares change linearly.
            None: shares are constant.
          num_rows: when the final shares are reached.
          limits: the most rows that each source gives, whole numbers or inf. The share of
            a source that has reached its limit goes to the others in proportion.
        """
        self._arguments = shares, final_shares, num_rows, limits
        self._shares_M = np.array(shares, float) / math.fsum(shares)
        self._final_M = self._shares_M
        if final_shares is not None and num_rows:
            self._final_M = np.array(final_shares, float) / math.fsum(final_shares)
        self._anneal_end = num_rows
        self._limits_M = np.array(limits or [math.inf] * len(shares), float)
        self._pieces = self._cut()
        self._block = functools.lru_cache(maxsize=4)(self._make_block)
        self._first_row = functools.lru_cache(maxsize=16)(self._rows_before)

    def __reduce__(self):
        # Drop the caches; other processes do not need them.
        return Interleaving, self._arguments

    @property
    def num_rows(self) -> float:
        """Rows of the whole stream: the sum of the limits."""
        return float(self._limits_M.sum())

    def rows_to_limits(self) -> float:
        """Rows until every source with a limit has reached it; inf: none has one.

        Sources without a limit give rows meanwhile, so `num_rows` is larger.
        """
        is_limited_M = np.isfinite(self._limits_M)
        if is_limited_M.all() or not is_limited_M.any():
            return self.num_rows
        # Up to rounding, the last limit is reached before the last piece begins.
        rows = range(math.ceil(self._pieces[-1].start) + len(self._limits_M) + 1)

        def gives_all(num_rows: int) -> bool:
            return (self.given(num_rows) >= self._limits_M)[is_limited_M].all()

        return bisect.bisect_left(rows, True, key=gives_all)

    def __getitem__(self, row: int) -> tuple[int, int]:
        """The source of a row of the stream, and the number of that row in its source."""
        number, at = self._find(row)
        sources_K, rows_K = self._block(number)
        return int(sources_K[at]), int(rows_K[at])

    def given(self, num_rows: int) -> np.ndarray:
        """How many of the first `num_rows` rows come from each source, int64 [M]."""
        if num_rows >= self.num_rows:
            return self._limits_M.astype(np.int64)
        number, at = self._find(num_rows)
        sources_K, _ = self._block(number)
        here_M = np.bincount(sources_K[:at], minlength=len(self._shares_M))
        return self._due(number * _BLOCK) + here_M

    def _find(self, row: int) -> tuple[int, int]:
        """The block of a row, and its index there."""
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of {self.num_rows}")
        number = row // _BLOCK
        while self._first_row(number) > row:
            number -= 1
        while self._first_row(number + 1) <= row:
            number += 1
        return number, row - self._first_row(number)

    def _rows_before(self, number: int) -> int:
        """Rows of the stream before a block."""
        return int(self._due(number * _BLOCK).sum())

    def _make_block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources and their rows, int64 [K] each, in the order of their due times."""
        first_M, last_M = (self._due(t * _BLOCK) for t in (number, number + 1))
        sources_K = np.repeat(np.arange(len(first_M)), last_M - first_M)
        rows_K = np.concatenate(
            [
                np.arange(first, last)
                for first, last in zip(first_M, last_M, strict=True)
            ]
        )
        # Between these times C_s is interpolated linearly.
        begin, end = number * _BLOCK, (number + 1) * _BLOCK
        knots = [p.start for p in self._pieces if begin < p.start < end]
        times = np.union1d(np.linspace(begin, end, _TIMES), knots)
        should_MxN = np.stack([self._should(time) for time in times], axis=1)
        due_K = np.concatenate(
            [
                np.interp(np.arange(first, last) + 0.5, should_N, times)
                for first, last, should_N in zip(
                    first_M, last_M, should_MxN, strict=True
                )
            ]
        )
        order_K = np.argsort(due_K, kind="stable")
        return sources_K[order_K], rows_K[order_K]

    def _due(self, time: float) -> np.ndarray:
        """Rows that each source has given by a time, int64 [M]."""
        return np.floor(self._should(time) + 0.5).astype(np.int64)

    def _should(self, time: float) -> np.ndarray:
        """C_s(time), float [M]."""
        piece = next(p for p in reversed(self._pieces) if p.start <= time)
        return np.minimum(self._follow(piece, time), self._limits_M)

    def _follow(self, piece: _Piece, time: float) -> np.ndarray:
        """C_s(time), if nothing else changes after the start of the piece."""
        slope_M = np.zeros_like(self._shares_M)
        value_M = self._final_M
        if piece.start < self._anneal_end:
            slope_M = (self._final_M - self._shares_M) / self._anneal_end
            value_M = self._shares_M + slope_M * piece.start
        value_M, slope_M = value_M * piece.active_M, slope_M * piece.active_M
        # The integral of (value + slope u) / (total + drift u) over u from 0 to span.
        total, drift, span = value_M.sum(), slope_M.sum(), time - piece.start
        if not total:
            return piece.given_M
        if abs(drift) * span < 1e-9 * total:
            given_M = (value_M * span + slope_M * span**2 / 2) / total
        else:
            ratio_M = slope_M / drift
            logarithm = math.log1p(drift * span / total) / drift
            given_M = ratio_M * span + (value_M - ratio_M * total) * logarithm
        return piece.given_M + given_M

    def _cut(self) -> list[_Piece]:
        """Cuts time where a source reaches its limit, or where shares stop changing."""
        active_M = (self._shares_M > 0) | (self._final_M > 0)
        pieces = [_Piece(0.0, np.zeros_like(self._shares_M), active_M)]
        while pieces[-1].active_M.any():
            piece = pieces[-1]
            ends = [
                (self._exhausted(piece, source), source)
                for source in np.flatnonzero(piece.active_M)
            ]
            end, source = min(ends)
            moves = piece.start < self._anneal_end
            if moves and end >= self._anneal_end:
                given_M = self._follow(piece, self._anneal_end)
                pieces.append(piece._replace(start=self._anneal_end, given_M=given_M))
            elif end < math.inf:
                given_M = self._follow(piece, end)
                given_M[source] = self._limits_M[source]
                active_M = piece.active_M.copy()
                active_M[source] = False
                pieces.append(_Piece(end, given_M, active_M))
            else:
                break
        return pieces

    def _exhausted(self, piece: _Piece, source: int) -> float:
        """The time at which a source reaches its limit, if nothing else changes first."""
        limit = self._limits_M[source]
        if limit == math.inf:
            return math.inf
        low = high = piece.start
        if piece.start < self._anneal_end:
            high = float(self._anneal_end)
            if self._follow(piece, high)[source] < limit:
                return math.inf
        else:
            rate = self._follow(piece, piece.start + 1.0)[source]
            missing = limit - piece.given_M[source]
            given = rate - piece.given_M[source]
            return piece.start + missing / given if given > 0 else math.inf
        while high - low > 1e-6 and low < (middle := (low + high) / 2) < high:
            if self._follow(piece, middle)[source] < limit:
                low = middle
            else:
                high = middle
        return high
