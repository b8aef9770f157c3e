"""Copies of float32 tensors in the compute dtype, made once and read by every pass that follows.

A copy is used only between `Rounded.refresh` and `Rounded.drop`, and only if its tensor is where it was and nothing has
written to it since. In any other case there is none, and whoever asks casts the tensor himself. Versions
alone would not do: torch's fused AdamW writes without counting one, DeepSpeed too. They step after `drop`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor


class OfAStep(Protocol):
    """What follows from trained tensors, and is made once for all passes of a step."""

    def refresh(self) -> None: ...

    def drop(self) -> None: ...


class Rounded:
    """Copies of some tensors in one flat array, in the tensors' order."""

    def __init__(self, tensors: Sequence[Tensor], dtype: torch.dtype, others: Sequence[OfAStep] = ()) -> None:
        """The tensors are on one device, and wider than `dtype`; `others` are made and dropped with them."""
        self._others = others
        self._tensors = list(tensors)
        self.flat = torch.empty(
            sum(t.numel() for t in tensors), dtype=dtype, device=tensors[0].device if tensors else None
        )
        self.is_current = False
        self._copies = []
        start = 0
        for tensor in self._tensors:
            values = self.flat[start : start + tensor.numel()].view(tensor.shape)
            self._copies.append(_Copy(self, start, values))
            start += tensor.numel()
            tensor.rounded = self._copies[-1]  # type: ignore[attr-defined]  # found by the tensor itself

    def refresh(self) -> None:
        """Copy anew, by one launch. Until `drop`, nobody writes to the tensors."""
        if self._tensors:
            with torch.no_grad():
                torch._foreach_copy_([c.values for c in self._copies], self._tensors)
            for tensor, copy in zip(self._tensors, self._copies, strict=True):
                copy.version, copy.place = tensor._version, tensor.data_ptr()
        for other in self._others:
            other.refresh()
        self.is_current = True

    def drop(self) -> None:
        """From now on there are no copies."""
        self.is_current = False
        for other in self._others:
            other.drop()


@dataclass(slots=True)
class _Copy:
    owner: Rounded
    start: int  # in the owner's flat array
    values: Tensor
    version: int = -1  # of the tensor when it was copied
    place: int = 0  # its address then

    @property
    def end(self) -> int:
        return self.start + self.values.numel()


def copy_of(tensor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The copy of a tensor in `dtype`; None where there is none, or it may be stale."""
    copy = _usable(tensor, dtype)
    return None if copy is None else copy.values


def stacked_copy_of(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    """The copies of tensors (n, k) above one another, where they lie so; None else."""
    found = [copy for t in tensors if (copy := _usable(t, dtype)) is not None]
    if len(found) < len(tensors):
        return None
    first, last = found[0], found[-1]
    if any(b.owner is not a.owner or b.start != a.end for a, b in pairwise(found)):
        return None
    return first.owner.flat[first.start : last.end].view(-1, first.values.shape[1])


def _usable(tensor: Tensor, dtype: torch.dtype) -> _Copy | None:
    copy: _Copy | None = getattr(tensor, "rounded", None)
    if copy is None or not copy.owner.is_current or copy.values.dtype != dtype:
        return None
    return copy if copy.version == tensor._version and copy.place == tensor.data_ptr() else None
