"""How are the entries of a weight distributed: moments, outliers, distance from a gaussian (METHODS 2.6, item 1)?

Everything is taken of the sorted entries, in float64 and in pieces, so that ties (bfloat16, dequantized
weights) and 100 million entries are exact and cost no second copy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from decompft.launcher.worker.inspecting.mixture import Mixture, fit_mixture

Label = Literal["gaussian", "heavy", "inverted-T", "uniform"]

# The label's thresholds, between what shapes measure with 400,000 samples. `kurtosis` is the excess
# kurtosis of the entries (0 for a gaussian), `bulk` that of the fitted mixture, which a few outliers do not move.
#   kurtosis: uniform -1.20, gaussian cut at 2 sigma -0.63, triangle ("linear") -0.60, gaussian 0
UNIFORM_KURTOSIS = -0.5
#   bulk: gaussian 0.02, with 20 outliers of 40 sigma 0.08; Student t with 15 degrees 0.4, with 8 0.9;
#   logistic 0.9, Laplace 2.0
HEAVY_BULK = 0.5
#   wide over narrow sigma: logistic 1.8, Laplace 2.8, t with 3 degrees 3.4; a needle on a foot 10 and more
NEEDLE_RATIO = 4.0
#   the foot must be a part of the shape, not a tail: the wide part of t with 3 degrees is 13 %
FOOT_SHARE = 0.25
#   and so must the needle: a narrow part of 1 % is how a fit rounds off a triangle
NEEDLE_SHARE = 0.05
#   a wide part below this share is outliers, which `beyond_6_sigma` counts
OUTLIER_SHARE = 0.01

_PIECE = 1 << 22  # entries in float64 at once


@dataclass(frozen=True, kw_only=True, slots=True)
class Distribution:
    """Statistics of all entries; those that divide by the deviation are None where it is 0."""

    mean: float
    std: float  # over n, not n - 1
    min: float
    max: float
    zeros: float  # share of entries that are exactly 0
    skew: float | None = None
    kurtosis: float | None = None  # excess: 0 for a gaussian
    beyond_3_sigma: float | None = None  # share of entries; a gaussian has 2.7e-3, 6.3e-5, 2.0e-9
    beyond_4_sigma: float | None = None
    beyond_6_sigma: float | None = None
    ks: float | None = None  # Kolmogorov-Smirnov distance from N(mean, std)
    qq_slope: float | None = (
        None  # standardised entries over normal quantiles, least squares; 1 for a gaussian
    )
    qq_slope_center: float | None = None  # the same of the middle half: the bulk's width over sigma
    wide_share: float | None = None  # of the wide component of the two-gaussian fit
    wide_ratio: float | None = None  # its deviation over the narrow one's
    label: Label | None = None


def distribution(weight: Tensor) -> Distribution:
    """Statistics of a float tensor's entries, of any shape, on any device."""
    ordered = _sorted(weight)
    n = ordered.numel()
    mean = ordered.sum(dtype=torch.float64).item() / n
    powers = torch.zeros(3, dtype=torch.float64, device=ordered.device)
    for piece in ordered.split(_PIECE):
        centred = piece.double() - mean
        square = centred * centred
        powers += torch.stack([square.sum(), (square * centred).sum(), (square * square).sum()])
    second, third, fourth = (powers / n).tolist()
    std = math.sqrt(second)
    first, last = ordered[0].item(), ordered[-1].item()
    zeros = _count(ordered, 0.0, 0.0) / n
    if std <= 1e-7 * abs(mean) or std == 0:  # all equal, up to float32
        return Distribution(mean=mean, std=std, min=first, max=last, zeros=zeros)
    ks, slope, center = _against_normal(ordered, mean, std)
    mixture = fit_mixture(ordered, mean, std)
    kurtosis = fourth / second**2 - 3
    inside = {k: _count(ordered, mean - k * std, mean + k * std) for k in (3, 4, 6)}
    return Distribution(
        mean=mean,
        std=std,
        min=first,
        max=last,
        zeros=zeros,
        skew=third / std**3,
        kurtosis=kurtosis,
        beyond_3_sigma=1 - inside[3] / n,
        beyond_4_sigma=1 - inside[4] / n,
        beyond_6_sigma=1 - inside[6] / n,
        ks=ks,
        qq_slope=slope,
        qq_slope_center=center,
        wide_share=mixture.wide_share,
        wide_ratio=mixture.ratio,
        label=_label(kurtosis, mixture),
    )


def _label(kurtosis: float, mixture: Mixture) -> Label:
    """The shape of the histogram; the constants above say why."""
    if mixture.ratio >= NEEDLE_RATIO and FOOT_SHARE <= mixture.wide_share <= 1 - NEEDLE_SHARE:
        return "inverted-T"
    if kurtosis <= UNIFORM_KURTOSIS:
        return "uniform"
    if mixture.kurtosis >= HEAVY_BULK and mixture.wide_share >= OUTLIER_SHARE:
        return "heavy"
    return "gaussian"


def _sorted(weight: Tensor) -> Tensor:
    flat = weight.detach().reshape(-1).float()
    if flat.device.type == "cpu":  # numpy sorts in place and with vector instructions: a tenth of the time
        copy = flat.numpy().copy()
        copy.sort()
        return torch.from_numpy(copy)
    return flat.sort().values


def _count(ordered: Tensor, low: float, high: float) -> int:
    """Entries in [low, high]."""
    ends = torch.tensor([low, high], dtype=ordered.dtype, device=ordered.device)
    before = torch.searchsorted(ordered, ends[:1], right=False)
    return int(torch.searchsorted(ordered, ends[1:], right=True) - before)


def _against_normal(ordered: Tensor, mean: float, std: float) -> tuple[float, float, float]:
    """(KS distance, QQ slope, QQ slope of the middle half).

    Of tied entries the first and the last rank give the two sides of the empirical step, so the
    formula for distinct entries is exact for them too.
    """
    n, start = ordered.numel(), 0
    distance = 0.0
    sums = torch.zeros(4, dtype=torch.float64, device=ordered.device)
    for piece in ordered.split(_PIECE):
        rank = torch.arange(1, piece.numel() + 1, dtype=torch.float64, device=piece.device) + start
        value = (piece.double() - mean) / std
        expected = torch.special.ndtr(value)
        gap = torch.maximum(rank / n - expected, expected - (rank - 1) / n).max().item()
        distance = max(distance, gap)
        probability = (rank - 0.5) / n
        quantile = torch.special.ndtri(probability)
        middle = quantile * ((probability - 0.5).abs() <= 0.25)
        sums += torch.stack(
            [(quantile * value).sum(), quantile.square().sum(), (middle * value).sum(), middle.square().sum()]
        )
        start += piece.numel()
    xy, xx, middle_xy, middle_xx = sums.tolist()
    return distance, xy / xx, middle_xy / middle_xx if middle_xx else 1.0
