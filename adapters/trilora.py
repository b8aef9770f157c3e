"""TriLoRA (Feng et al., 2024, arXiv:2405.11236): a trained diagonal between LoRA's factors."""

from __future__ import annotations

import torch
from torch import Tensor

from decompft.adapters.base import Adapter, Facts, kaiming_uniform
from decompft.adapters.frozen.factors import Factors
from decompft.adapters.lora import scaling


class TriloraLinear(Adapter):
    """y = (W + s B diag(e) A) x + bias.

    Starts at e = 0, with A and B Kaiming-uniform: only e has a slope then. Of the authors' two codes one
    forgets the scaling s; this is the other.
    """

    A: torch.nn.Parameter
    B: torch.nn.Parameter
    e: torch.nn.Parameter

    def factors(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Factors:
        A, B, e = trained
        return Factors(up=B * e, down=A, q=scaling(self.config))

    def pull_back(
        self,
        trained: tuple[Tensor, ...],
        fixed: tuple[Tensor, ...],
        found: Factors,
        grads: Factors,
        weight: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        _, B, e = trained
        assert grads.up is not None
        return grads.down, grads.up * e, torch.linalg.vecdot(grads.up, B, dim=0)

    def initial_values(self, generator: torch.Generator, facts: Facts) -> dict[str, Tensor]:
        return {
            "A": kaiming_uniform(self.shapes["A"], generator),
            "B": kaiming_uniform(self.shapes["B"], generator),
            "e": torch.zeros(self.shapes["e"]),
        }
