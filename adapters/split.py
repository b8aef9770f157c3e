"""PiSSA, MiLoRA and OLoRA: LoRA whose product starts as a part of W, which is taken out of the base.

    W* = W_res + s B A,    W_res = W - s B0 A0,    A, B start as A0, B0
    PiSSA  (Meng et al., 2024, arXiv:2404.02948, eq. 2-4): B0 = U_r diag(sqrt(S_r / s)), A0 = diag(sqrt(S_r / s)) V_r^T
    MiLoRA (Wang et al., 2024, arXiv:2406.09044, eq. 4-6): the same of the r smallest singular values
    OLoRA  (Buyukakyuz, 2024, arXiv:2406.01775): B0 = Q_r, A0 = R_r of W = Q R, as peft computes it
           (peft/tuners/lora/layer.py, olora_init)

W is the full-precision weight. A0 and B0 are in the adapter's file: the base is made of them again elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from decompft.adapters.base import Adapter, Cached, Facts
from decompft.adapters.directions import bottom_rows, moved, qr_rows, rest_rows, tensors_of, top_rows
from decompft.adapters.frozen.factors import Factors
from decompft.adapters.lora import scaling


class SplitLinear(Adapter):
    """`base: residual`: y = (Q(W - s B0 A0) + s B A) x + bias, Q being the base's quantizer.

    The sum is near W at the start, and with PiSSA nearer than Q(W): the largest values are not quantized.

    `base: exact`: y = (Q(W) + s B A - s B0 A0) x + bias, thin rank 2 r: at the start exactly the base, which is
    no one else's business and may be quantized already.
    """

    A: torch.nn.Parameter
    B: torch.nn.Parameter
    A0: Tensor
    B0: Tensor

    def factors(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Factors:
        A, B = trained
        if self.rewrites_base:
            return Factors(up=B, down=A, q=scaling(self.config))
        A0, B0 = fixed
        # B A - B0 A0, of differences that were taken in float32: rounded to bfloat16 one by one, A and A0
        # would be the same until A had moved by 0.4 %
        up = torch.cat([B, B - B0], dim=1)
        return Factors(up=up, down=torch.cat([A - A0, A0]), q=scaling(self.config))

    def pull_back(
        self,
        trained: tuple[Tensor, ...],
        fixed: tuple[Tensor, ...],
        found: Factors,
        grads: Factors,
        weight: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        if self.rewrites_base:
            return grads.down, grads.up
        assert grads.up is not None and grads.down is not None
        r = self.config.rank
        return grads.down[:r], grads.up[:, :r] + grads.up[:, r:]

    @property
    def rewrites_base(self) -> bool:
        return bool(self.config.options.base == "residual")

    def base_rows(self, rows: Tensor, first: int, values: Mapping[str, Tensor]) -> Tensor:
        if not self.rewrites_base:
            return rows
        return rest_rows(rows, first, (values["B0"], values["A0"]), scaling(self.config))

    def no_decay(self) -> tuple[str, ...]:
        """Decay draws to 0, and s B0 A0, which A and B hold, is a part of W."""
        return ("A", "B")

    @torch.no_grad()
    def change_of_checkpoint(self) -> tuple[Tensor, Tensor] | None:
        return moved((self.B, self.A), (self.B0, self.A0), scaling(self.config))

    def initial_values(self, generator: torch.Generator, facts: Facts) -> dict[str, Tensor]:
        A, B = self.pair(facts)
        return {"A": A, "B": B, "A0": A, "B0": B}

    def pair(self, facts: Facts) -> tuple[Tensor, Tensor]:
        """A0 (r, in) and B0 (out, r): half of each of the singular values over s is in either."""
        U, S, V = tensors_of(facts, "U", "S", "V")
        root = (S / scaling(self.config)).sqrt()
        return root.view(-1, 1) * V, U.T * root


class PissaLinear(SplitLinear):
    """From the largest singular values."""

    def facts_of(self, weight: Tensor, cached: Cached, generator: torch.Generator) -> dict[str, Tensor]:
        return top_rows(weight, self.config.rank, cached, generator)


class MiloraLinear(SplitLinear):
    """From the smallest singular values."""

    def facts_of(self, weight: Tensor, cached: Cached, generator: torch.Generator) -> dict[str, Tensor]:
        return bottom_rows(weight, self.config.rank, cached)


class OloraLinear(SplitLinear):
    """From a QR. The product is s times Q_r R_r: the pair carries no scale, as in peft."""

    def facts_of(self, weight: Tensor, cached: Cached, generator: torch.Generator) -> dict[str, Tensor]:
        return qr_rows(weight, self.config.rank, cached)

    def pair(self, facts: Facts) -> tuple[Tensor, Tensor]:
        Q, R = tensors_of(facts, "Q", "R")
        return R, Q.T
