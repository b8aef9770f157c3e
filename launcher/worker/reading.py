"""How rows are read by several threads ahead of their use, within a budget of host memory."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import torch
from torch import Tensor

CHUNK_BYTES = 8 << 20  # of rows as the checkpoint stores them; nf4 packs them into 2 MiB
MADE_BYTES = 32 << 20  # of rows that are made, not read: a GPU wants larger pieces
AHEAD_BYTES = 96 << 20  # more in flight reads no faster
T = TypeVar("T")
R = TypeVar("R")

_MOST_READERS = 8
_ALIGN = 4096


def row_chunks(first: int, last: int, row_bytes: int, *, is_file: bool) -> Iterator[tuple[int, int]]:
    """Rows [first, last) in chunks of at most CHUNK_BYTES (or one row), cut where any other rank would cut."""
    size = max(1, (CHUNK_BYTES if is_file else MADE_BYTES) // max(1, row_bytes))
    while first < last:
        stop = min(last, first - first % size + size)
        yield first, stop
        first = stop


def read_ahead(
    tasks: Iterable[T],
    read: Callable[[T, Tensor | None], R],
    *,
    budget_bytes: int,
    num_readers: int,
    pin: bool,
) -> Iterator[R]:
    """`read(task, buffer)` of every task, in order; what it returns may lie in the buffer until the next.

    Args:
        budget_bytes: of all buffers; at least two chunks (of CHUNK_BYTES, or less) are made of it.
        num_readers: threads; with none, tasks are read where they are used, without buffers.
        pin: page-locked, from which a GPU copies several times faster.
    """
    if num_readers == 0:
        yield from (read(task, None) for task in tasks)
        return
    size = -(-min(CHUNK_BYTES, budget_bytes // 2) // _ALIGN) * _ALIGN
    count = max(2, min(budget_bytes, AHEAD_BYTES) // max(1, size))
    memory = torch.empty(count * size, dtype=torch.uint8, pin_memory=pin)  # taken once, used again and again
    free = list(memory.split(size)) if size else [memory] * count
    waiting = iter(tasks)
    pending: deque[tuple[Future[R], Tensor]] = deque()
    pool = ThreadPoolExecutor(max_workers=num_readers, thread_name_prefix="read")
    try:
        while True:
            while free and (task := next(waiting, None)) is not None:
                buffer = free.pop()
                pending.append((pool.submit(read, task, buffer), buffer))
            if not pending:
                return
            future, buffer = pending.popleft()
            yield future.result()
            free.append(buffer)
    finally:
        pool.shutdown(cancel_futures=True)


def num_readers() -> int:
    """Threads of this rank: the cores are shared by the ranks of the node."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(2, min(_MOST_READERS, len(os.sched_getaffinity(0)) // local))


class AnonymousPeak:
    """Host memory that is no mapped file, sampled every 10 ms while the context is open.

    `peak_bytes`: the most above the value at the beginning. The storage of a base that lives on the CPU
    is part of it.
    """

    def __enter__(self) -> Self:
        self._start = self._most = _anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    @property
    def peak_bytes(self) -> int:
        return max(self._most, _anonymous_bytes()) - self._start

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self._most = max(self._most, _anonymous_bytes())


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
