"""MoSLoRA (Wu et al., 2024, arXiv:2406.11909): LoRA with a trained mixer of its subspaces."""

from __future__ import annotations

import torch
from torch import Tensor

from decompft.adapters.base import Facts, kaiming_uniform
from decompft.adapters.flora import FloraLinear, normal


class MosloraLinear(FloraLinear):
    """y = (W + s B M A) x + bias: FLoRA's formula, started at B = 0 instead of M = 0.

    Only B has a slope at the start.
    """

    def initial_values(self, generator: torch.Generator, facts: Facts) -> dict[str, Tensor]:
        init = self.config.options.init
        draw = normal if init == "normal" else kaiming_uniform
        M = torch.empty(self.shapes["M"])
        A = draw(self.shapes["A"], generator)
        if init == "orthogonal":
            torch.nn.init.orthogonal_(M, generator=generator)
        else:
            M = draw(self.shapes["M"], generator)
        return {"A": A, "B": torch.zeros(self.shapes["B"]), "M": M}
