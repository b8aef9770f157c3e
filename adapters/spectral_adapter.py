"""Spectral Adapter (Zhang and Pilanci, 2024, arXiv:2405.13952), additive form: the leading singular vectors move.

    W* = [U_r + P, U_rest] S [V_r + Q, V_rest]^T = W + P S_r V_r^T + U_r S_r Q^T + P S_r Q^T

No scale: alpha is not used, as in the paper. U, S, V are those of the full-precision weight; over a quantized base
the three terms are added to what is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decompft.adapters.base import Adapter, Cached, Facts
from decompft.adapters.directions import tensors_of, top_rows
from decompft.adapters.frozen.factors import Factors


class SpectralAdapterLinear(Adapter):
    """W* - W = [P, U + P] [S V^T; S Q^T], thin rank 2 r. Starts at P = Q = 0: the base."""

    P: torch.nn.Parameter  # (out, rank)
    Q: torch.nn.Parameter  # (in, rank)
    U: Tensor  # (out, rank)
    S: Tensor  # (rank,)
    V: Tensor  # (rank, in)

    def factors(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Factors:
        (P, Q), (U, S, V) = trained, fixed
        down = torch.stack([V, Q.T]) * S.view(-1, 1)
        return Factors(up=torch.cat([P, U + P], dim=1), down=down.flatten(0, 1))

    def pull_back(
        self,
        trained: tuple[Tensor, ...],
        fixed: tuple[Tensor, ...],
        found: Factors,
        grads: Factors,
        weight: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        assert grads.up is not None and grads.down is not None
        r = self.config.rank
        return grads.up[:, :r] + grads.up[:, r:], grads.down[r:].T * fixed[1]

    def facts_of(self, weight: Tensor, cached: Cached, generator: torch.Generator) -> dict[str, Tensor]:
        return top_rows(weight, self.config.rank, cached, generator)

    def initial_values(self, generator: torch.Generator, facts: Facts) -> dict[str, Tensor]:
        U, S, V = tensors_of(facts, "U", "S", "V")
        zeros = {name: torch.zeros(shape) for name, shape in self.shapes.items()}
        return {**zeros, "U": U.T, "S": S, "V": V}
