"""Do the entries of a weight behave like independent noise (METHODS 2.6, item 2)?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32  # side of a block; 1,024 entries average out, and a 1,024 x 1,024 matrix still has 1,024 blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Whiteness:
    """Independent entries give 0, 0 and 1, up to 1/sqrt(n) and sqrt(2 / blocks)."""

    row_autocorrelation: float | None  # of neighbours along a row (inputs j and j + 1)
    column_autocorrelation: float | None  # of neighbours along a column (outputs i and i + 1)
    block_variance: float | None  # variance of the means of 32 x 32 blocks, over sigma^2 / 1024


def whiteness(weight: Tensor, mean: float, std: float) -> Whiteness:
    """Statistics of a matrix (out, in) with this mean and standard deviation, std > 0."""
    centred = weight.float() - mean
    return Whiteness(
        row_autocorrelation=_neighbours(centred[:, :-1], centred[:, 1:], std),
        column_autocorrelation=_neighbours(centred[:-1], centred[1:], std),
        block_variance=_block_variance(centred, std),
    )


def _neighbours(one: Tensor, other: Tensor, std: float) -> float | None:
    if not one.numel():
        return None
    return (one * other).sum(dtype=torch.float64).item() / one.numel() / std**2


def _block_variance(centred: Tensor, std: float) -> float | None:
    rows, columns = (size // BLOCK for size in centred.shape)
    if rows * columns < 2:
        return None
    whole = centred[: rows * BLOCK, : columns * BLOCK].reshape(rows, BLOCK, columns, BLOCK)
    means = whole.mean(dim=(1, 3), dtype=torch.float64)
    return means.var().item() * BLOCK**2 / std**2
