"""AdaLoRA (Zhang et al., 2023, arXiv:2303.10512): LoRA in SVD form whose unimportant directions are set to 0.

    W* = W + s B diag(e) A,    s = alpha / (r + 1e-5), r the rank at the start, fixed while ranks shrink
    loss + orth_weight * mean over all A and B of N(A A^T - I) and N(B^T B - I)        (not squared)

Constants as the authors' code and peft have them. Which e is set to 0, and when, is a matter of allocation.py;
shapes never change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decompft.adapters.base import Adapter, Facts
from decompft.adapters.frozen.factors import Factors

INIT_STD = 0.02  # of A and B


class AdaLoraLinear(Adapter):
    """y = (W + s B diag(mask * e) A) x + bias. e starts at 0; the mask is 1 until the last allocation.

    Between allocations a direction whose e was set to 0 trains on and may come back; after the last one
    its mask is 0, and it stays where it is.
    """

    A: torch.nn.Parameter
    B: torch.nn.Parameter
    e: torch.nn.Parameter
    mask: Tensor
    phase: Tensor

    @property
    def scale(self) -> float:
        return self.config.alpha / (self.config.rank + 1e-5)

    @property
    def target_rank(self) -> int:
        """Mean rank at the end."""
        chosen: int | None = self.config.options.target_rank
        return max(1, round(self.config.rank / 1.5)) if chosen is None else min(chosen, self.config.rank)

    def factors(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Factors:
        A, B, e = trained
        return Factors(up=B, down=A * (e * fixed[0])[:, None], q=self.scale)

    def pull_back(
        self,
        trained: tuple[Tensor, ...],
        fixed: tuple[Tensor, ...],
        found: Factors,
        grads: Factors,
        weight: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        A, B, e = trained
        assert grads.up is not None and grads.down is not None
        mask = fixed[0]
        de = torch.sum(grads.down * A, dim=1) * mask
        dA = grads.down * (e * mask)[:, None]
        dB = grads.up
        if weigh := self.penalty_share * self._orth_weight() / (2 * self.num_siblings):
            dA = dA + weigh * _slope(A.T).T
            dB = dB + weigh * _slope(B)
        return dA, dB, de

    def penalty(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Tensor | None:
        """This layer's two terms of the mean over the A and B of all layers."""
        if not self._orth_weight():
            return None
        A, B, _ = trained
        norms = torch.linalg.norm(_excess(A.T)) + torch.linalg.norm(_excess(B))
        return norms * (self._orth_weight() / (2 * self.num_siblings))

    def initial_values(self, generator: torch.Generator, facts: Facts) -> dict[str, Tensor]:
        A = torch.randn(self.shapes["A"], generator=generator) * INIT_STD
        B = torch.randn(self.shapes["B"], generator=generator) * INIT_STD
        zeros = {"e": torch.zeros(self.shapes["e"]), "phase": torch.zeros(1)}
        return {"A": A, "B": B, **zeros, "mask": torch.ones(self.fixed_shapes["mask"])}

    def _orth_weight(self) -> float:
        weight: float = self.config.options.orth_weight
        return weight


def _excess(M: Tensor) -> Tensor:
    """M^T M - I of a tall matrix (n, r)."""
    return M.T @ M - torch.eye(M.shape[1], dtype=M.dtype, device=M.device)


def _slope(M: Tensor) -> Tensor:
    """Gradient of N(M^T M - I); 0 where that is 0."""
    excess = _excess(M)
    return (2 / torch.linalg.norm(excess).clamp_min(1e-30)) * (M @ excess)
