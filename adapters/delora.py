"""DeLoRA (Bini et al., 2025, arXiv:2503.18225): directions normalised one by one, one trained strength for all."""

from __future__ import annotations

import torch
from torch import Tensor

from decompft.adapters.base import Adapter, Facts, kaiming_uniform
from decompft.adapters.frozen.factors import Factors


class DeloraLinear(Adapter):
    """y = (W + B diag(lam / (r |a_i| |b_i|)) A diag(c)) x + bias.

    a_i are A's rows, b_i B's columns, c (in,) the column norms of the weight that is used at the start, kept as a
    buffer. Each norm is at least `eps`, as the installed peft has it: below that it is a constant.
    Starts at B = 0, lam = `lambda_init`; the slope of B is then 1/eps times as steep as it will be.
    """

    A: torch.nn.Parameter
    B: torch.nn.Parameter
    lam: torch.nn.Parameter
    column_norms: Tensor

    def factors(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Factors:
        A, B, lam = trained
        (c,) = fixed
        eps = self.config.options.eps
        a = torch.linalg.vector_norm(A, dim=1).clamp_min(eps)
        b = torch.linalg.vector_norm(B, dim=0).clamp_min(eps)
        per_lam = (a * b).mul(self.config.rank).reciprocal()
        return Factors(up=B * (lam * per_lam), down=A * c, keep=(a, b, per_lam))

    def pull_back(
        self,
        trained: tuple[Tensor, ...],
        fixed: tuple[Tensor, ...],
        found: Factors,
        grads: Factors,
        weight: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """With k = lam / (r a b) the scale of a direction: da = -dk k / a, but 0 where a is clamped; db likewise."""
        A, B, lam = trained
        (c,) = fixed
        a, b, per_lam = found.keep
        eps = self.config.options.eps
        assert grads.up is not None and grads.down is not None
        k = lam * per_lam
        dk = torch.linalg.vecdot(grads.up, B, dim=0)
        slope = dk * k
        of_a = torch.where(a > eps, slope / (a * a), 0.0)
        of_b = torch.where(b > eps, slope / (b * b), 0.0)
        return (
            torch.addcmul(grads.down * c, A, of_a[:, None], value=-1),
            torch.addcmul(grads.up * k, B, of_b, value=-1),
            torch.dot(dk, per_lam).reshape(1),
        )

    def initial_values(self, generator: torch.Generator, facts: Facts) -> dict[str, Tensor]:
        norms = facts["column_norms"]
        assert isinstance(norms, Tensor)
        return {
            "A": kaiming_uniform(self.shapes["A"], generator),
            "B": torch.zeros(self.shapes["B"]),
            "lam": torch.tensor([self.config.options.lambda_init], dtype=torch.float32),
            "column_norms": norms,
        }

    def lr_scales(self) -> dict[str, float]:
        return {"lam": self.config.options.lambda_lr_ratio}
