"""SVFT (Lingam et al., 2024, arXiv:2405.19597, eq. 2): a sparse trained matrix between singular vectors.

    W* = U (diag(S) + g M) V^T = W + U_k (g M) V_k^T,    g = sigmoid(gate)

M (k, k) is 0 outside its pattern, whose entries train; the gate and the start are those of the authors' code
(VijayLingam95/SVFT). U and V are those of the full-precision weight; fewer than all of them keep the adapter thin.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from decompft.adapters.base import Adapter, Cached, Facts
from decompft.adapters.directions import diagonal, full_rows, pull_back_diagonal, tensors_of, top_rows
from decompft.adapters.frozen.factors import Factors
from decompft.adapters.spec import spec_of
from decompft.adapters.specs.spectral import num_off_diagonals


class SvftLinear(Adapter):
    """Starts at gate = 0, g = 0.5, and M's nnz entries N(0, 2 / nnz): not at the base, but at N(W* - W) = 0.71,
    whatever the size of the layer and of M."""

    M: torch.nn.Parameter  # (nnz,)
    gate: torch.nn.Parameter  # (1,)
    U: Tensor  # (out, k)
    V: Tensor  # (k, in)
    at: Tensor  # (2, nnz), rows and columns of M's entries; none for the diagonal. Floats, as all of an adapter's file

    def factors(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Factors:
        (M, gate), (U, V, *at) = trained, fixed
        values = M * gate.sigmoid()
        if not at:
            return diagonal(U, values, V)
        k = V.shape[0]
        core = values.new_zeros(k, k).index_put(_places(at[0]), values)
        # the product is made of the smaller one
        if U.shape[0] <= V.shape[1]:
            return Factors(up=U @ core, down=V)
        return Factors(up=U, down=core @ V)

    def pull_back(
        self,
        trained: tuple[Tensor, ...],
        fixed: tuple[Tensor, ...],
        found: Factors,
        grads: Factors,
        weight: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        (M, gate), (U, V, *at) = trained, fixed
        assert grads.up is not None and grads.down is not None
        if not at:
            slope = pull_back_diagonal(U, V, grads)
        elif U.shape[0] <= V.shape[1]:
            slope = (U.T @ grads.up)[_places(at[0])]
        else:
            slope = (grads.down @ V.T)[_places(at[0])]
        g = gate.sigmoid()
        return slope * g, torch.dot(slope, M) * g * (1 - g)

    def facts_of(self, weight: Tensor, cached: Cached, generator: torch.Generator) -> dict[str, Tensor]:
        """U and V as rows, and `at` for patterns.

        Raises:
            ValueError: top_k of a layer that is not square.
        """
        options, k = self.config.options, self.fixed_shapes["V"][0]
        if k == min(weight.shape):
            found = full_rows(weight, cached)
        else:
            found = top_rows(weight, k, cached, generator)
        U, V = found["U"], found["V"]
        if options.pattern == "plain":
            return {"U": U, "V": V}
        num_entries = self.shapes["M"][0]
        if options.pattern == "banded":
            i = torch.arange(k)
            flat = torch.nonzero(((i - i.view(-1, 1)).abs() <= num_off_diagonals(options)).view(-1)).view(-1)
        elif options.pattern == "random":
            flat = torch.randperm(k * k, generator=generator)[:num_entries]
        elif U.shape[1] != V.shape[1]:
            raise ValueError(spec_of(self.config).refusal(U.shape[1], V.shape[1], self.config, True))
        else:
            # the sign of u_i^T v_j is that of the decomposition, which is no one's choice
            flat = (U @ V.T).abs().view(-1).topk(num_entries).indices
        at = torch.stack([flat // k, flat % k]).float()
        return {"U": U, "V": V, "at": at.to(U.device)}

    def initial_values(self, generator: torch.Generator, facts: Facts) -> dict[str, Tensor]:
        U, V = tensors_of(facts, "U", "V")
        num_entries = self.shapes["M"][0]
        M = torch.empty(num_entries).normal_(0.0, math.sqrt(2 / num_entries), generator=generator)
        start = {"M": M, "gate": torch.zeros(1), "U": U.T, "V": V}
        return start | {"at": tensors_of(facts, "at")[0]} if "at" in self.fixed_shapes else start


def _places(at: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = at.long()
    return rows, columns
