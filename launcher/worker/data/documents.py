"""Where the documents of a batch begin and end, as host numbers and as the tensor that kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Documents:
    """The documents of a batch, row after row. Padding at a row's end is one of them: it sees nobody, nobody sees it.

    The numbers are those that packing knew on the host, so that a step asks the device for nothing.
    """

    lengths: tuple[int, ...]  # (N,), sum B * T; none goes on in the next row
    starts: Tensor  # (N + 1,) int32: 0, then where each document ends in the flattened tokens
    is_packed: bool  # some row has two or more of them

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Self:
        """From the lengths in each row; 0 is none."""
        kept = [[n for n in row if n] for row in rows]
        lengths = tuple(n for row in kept for n in row)
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(lengths=lengths, starts=starts, is_packed=any(len(row) > 1 for row in kept))

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return max(self.lengths)

    def to(self, device: torch.device) -> Self:
        """The same documents for tokens on a device."""
        starts = self.starts.to(device, non_blocking=True)
        return type(self)(lengths=self.lengths, starts=starts, is_packed=self.is_packed)
