"""Which row comes when: a pure function of (seed, epoch, global index), whatever the number of ranks.

Layout of a step: its global batch is the index range [step * G, (step + 1) * G), in that order. Accumulation
round a of rank r takes the micro-sized piece number a * world + r of it. So neither the set nor the order of
a global batch depends on how it is cut, and resuming needs the step alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

Rows = np.ndarray[tuple[int], np.dtype[np.int64]]


class Sampler:
    """Endless (or limited) sequence of rows of a mixture.

    Row numbers run through the sources in order, as in a RowSet. A source of n rows and weight w gives
    round(w * n) rows an epoch, at least one: each row floor(w) times, and a part of them once more, another
    part each epoch in turn (weight 0.5: every row once in two epochs).

    Args:
        source_rows: rows of each source.
        weights: times each source's rows are seen in an epoch.
        seed: of the order.
        shuffle: a new order each epoch; otherwise sources and rows in order.
        epochs: passes over the mixture, at least one row; None: it never ends.
    """

    def __init__(
        self,
        source_rows: Sequence[int],
        weights: Sequence[float],
        *,
        seed: int,
        shuffle: bool,
        epochs: float | None,
    ) -> None:
        assert len(source_rows) == len(weights) and all(n > 0 for n in source_rows), (source_rows, weights)
        self._source_rows = tuple(source_rows)
        self._taken = tuple(max(1, round(w * n)) for w, n in zip(weights, source_rows, strict=True))
        self._seed = seed
        self._shuffle = shuffle
        self.total_rows = None if epochs is None else max(1, round(epochs * self.rows_per_epoch))
        self._epoch_rows = lru_cache(maxsize=2)(self._make_epoch)  # a step may lie across two epochs

    @property
    def rows_per_epoch(self) -> int:
        """Rows of one pass over the mixture, by weight."""
        return sum(self._taken)

    def row_at(self, global_index: int) -> int | None:
        """The row at a place of the sequence; None after the last epoch."""
        if self.total_rows is not None and global_index >= self.total_rows:
            return None
        epoch, place = divmod(global_index, self.rows_per_epoch)
        return int(self._epoch_rows(epoch)[place])

    def _make_epoch(self, epoch: int) -> Rows:
        parts, first = [], 0
        for source, (size, taken) in enumerate(zip(self._source_rows, self._taken, strict=True)):
            whole, extra = divmod(taken, size)
            every = np.arange(size, dtype=np.int64)
            parts += [every + first] * whole
            if extra:
                order = _permutation(size, self._seed, 1, source) if self._shuffle else every
                parts.append(np.sort(order[(epoch * extra + np.arange(extra)) % size]) + first)
            first += size
        rows = np.concatenate(parts)
        return rows[_permutation(len(rows), self._seed, 0, epoch)] if self._shuffle else rows


def step_indices(
    step: int, *, global_batch: int, world_size: int, rank: int, micro_batch: int, accumulation: int
) -> list[list[int]]:
    """Global indices of a rank's micro batches in a step.

    Args:
        step: optimizer steps taken before this one (the first is 0).
        global_batch: rows of a step; must equal micro_batch * accumulation * world_size.
    """
    assert global_batch == micro_batch * accumulation * world_size, "the batch law is the plan's to keep"
    starts = (step * global_batch + (a * world_size + rank) * micro_batch for a in range(accumulation))
    return [list(range(start, start + micro_batch)) for start in starts]


def _permutation(size: int, *seed: int) -> Rows:
    # sorted raw draws, not Generator.permutation: only the raw stream of PCG64 is promised to stay the
    # same over versions of numpy, and a resume may run on another
    keys = np.random.PCG64(np.random.SeedSequence(list(seed))).random_raw(size)
    order: np.ndarray[Any, Any] = np.argsort(keys, kind="stable")
    return order.astype(np.int64)
