"""MPC_n (Si et al., 2024, arXiv:2407.05417), which is the parallel adapter (He et al., 2021, arXiv:2110.04366)."""

from __future__ import annotations

import torch
from torch import Tensor

from decompft.adapters.base import Adapter, Facts, kaiming_uniform
from decompft.adapters.frozen.factors import Factors


class ParallelLinear(Adapter):
    """y = W x + B relu(A x) + bias: no alpha/r, and no weight that equals it, so that nothing can be merged."""

    A: torch.nn.Parameter
    B: torch.nn.Parameter

    def factors(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Factors:
        A, B = trained
        return Factors(up=B, down=A, relu=True)

    def pull_back(
        self,
        trained: tuple[Tensor, ...],
        fixed: tuple[Tensor, ...],
        found: Factors,
        grads: Factors,
        weight: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        return grads.down, grads.up

    def initial_values(self, generator: torch.Generator, facts: Facts) -> dict[str, Tensor]:
        return {"A": kaiming_uniform(self.shapes["A"], generator), "B": torch.zeros(self.shapes["B"])}
