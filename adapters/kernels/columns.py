"""Column scales and their gradients over (tokens, columns) arrays, in one pass each.

Torch's own operators take a slow path where a bfloat16 array meets a float32 scale, and a product that is summed
costs it two passes and an array of the product's size. Sums are taken in float32 over fixed blocks of rows, then over
the blocks: the same input gives the same bits.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from decompft.adapters.kernels.launch import launch
from decompft.adapters.kernels.proved import Proved, close_to

_ROWS, _COLUMNS = 32, 128  # of a tile
_TILES = 8  # a program's, one below the other


def times_columns(x_TC: Tensor, scale_C: Tensor) -> Tensor:
    """x * scale in the wider of both dtypes, rounded once to x's dtype, in memory of its own."""
    if not _fits(x_TC):
        if x_TC.dtype == torch.float64:
            return x_TC * scale_C
        return torch.mul(x_TC, scale_C, out=torch.empty(x_TC.shape, dtype=x_TC.dtype, device=x_TC.device))
    out_TC = torch.empty(x_TC.shape, dtype=x_TC.dtype, device=x_TC.device)
    _launch(x_TC, x_TC, scale_C, out_TC, None)
    return out_TC


def dot_columns(a_TC: Tensor, b_TC: Tensor) -> Tensor:
    """Sum over the rows of a * b (columns,), float32 or better."""
    if not (_fits(a_TC) and _fits(b_TC)):
        return torch.sum(a_TC * b_TC, 0, dtype=_sum_dtype(a_TC))
    parts_NC = _parts(a_TC)
    _launch(a_TC, b_TC, None, None, parts_NC)
    return parts_NC.sum(0)


def dot(a_TC: Tensor, b_TC: Tensor) -> Tensor:
    """Sum of a * b (), float32 or better."""
    if not (_fits(a_TC) and _fits(b_TC)):
        return torch.sum(a_TC * b_TC, dtype=_sum_dtype(a_TC))
    parts_NC = _parts(a_TC)
    _launch(a_TC, b_TC, None, None, parts_NC)
    return parts_NC.sum()


def dot_columns_and_scale_(a_TC: Tensor, b_TC: Tensor, scale_C: Tensor) -> Tensor:
    """`dot_columns`, and b becomes b * scale, in place."""
    if not (_fits(a_TC) and _fits(b_TC)):
        found_C = torch.sum(a_TC * b_TC, 0, dtype=_sum_dtype(a_TC))
        b_TC.mul_(scale_C)
        return found_C
    parts_NC = _parts(a_TC)
    _launch(a_TC, b_TC, scale_C, b_TC, parts_NC)
    return parts_NC.sum(0)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _fits(x_TC: Tensor) -> bool:
    return x_TC.is_cuda and x_TC.dtype in (torch.bfloat16, torch.float16, torch.float32) and (
        x_TC.stride(1) == 1 and x_TC.numel() > 0 and PROVED.runs(x_TC.device, x_TC.dtype))  # fmt: skip


def _parts(x_TC: Tensor) -> Tensor:
    num_rows, num_columns = x_TC.shape
    blocks = -(-num_rows // (_ROWS * _TILES))
    return torch.empty(blocks, num_columns, dtype=torch.float32, device=x_TC.device)


def _launch(
    a_TC: Tensor,
    b_TC: Tensor,
    scale_C: Tensor | None,
    out_TC: Tensor | None,
    parts_NC: Tensor | None,
) -> None:
    num_rows, num_columns = a_TC.shape
    grid = (-(-num_columns // _COLUMNS), -(-num_rows // (_ROWS * _TILES)))
    out = b_TC if out_TC is None else out_TC
    launch(
        _triton(), grid, a_TC.device,
        a_TC, b_TC, scale_C, out, parts_NC, num_rows, num_columns, a_TC.stride(0), b_TC.stride(0), out.stride(0),
        DOTS=parts_NC is not None, SCALES=scale_C is not None, ROWS=_ROWS, COLUMNS=_COLUMNS, TILES=_TILES,
    )  # fmt: skip


@cache
def _triton() -> Any:
    # triton only where a GPU is
    from decompft.adapters.kernels import columns_triton

    return columns_triton.columns


def _example(device: torch.device, dtype: torch.dtype) -> None:
    """Rows and columns that fill no tile, each of the three variants."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3 * _ROWS + 5, _COLUMNS + 16, generator=draw).to(device, dtype) for _ in range(2))
    scale = torch.randn(_COLUMNS + 16, generator=draw).to(device)
    products, scaled = a.double() * b.double(), (b.float() * scale).to(dtype)
    # a float32 sum of n terms in any order: n half spacings of what was added up
    bound = 2**-24 * len(a) * products.abs().sum(0)
    out, parts = torch.empty_like(b), _parts(a)
    _launch(b, b, scale, out, None)
    close_to(out, scaled, 0.0)
    _launch(a, b, None, None, parts)
    close_to(parts.sum(0), products.sum(0).float(), 2 * bound)
    parts = _parts(a)
    _launch(a, b, scale, b, parts)
    close_to(parts.sum(0), products.sum(0).float(), 2 * bound)
    close_to(b, scaled, 0.0)


PROVED = Proved(name="columns", instead="torch's operators", example=_example)
