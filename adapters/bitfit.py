"""BitFit (Ben Zaken et al., 2021, arXiv:2106.10199): biases alone are trained."""

from __future__ import annotations

import torch
from torch import Tensor

from decompft.adapters.base import Adapter, Facts
from decompft.adapters.frozen.factors import Factors


class BitfitLinear(Adapter):
    """y = W x + bias + b, b (out,), which starts at 0; a layer without a bias gets one.

    `merged_bias` is the one bias that equals both; where the architecture has none there, only the adapter does.
    """

    b: torch.nn.Parameter

    def factors(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Factors:
        return Factors(bias=trained[0])

    def pull_back(
        self,
        trained: tuple[Tensor, ...],
        fixed: tuple[Tensor, ...],
        found: Factors,
        grads: Factors,
        weight: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        return (grads.bias,)

    def initial_values(self, generator: torch.Generator, facts: Facts) -> dict[str, Tensor]:
        return {"b": torch.zeros(self.shapes["b"])}
