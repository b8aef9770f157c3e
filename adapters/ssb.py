"""SSL, SSB (Si et al., 2024, arXiv:2407.05417v2) and (IA)^3 (Liu et al., 2022, arXiv:2205.05638): the base, scaled.

SSL  W diag(l_in)        (IA)^3  diag(l_out) W        SSB  diag(l_out) W diag(l_in)

The bias is not scaled. Vectors start at 1, and never decay: decay would pull the base towards 0. SSB's
two vectors share one scale (l_out c and l_in / c are the same layer), which nothing fixes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decompft.adapters.base import Adapter, Facts
from decompft.adapters.frozen.factors import Factors


class _Scaled(Adapter):
    """The trained vectors are the factors: l_out before l_in."""

    def initial_values(self, generator: torch.Generator, facts: Facts) -> dict[str, Tensor]:
        return {name: torch.ones(shape) for name, shape in self.shapes.items()}

    def pull_back(
        self,
        trained: tuple[Tensor, ...],
        fixed: tuple[Tensor, ...],
        found: Factors,
        grads: Factors,
        weight: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        return tuple(grad for grad in (grads.row, grads.col) if grad is not None)


class SslLinear(_Scaled):
    """y = W (l_in x) + bias."""

    def factors(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Factors:
        (l_in,) = trained
        return Factors(col=l_in)


class Ia3Linear(_Scaled):
    """y = l_out W x + bias."""

    def factors(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Factors:
        (l_out,) = trained
        return Factors(row=l_out)


class SsbLinear(_Scaled):
    """y = l_out W (l_in x) + bias."""

    def factors(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Factors:
        l_out, l_in = trained
        return Factors(row=l_out, col=l_in)
