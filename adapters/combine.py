"""Several task vectors into one: average, task arithmetic, TIES, DARE, and NAN's coefficients.

A task vector tau (out, in) is what training changed of one weight; a thin one is tau = up @ down with
up (out, k) and down (k, in). N is the Frobenius norm. Every function works in the dtype it is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from decompft.adapters.spectra import top

Thin = tuple[Tensor, Tensor]  # up (out, k), down (k, in)


@dataclass(frozen=True, kw_only=True)
class Truncated:
    """The best approximation of a matrix by `up @ down` of a given rank, and what it leaves out."""

    up: Tensor  # (out, rank)
    down: Tensor  # (rank, in)
    lost: float  # Frobenius norm of what is left out
    norm: float  # of the whole matrix


def nan_coefficients(norms: Sequence[float]) -> list[float]:
    """NAN (Si et al., 2025, arXiv:2505.16148): alpha_i proportional to 1 / N_i, summing to 1.

    The least-squares merge weighs a model by the data behind it; the inverse norm stands for their amount.
    A norm of 0 (a part that does not touch this tensor) gets coefficient 0: it has nothing to weigh.
    """
    inverse = [1 / norm if norm else 0.0 for norm in norms]
    total = sum(inverse)
    return [value / total for value in inverse] if total else [1 / len(norms)] * len(norms)


def weighted_sum(taus: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """sum_i c_i tau_i: averaging (c sums to 1) and task arithmetic (Ilharco et al., 2022, arXiv:2212.04089)."""
    total = torch.zeros_like(taus[0])
    for tau, coefficient in zip(taus, coefficients, strict=True):
        total.add_(tau, alpha=coefficient)
    return total


def concatenate(parts: Sequence[Thin], coefficients: Sequence[float]) -> Thin:
    """`weighted_sum` of thin task vectors without a dense one: [c_1 up_1, c_2 up_2, ...], [down_1; down_2; ...]."""
    ups = [coefficient * up for (up, _), coefficient in zip(parts, coefficients, strict=True)]
    return torch.cat(ups, dim=1), torch.cat([down for _, down in parts], dim=0)


def ties(taus: Sequence[Tensor], coefficients: Sequence[float], density: float) -> Tensor:
    """TIES (Yadav et al., 2023, arXiv:2306.01708): trim, elect a sign for each element, mean of those that agree.

    With equal coefficients this is the paper's rule but for the trim, which it does once over all
    tensors of a model; here each tensor keeps its own largest. Coefficients weigh the election and the mean.
    An element whose votes cancel exactly is 0.

    Args:
        coefficients: not negative, not all 0; only their ratios matter.
        density: the fraction of each task vector's elements, the largest in magnitude, that is kept.
    """
    trimmed = [trim(tau, density) for tau in taus]
    # equal coefficients become exactly 1: opposite votes then cancel without a rounding error that decides
    votes = [coefficient / max(coefficients) for coefficient in coefficients]
    elected = torch.sign(weighted_sum(trimmed, votes))
    total, weight = torch.zeros_like(elected), torch.zeros_like(elected)
    for tau, coefficient in zip(trimmed, votes, strict=True):
        agrees = (torch.sign(tau) == elected) & (tau != 0)
        total.add_(tau * agrees, alpha=coefficient)
        weight.add_(agrees.to(tau.dtype), alpha=coefficient)
    return torch.where(weight > 0, total / weight, 0.0)


def trim(tau: Tensor, density: float) -> Tensor:
    """The elements of largest magnitude, at least one, and those equal to the least of them; 0 elsewhere."""
    kept = max(1, round(density * tau.numel()))
    magnitudes = tau.abs()
    place = tau.numel() - kept
    # several times faster than torch's kthvalue on a CPU
    least = float(np.partition(magnitudes.reshape(-1).cpu().numpy(), place)[place])
    return torch.where(magnitudes >= least, tau, 0.0)


def drop(tau: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """DARE (Yu et al., 2023, arXiv:2311.03099): each element is kept with probability `density`, over `density`.

    The expectation is tau. The paper's drop rate p is 1 - density.

    Args:
        generator: of the CPU, so that the same elements go on every device.
    """
    kept = torch.rand(tau.shape, generator=generator).to(tau.device) < density
    return torch.where(kept, tau / density, 0.0)


def recompress(thin: Thin, rank: int) -> Truncated:
    """The best rank-`rank` approximation of up @ down, by an SVD of k x k numbers: up = Q R, down^T = P S."""
    up, down = (factor.double() for factor in thin)
    q, r = torch.linalg.qr(up)
    p, s = torch.linalg.qr(down.T)
    u, sizes, vt = torch.linalg.svd(r @ s.T, full_matrices=False)
    root = sizes[:rank].sqrt()
    return Truncated(
        up=_padded(q @ (u[:, :rank] * root), rank, dim=1).to(thin[0].dtype),
        down=_padded((root[:, None] * vt[:rank]) @ p.T, rank, dim=0).to(thin[1].dtype),
        lost=float(sizes[rank:].norm()),
        norm=float(sizes.norm()),
    )


def truncate(tau: Tensor, rank: int, generator: torch.Generator) -> Truncated:
    """The best rank-`rank` approximation of a dense matrix; both factors carry the roots of its singular values.

    A matrix that has no `rank` of them is padded with zeros: all layers have factors of one rank.

    Args:
        generator: where a randomised SVD starts; what it loses is measured, not estimated.
    """
    u, sizes, v = top(tau, min(rank, *tau.shape), generator)
    root = sizes.sqrt()
    up = _padded(u * root, rank, dim=1).to(tau.dtype)
    down = _padded((v * root).T, rank, dim=0).to(tau.dtype)
    lost, norm = torch.linalg.norm(tau - up @ down), torch.linalg.norm(tau)
    return Truncated(up=up, down=down, lost=float(lost), norm=float(norm))


def padded(thin: Thin, rank: int) -> Thin:
    """The same product with factors of `rank`, zeros beyond their own."""
    return _padded(thin[0], rank, dim=1), _padded(thin[1], rank, dim=0)


def thin_norm(thin: Thin) -> float:
    """N(up @ down) from two k x k products, no dense one (METHODS.md 1.3, identity 1)."""
    return math.sqrt(_square(thin))


def scaled_norm(weight: Tensor, scale: float, thin: Thin) -> float:
    """N(tau) for tau = (scale - 1) W + up @ down, as MAP's is, without a dense tau.

    MAP with p = a / (N(W) + eps) and up @ down = b D / (N(D) + eps), eps ignored, gives METHODS.md 2.7's
    N(tau)^2 = (a - n0)^2 + b^2 + 2 (a - n0) b <W, D> / (n0 n).
    """
    radial = scale - 1
    up, down = thin
    cross = torch.sum((weight @ down.T).double() * up.double())  # <W, up down>
    square = radial**2 * float(torch.linalg.norm(weight)) ** 2 + 2 * radial * float(cross)
    return math.sqrt(max(0.0, square + _square(thin)))


def _square(thin: Thin) -> float:
    """N(up @ down)^2 in float64: the Gram matrices of a small update lose their last digits."""
    up, down = (factor.double() for factor in thin)
    return max(0.0, float(torch.sum((up.T @ up) * (down @ down.T))))


def _padded(factor: Tensor, rank: int, *, dim: int) -> Tensor:
    missing = rank - factor.shape[dim]
    return torch.nn.functional.pad(factor, (0, missing) if dim == 1 else (0, 0, 0, missing))
