"""SVDiff (Han et al., 2023, arXiv:2303.11305, eq. 3): singular values are shifted, singular vectors stay.

    W* = U diag(relu(S + d)) V^T = W + U diag(max(d, -S)) V^T

U, S, V are those of the full-precision weight, all of them: float32 numbers for one weight (long and narrow) to two
(square). Over a quantized base the change is added to what is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decompft.adapters.base import Adapter, Cached, Facts
from decompft.adapters.directions import diagonal, full_rows, pull_back_diagonal, tensors_of
from decompft.adapters.frozen.factors import Factors


class SvdiffLinear(Adapter):
    """Starts at d = 0: the base. Where S + d < 0 the value is 0, and d has no slope.

    max(d, -S) is relu(S + d) - S without its cancellation: a d of 1e-5 S keeps its digits.
    """

    d: torch.nn.Parameter  # (p,)
    U: Tensor  # (out, p)
    S: Tensor  # (p,)
    V: Tensor  # (p, in)

    def factors(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Factors:
        (d,), (U, S, V) = trained, fixed
        return diagonal(U, d.clamp(min=-S), V)

    def pull_back(
        self,
        trained: tuple[Tensor, ...],
        fixed: tuple[Tensor, ...],
        found: Factors,
        grads: Factors,
        weight: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        (d,), (U, S, V) = trained, fixed
        return (pull_back_diagonal(U, V, grads) * (d >= -S),)

    def facts_of(self, weight: Tensor, cached: Cached, generator: torch.Generator) -> dict[str, Tensor]:
        return full_rows(weight, cached)

    def initial_values(self, generator: torch.Generator, facts: Facts) -> dict[str, Tensor]:
        U, S, V = tensors_of(facts, "U", "S", "V")
        return {"d": torch.zeros(self.shapes["d"]), "U": U.T, "S": S, "V": V}
