"""What is a low-rank change P = up @ down like, told from its thin factors alone (METHODS 1.3, identity 1)?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from decompft.launcher.worker.inspecting.spectrum import TOP, effective_rank, stable_rank


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """Statistics of P (out, in), none of which needs P."""

    norm: float  # Frobenius
    mean: float  # of the entries
    std: float
    effective_rank: float | None  # None for a product of zeros
    stable_rank: float | None
    top: tuple[float, ...]  # leading singular values


def product(up: Tensor, down: Tensor) -> Product:
    """Of up (out, rank) and down (rank, in); rank x rank products and thin QR, in float64.

    N(P)^2 = tr((up^T up)(down down^T)), mean = (1^T up)(down 1) / n, var = N(P)^2 / n - mean^2.
    """
    up, down = up.double(), down.double()
    n = up.shape[0] * down.shape[1]
    square = ((up.T @ up) * (down @ down.T)).sum().clamp_min(0).item()
    mean = (up.sum(0) @ down.sum(1)).item() / n
    left, right = torch.linalg.qr(up).R, torch.linalg.qr(down.T).R
    values = torch.linalg.svdvals(left @ right.T)
    return Product(
        norm=square**0.5,
        mean=mean,
        std=max(square / n - mean**2, 0.0) ** 0.5,
        effective_rank=effective_rank(values),
        stable_rank=stable_rank(values),
        top=tuple(values[:TOP].tolist()),
    )
