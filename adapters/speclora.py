"""SpecLoRA (Si et al., 2025, arXiv:2505.23099): a reading, since only the abstract and a figure could be read.

    multiplicative:  W* = U diag(S o mu) V^T + s B A = W + U_k diag(m o S_k) V_k^T + s B A,  mu = 1 + m for i <= k
    additive:        W* = W + U_k diag(m) V_k^T + s B A

U, S, V are those of the full-precision weight; over a quantized base the terms are added to what is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decompft.adapters.base import Adapter, Cached, Facts, kaiming_uniform
from decompft.adapters.directions import tensors_of, top_rows
from decompft.adapters.frozen.factors import Factors
from decompft.adapters.lora import scaling


class SpecloraLinear(Adapter):
    """Starts at B = 0 and m = 0: the base. The slope of m_i is proportional to S_i (multiplicative).

    Dropout acts on the input of both thin terms.
    """

    A: torch.nn.Parameter
    B: torch.nn.Parameter
    m: torch.nn.Parameter
    U: Tensor  # (out, k)
    V: Tensor  # (k, in)

    def factors(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Factors:
        A, B, m = trained
        # s is in `up`: as a factor q it would be one launch less here and three more in the node
        up = torch.cat([fixed[0] * self._per_value(m, fixed), B * scaling(self.config)], dim=1)
        return Factors(up=up, down=torch.cat([fixed[-1], A]))

    def pull_back(
        self,
        trained: tuple[Tensor, ...],
        fixed: tuple[Tensor, ...],
        found: Factors,
        grads: Factors,
        weight: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        assert grads.up is not None and grads.down is not None
        k = trained[2].shape[0]
        dm = self._per_value(torch.linalg.vecdot(grads.up[:, :k], fixed[0], dim=0), fixed)
        return grads.down[k:], grads.up[:, k:] * scaling(self.config), dm

    def facts_of(self, weight: Tensor, cached: Cached, generator: torch.Generator) -> dict[str, Tensor]:
        return top_rows(weight, self.shapes["m"][0], cached, generator)

    def initial_values(self, generator: torch.Generator, facts: Facts) -> dict[str, Tensor]:
        U, S, V = tensors_of(facts, "U", "S", "V")
        start = {
            "A": kaiming_uniform(self.shapes["A"], generator),
            "B": torch.zeros(self.shapes["B"]),
            "m": torch.zeros(self.shapes["m"]),
            "U": U.T,
            "V": V,
        }
        return start | {"S": S} if "S" in self.fixed_shapes else start

    def lr_scales(self) -> dict[str, float]:
        return {"m": self.config.options.m_lr_ratio}

    def _per_value(self, m: Tensor, fixed: tuple[Tensor, ...]) -> Tensor:
        """m o S, or m; the same for its gradient."""
        return m * fixed[1] if "S" in self.fixed_shapes else m
