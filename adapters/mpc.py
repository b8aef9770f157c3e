"""MPC_o and MPC_d (Si et al., 2024, arXiv:2407.05417, eq. 25, 26): a regulariser of A and B over another method.

    MPC_o: P(A A^T - I) + P(B^T B - I)        MPC_d: P(A A^T - I) + P(B^T B - diag(B^T B))

P is the squared Frobenius norm (`power` 2) or the norm (1). To the loss of a step is added `weight` times the mean
of that over the adapted matrices, or its sum. It costs two rank x rank products a matrix; the base has no part in it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from decompft.adapters.base import Adapter
from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.frozen.factors import Factors
from decompft.adapters.inject import make_adapter
from decompft.adapters.spec import AdapterConfig
from decompft.adapters.specs.base import inner_config
from decompft.adapters.specs.mpc import MpcOptions


def make(base: FrozenLinear, config: AdapterConfig) -> Adapter:
    """The adapter of the method below, whose `config` it keeps, with the term added to its gradients."""
    adapter = make_adapter(base, inner_config(config))
    assert type(adapter).forward is Adapter.forward, "a forward of its own calls no pull_back"
    # as torch's parametrizations do it: the adapter may have been made by a function, not by its class
    adapter.__class__ = _constrained(type(adapter))  # type: ignore[arg-type]  # hash of a class, not of a module
    assert isinstance(adapter, Constrained)
    adapter.mpc, adapter.is_diagonal = config.options, config.method == "mpc_d"
    return adapter


class Constrained(Adapter):
    """Stands before the class of the method below, whose formula it leaves alone.

    The term is no `penalty`: that would be added a second time where the method below leaves
    `pull_back` as it is, and would hide a penalty of its own.
    """

    mpc: MpcOptions
    is_diagonal: bool  # B's columns need only be orthogonal

    def constraint(self, trained: tuple[Tensor, ...]) -> Tensor:
        """This layer's part of what is added to the loss of a step, ()."""
        rests = self._rests(*self._pair(trained), self.live(self.fixed()))
        term: Tensor = sum(torch.linalg.matrix_norm(rest) ** self.mpc.power for rest in rests)
        return self._weight() * term

    def pull_back(
        self,
        trained: tuple[Tensor, ...],
        fixed: tuple[Tensor, ...],
        found: Factors,
        grads: Factors,
        weight: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """The gradients of the method below, with those of the term written out."""
        slopes = list(super().pull_back(trained, fixed, found, grads, weight))
        if scale := self.penalty_share * self._weight():
            terms = self._slopes(*self._pair(trained), self.live(fixed))
            for place, of_term in zip(self._places(), terms, strict=True):
                before = slopes[place]
                slopes[place] = scale * of_term if before is None else torch.add(before, of_term, alpha=scale)
        return tuple(slopes)

    def _slopes(self, A: Tensor, B: Tensor, live: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Of N(P)^2: 4 P A and 4 B Q; of N(P), which has none where it is 0: 2 P A / N(P) and 2 B Q / N(Q)."""
        P, Q = self._rests(A, B, live)
        if self.mpc.power == 2:
            return 4 * P @ A, 4 * B @ Q
        P, Q = (2 * rest / torch.linalg.matrix_norm(rest).clamp_min(1e-30) for rest in (P, Q))
        return P @ A, B @ Q

    def _rests(self, A: Tensor, B: Tensor, live: Tensor | None) -> tuple[Tensor, Tensor]:
        """P = A A^T - I and Q = B^T B - I, or B^T B without its diagonal; (rank, rank). I of the live directions."""
        AAt, BtB = A @ A.T, B.T @ B
        one = torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
        lives = one if live is None else one * live.to(A.dtype)
        return AAt - lives, BtB - (BtB * one if self.is_diagonal else lives)

    def _weight(self) -> float:
        return self.mpc.weight / (self.num_siblings if self.mpc.reduction == "mean" else 1)

    def _places(self) -> tuple[int, int]:
        names = list(self.shapes)
        return names.index("A"), names.index("B")

    def _pair(self, trained: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        a, b = self._places()
        return trained[a], trained[b]


@cache
def _constrained(inner: type) -> type:
    """One class a method: `remarks` are made once a class."""
    return type(f"Constrained{inner.__name__}", (Constrained, inner), {})
