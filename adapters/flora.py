"""FLoRA of a matrix (Si et al., 2024, arXiv:2405.14739): a trained core between LoRA's factors."""

from __future__ import annotations

import torch
from torch import Tensor

from decompft.adapters.base import Adapter, Facts, kaiming_uniform
from decompft.adapters.frozen.factors import Factors
from decompft.adapters.lora import scaling

NORMAL_STD = 0.02


class FloraLinear(Adapter):
    """y = (W + s B M A) x + bias, M (rank, rank): Tucker's form in two dimensions.

    Starts at M = 0: only M has a slope then.
    """

    A: torch.nn.Parameter
    B: torch.nn.Parameter
    M: torch.nn.Parameter

    def factors(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Factors:
        A, B, M = trained
        return Factors(up=B @ M, down=A, q=scaling(self.config))

    def pull_back(
        self,
        trained: tuple[Tensor, ...],
        fixed: tuple[Tensor, ...],
        found: Factors,
        grads: Factors,
        weight: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        _, B, M = trained
        assert grads.up is not None
        return grads.down, grads.up @ M.T, B.T @ grads.up

    def initial_values(self, generator: torch.Generator, facts: Facts) -> dict[str, Tensor]:
        draw = normal if self.config.options.init == "normal" else kaiming_uniform
        return {
            "A": draw(self.shapes["A"], generator),
            "B": draw(self.shapes["B"], generator),
            "M": torch.zeros(self.shapes["M"]),
        }


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """N(0, 0.02), the standard deviation being 0.02."""
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, NORMAL_STD, generator=generator)
