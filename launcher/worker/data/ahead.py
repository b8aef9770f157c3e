"""Read and collate the next step's rows while the present step computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from decompft.launcher.worker.data.batches import Batch, collate
from decompft.launcher.worker.data.feed import TrainData


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatches:
    """One optimizer step of a rank, ready to move to its device."""

    micro_batches: list[Batch]
    num_targets_global: int
    sample_ids: list[int]


_LOOK_S = 5.0


class Ahead:
    """Steps in order, one ahead, on one thread; what a step holds does not depend on the thread.

    Args:
        first, last: steps [first, last) will be asked for, each once.
        pad_multiple: of `collate`.
        moved: called now and then while a step is waited for and rows are being read.
    """

    def __init__(
        self,
        data: TrainData,
        *,
        first: int,
        last: int,
        world_size: int,
        rank: int,
        micro: int,
        accumulation: int,
        pad_multiple: int = 8,
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        self._data = data
        self._moved = moved
        self._pad_multiple = pad_multiple
        self._last = last
        self._split = (world_size, rank, micro, accumulation)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._after = first
        self._next: Future[StepBatches] | None = self._submit(first)

    def step(self, step: int) -> StepBatches:
        """The batches of `step`."""
        self.read_on()
        assert self._next is not None, "steps are asked for in order, up to the last"
        read = self._data.num_read
        while not wait([self._next], timeout=_LOOK_S).done:
            if self._data.num_read != read:
                read = self._data.num_read
                self._moved()
        found, self._next, self._after = self._next.result(), None, step + 1
        return found

    def read_on(self) -> None:
        """Begin to read the step after the last one that was given, unless that has begun.

        For a moment at which the device has work: the thread that reads takes turns with the one that launches.
        """
        if self._next is None:
            self._next = self._submit(self._after)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, step: int) -> Future[StepBatches] | None:
        return self._pool.submit(self._read, step) if step < self._last else None

    def _read(self, step: int) -> StepBatches:
        found = self._data.step(step, *self._split)
        return StepBatches(
            micro_batches=[
                collate(rows, self._data.pad_id, self._pad_multiple) for rows in found.micro_batches
            ],
            num_targets_global=found.num_targets_global,
            sample_ids=found.sample_ids,
        )
