"""What do the singular values of a weight say (METHODS 2.6, items 2 and 4)?

Through the eigenvalues of the smaller Gram matrix in float64: faster than an SVD, and exact to 1e-8 of
the largest singular value, far below the edge that they are compared with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from decompft.adapters.spectra import top

TOP = 16  # leading singular values that are kept and compared


@dataclass(frozen=True, kw_only=True, slots=True)
class Spectrum:
    """The singular values S_1 >= S_2 >= ... of a matrix against those of noise of its size."""

    norm: float  # Frobenius
    edge: float  # Marchenko-Pastur: sigma (sqrt(out) + sqrt(in)), which noise alone does not pass
    num_above_edge: int  # 0 or 1 is within noise's own fluctuation
    stable_rank: float | None  # norm^2 / S_1^2; None for a matrix of zeros
    effective_rank: float | None  # exp of the entropy of S / sum(S)
    top: tuple[float, ...]  # S_1 ... S_16


def spectrum(weight: Tensor, std: float) -> Spectrum:
    """Of a matrix (out, in) whose entries have this standard deviation."""
    values = singular_values(weight)
    edge = std * (math.sqrt(weight.shape[0]) + math.sqrt(weight.shape[1]))
    norm = torch.linalg.vector_norm(values).item()
    return Spectrum(
        norm=norm,
        edge=edge,
        num_above_edge=int((values > edge).sum()),
        stable_rank=stable_rank(values),
        effective_rank=effective_rank(values),
        top=tuple(values[:TOP].tolist()),
    )


def singular_values(weight: Tensor) -> Tensor:
    """float64 (min(out, in),), descending."""
    return torch.linalg.eigvalsh(_gram(weight)).flip(0).clamp_min(0).sqrt()


def top_triplets(weight: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U (out, k), S (k,), V (in, k)) of the k = `num` largest singular values that are not 0; float32."""
    # a generator of its own: the same weight gives the same answer
    u, s, v = top(weight, min(num, *weight.shape), torch.Generator().manual_seed(0))
    k = int((s > 1e-7 * s[0]).sum())
    return u[:, :k], s[:k], v[:, :k]


def stable_rank(values: Tensor) -> float | None:
    """N^2 / S_1^2; None for zeros."""
    first = values[0].item()
    return (values.square().sum() / first**2).item() if first else None


def effective_rank(values: Tensor) -> float | None:
    """exp(-sum p log p), p = S / sum(S) (Roy and Vetterli, 2007); None for zeros."""
    total = values.sum()
    if not total:
        return None
    share = values / total
    return math.exp(-torch.special.xlogy(share, share).sum().item())


def _gram(weight: Tensor) -> Tensor:
    wide = weight.double()
    return wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
