"""FlexLoRA (2026, arXiv:2601.22905): AdaLoRA's form, directions handed from matrix to matrix by the entropy of e.

    W* = W + s B diag(e) A,    s as AdaLoRA's

Parameters have the largest rank from the start and a mask says which directions live: a resized matrix
in the authors' code is a new Parameter that their optimizer never sees. Which directions change hands, and when, is
a matter of allocation.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decompft.adapters.adalora import INIT_STD, AdaLoraLinear
from decompft.adapters.base import Facts


class FlexLoraLinear(AdaLoraLinear):
    """y = (W + s B diag(mask * e) A) x + bias; the rows of A and columns of B outside the mask are 0."""

    def initial_values(self, generator: torch.Generator, facts: Facts) -> dict[str, Tensor]:
        mask = (torch.arange(self.shapes["e"][0]) < self.config.rank).float()
        A = torch.randn(self.shapes["A"], generator=generator) * INIT_STD * mask[:, None]
        B = torch.randn(self.shapes["B"], generator=generator) * INIT_STD * mask
        return {"A": A, "B": B, "e": torch.zeros_like(mask), "mask": mask}

    def live(self, fixed: tuple[Tensor, ...]) -> Tensor | None:
        return fixed[0]

    def grown(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A row of A (in,) and a column of B (out,) for a new direction, drawn as at the start."""
        row = torch.randn(self.base.in_features, generator=generator) * INIT_STD
        return row, torch.randn(self.base.out_features, generator=generator) * INIT_STD

    def _orth_weight(self) -> float:
        return 0.0
