"""What an adapter makes of its tensors for the node of linear.py, and how it takes the gradients of that back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

# A (rank, in) -> W A^T (out, rank) in A's dtype or wider, A rounded to the dtype in which W is used
WeightTimes = Callable[[Tensor], Tensor]
Grads = tuple[Tensor | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """W* = diag(row) W diag(col) + q up down; None stands for what is not there."""

    up: Tensor | None = None  # (out, k)
    down: Tensor | None = None  # (k, in)
    q: Tensor | float = 1.0  # a number, or (1,)
    row: Tensor | None = None  # (1,) or (out,)
    col: Tensor | None = None  # (in,)
    bias: Tensor | None = None  # (out,), added to the base's
    relu: bool = False  # between down and up: then there is no W*
    keep: tuple[Tensor, ...] = ()  # for `pull_back` of the same pass


class Thin(Protocol):
    """What an adapter gives the node; see decompft.adapters.base.Adapter."""

    reads_weight: bool
    pulls_through_weight: bool

    def factors(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Factors: ...

    def note(
        self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...], times: WeightTimes
    ) -> tuple[Tensor, ...]: ...

    def pull_back(
        self,
        trained: tuple[Tensor, ...],
        fixed: tuple[Tensor, ...],
        found: Factors,
        grads: Factors,
        weight: Tensor | None,
    ) -> Grads: ...
