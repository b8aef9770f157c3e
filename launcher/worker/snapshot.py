"""A copy of a rank's training state that the next steps do not touch, taken with as short a pause as can be.

On a GPU the copies go to pinned host memory on the stream that the training steps use: whatever the next step changes,
it changes after them, so that nobody waits until the background thread does. The memory is kept for the next save.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from decompft.launcher.worker.checkpoint import Slice

_ALIGN = 256  # bytes


class Snapshot:
    """The slices as they were; `wait` before they are read."""

    def __init__(self, slices: list[Slice], copied: Any) -> None:
        self.slices = slices
        self._copied = copied

    def wait(self) -> None:
        """Until every copy has arrived; any thread may call it."""
        if self._copied is not None:
            self._copied.synchronize()


class Snapshots:
    """Takes one at a time: the one before must have been written."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = torch.empty(0, dtype=torch.uint8)

    def take(self, slices: Iterable[Slice]) -> Snapshot:
        """Copies of this rank's slices, in host memory."""
        found = list(slices)
        if self._device.type != "cuda":
            # detached: what is an optimizer's or a parameter's stays theirs
            return Snapshot([replace(s, tensor=s.tensor.detach().clone()) for s in found], None)
        sizes = [_round(s.tensor.numel() * s.tensor.element_size()) for s in found]
        if self._pinned.numel() < sum(sizes):
            self._pinned = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
        held, at = [], 0
        for s, size in zip(found, sizes, strict=True):
            raw = self._pinned[at : at + s.tensor.numel() * s.tensor.element_size()]
            copy: Tensor = raw.view(s.tensor.dtype)
            copy.copy_(s.tensor.detach(), non_blocking=True)
            held.append(replace(s, tensor=copy))
            at += size
        copied = torch.cuda.Event()
        copied.record()
        return Snapshot(held, copied)


def _round(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
