"""What did tuning change in a weight (METHODS 2.6, item 4)?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from decompft.launcher.worker.inspecting.spectrum import TOP, top_triplets


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """W, and dW = W_tuned - W."""

    delta_norm: float  # N(dW)
    delta_mean: float
    delta_std: float
    delta_std_ratio: float | None  # over std(W)
    variance_growth: float  # std(W + dW)^2 - std(W)^2
    correlation: float | None  # of dW's entries with W's; None where nothing changed
    growth: tuple[float, ...]  # of the leading singular values: S_i(W + dW) / S_i(W)
    left_cosines: tuple[float, ...]  # |<u_i(W), u_i(W + dW)>|, output side, by index
    right_cosines: tuple[float, ...]  # |<v_i(W), v_i(W + dW)>|, input side, by index


def compare(weight: Tensor, tuned: Tensor) -> Comparison:
    """Of two matrices (out, in) on one device."""
    weight, tuned = weight.float(), tuned.float()
    delta = tuned.double() - weight
    mean, variance = _mean(delta), _variance(weight)
    spread = (delta - mean).square().mean().item()
    covariance = ((delta - mean) * (weight - _mean(weight))).mean().item()
    u, s, v = top_triplets(weight, TOP)
    new_u, new_s, new_v = top_triplets(tuned, TOP)
    k = min(len(s), len(new_s))
    return Comparison(
        delta_norm=torch.linalg.vector_norm(delta).item(),
        delta_mean=mean,
        delta_std=spread**0.5,
        delta_std_ratio=(spread / variance) ** 0.5 if variance else None,
        # not the difference of two variances: at dW a thousandth of W that loses half of the digits
        variance_growth=2 * covariance + spread,
        correlation=covariance / (spread * variance) ** 0.5 if spread * variance else None,
        growth=tuple((new_s[:k] / s[:k]).tolist()),
        left_cosines=tuple((u[:, :k] * new_u[:, :k]).sum(0).abs().clamp_max(1).tolist()),
        right_cosines=tuple((v[:, :k] * new_v[:, :k]).sum(0).abs().clamp_max(1).tolist()),
    )


def _mean(matrix: Tensor) -> float:
    return matrix.mean(dtype=torch.float64).item()


def _variance(matrix: Tensor) -> float:
    return (matrix.double() - _mean(matrix)).square().mean().item()
