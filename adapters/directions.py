"""How does an adapter come by directions of its full-precision weight, and train numbers between them?

Directions are rows, as a cache keeps them: U (k, out), S (k,), V (k, in), in descending order. Kinds and
keys are the same for all methods, so that one decomposition serves them all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decompft.adapters import spectra
from decompft.adapters.base import Cached, Facts
from decompft.adapters.frozen.factors import Factors


def top_rows(weight: Tensor, k: int, cached: Cached, generator: torch.Generator) -> dict[str, Tensor]:
    """The k leading singular triplets of a weight (out, in)."""
    # where the search starts decides no more than its last 1e-3: another generator may find the entry
    return cached("top", k, lambda: _rows(spectra.top(weight, k, generator)))


def bottom_rows(weight: Tensor, k: int, cached: Cached) -> dict[str, Tensor]:
    """The k trailing singular triplets, in descending order."""
    return cached("bottom", k, lambda: _rows(spectra.bottom(weight, k)))


def full_rows(weight: Tensor, cached: Cached) -> dict[str, Tensor]:
    """All singular triplets."""
    return cached("full", min(weight.shape), lambda: _rows(spectra.full(weight)))


def qr_rows(weight: Tensor, r: int, cached: Cached) -> dict[str, Tensor]:
    """The first r columns of Q, as rows (r, out), and rows of R (r, in)."""

    def make() -> dict[str, Tensor]:
        Q, R = spectra.thin_qr(weight, r)
        return {"Q": Q.T, "R": R}

    return cached("qr", r, make)


def tensors_of(facts: Facts, *names: str) -> tuple[Tensor, ...]:
    """Facts that are tensors."""
    return tuple(torch.as_tensor(facts[name]) for name in names)


def diagonal(U: Tensor, values: Tensor, V: Tensor) -> Factors:
    """U diag(values) V with U (out, k) and V (k, in); the copy is made of the smaller one."""
    if U.shape[0] <= V.shape[1]:
        return Factors(up=U * values, down=V)
    return Factors(up=U, down=V * values.view(-1, 1))


def pull_back_diagonal(U: Tensor, V: Tensor, grads: Factors) -> Tensor:
    """The gradient of `values` (k,) from those of what `diagonal` returned."""
    assert grads.up is not None and grads.down is not None
    if U.shape[0] <= V.shape[1]:
        return torch.linalg.vecdot(grads.up, U, dim=0)
    return torch.linalg.vecdot(grads.down, V, dim=1)


def rest_rows(rows: Tensor, first: int, pair: tuple[Tensor, Tensor], s: float) -> Tensor:
    """Rows [first, first + n) of W - s B A, float32, from those of W (n, in).

    In float64, so that the result does not depend on how W was cut into chunks.

    Args:
        pair: B (out, r) and A (r, in).
    """
    B, A = (t.to(rows.device, torch.float64) for t in pair)
    return torch.addmm(rows.double(), B[first : first + rows.shape[0]], A, alpha=-s).float()


def moved(pair: tuple[Tensor, Tensor], start: tuple[Tensor, Tensor], s: float) -> tuple[Tensor, Tensor]:
    """s (B A - B0 A0) as (up, down) of rank 2 r, of differences that were taken in float32.

    Args:
        pair: B (out, r) and A (r, in); `start`: B0 and A0.
    """
    (B, A), (B0, A0) = pair, start
    return s * torch.cat([B, B - B0], dim=1), torch.cat([A - A0, A0])


def _rows(triplets: spectra.Triplets) -> dict[str, Tensor]:
    U, S, V = triplets
    return {"U": U.T, "S": S, "V": V.T}
