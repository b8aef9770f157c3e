"""Which two gaussians, one narrow and one wide about the same mean, fit the entries of a weight?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Numbers = NDArray[np.float64]  # numpy: on 2,400 numbers torch's threads cost ten times what they save

_BINS = 2400
_REACH = 12.0  # sigmas; what lies beyond is counted in the last bin
_ROUNDS = 200
# (share of the narrow part, its variance, that of the wide part) over the whole variance: a mild
# mixture and a needle; one start alone stops at a local maximum for the other's shape
_STARTS = ((0.5, 0.3, 1.7), (0.2, 0.005, 1.25))


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """(1 - wide_share) N(0, narrow^2) + wide_share N(0, (ratio narrow)^2)."""

    wide_share: float
    ratio: float

    @property
    def kurtosis(self) -> float:
        """Excess kurtosis of the mixture: 3 (E[s^4] / E[s^2]^2 - 1)."""
        wide = self.ratio**2
        second = 1 + self.wide_share * (wide - 1)
        fourth = 1 + self.wide_share * (wide**2 - 1)
        return 3 * (fourth / second**2 - 1)


def fit_mixture(ordered: Tensor, mean: float, std: float) -> Mixture:
    """Maximum likelihood by EM on a histogram of the distances from the mean.

    Exact zeros are left out: pruning and 4-bit codes put an atom there, which no shape explains.

    Args:
        ordered: float32 (n,), ascending.
    """
    share, square = _histogram(ordered, mean, std)
    fits = [_em(share, square, start) for start in _STARTS]
    return max(fits, key=lambda fit: fit[0])[1]


def _histogram(ordered: Tensor, mean: float, std: float) -> tuple[Numbers, Numbers]:
    """Share of entries in each bin of distance, and the square of its middle in sigmas; float64."""
    steps = torch.linspace(0, _REACH, _BINS + 1, dtype=torch.float64)
    zeros = ordered.new_zeros(1)
    gone = torch.searchsorted(ordered, zeros, right=True) - torch.searchsorted(ordered, zeros, right=False)
    above = torch.searchsorted(ordered, (mean + std * steps).to(ordered), right=False).cpu()
    below = torch.searchsorted(ordered, (mean - std * steps).to(ordered), right=False).cpu()
    counts = (above.diff() - below.diff()).double()
    counts[-1] += ordered.numel() - above[-1] + below[-1]
    at_zero = min(int(abs(mean) / std / _REACH * _BINS), _BINS - 1)
    counts[at_zero] = (counts[at_zero] - gone.item()).clamp_min(0)
    middle = (steps[1:] + steps[:-1]) / 2
    return (counts / counts.sum()).numpy(), middle.square().numpy()


def _em(share: Numbers, square: Numbers, start: tuple[float, float, float]) -> tuple[float, Mixture]:
    """(log-likelihood an entry, mixture); a variance stays above that of one bin."""
    floor = (_REACH / _BINS) ** 2
    weight, narrow, wide = start
    likelihood = -math.inf
    for _ in range(_ROUNDS):
        a = weight * np.exp(-square / (2 * narrow)) / math.sqrt(narrow)
        b = (1 - weight) * np.exp(-square / (2 * wide)) / math.sqrt(wide)
        both = a + b + 1e-300
        before, likelihood = likelihood, float(share @ np.log(both))
        part = share * (a / both)
        weight = min(max(float(part.sum()), 1e-6), 1 - 1e-6)
        narrow = max(float(part @ square) / weight, floor)
        wide = max(float((share - part) @ square) / (1 - weight), floor)
        if likelihood - before < 1e-9:
            break
    if narrow > wide:
        weight, narrow, wide = 1 - weight, wide, narrow
    return likelihood, Mixture(wide_share=1 - weight, ratio=math.sqrt(wide / narrow))
