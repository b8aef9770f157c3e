"""LieRA's weight W (1 + D) or W exp(D), D = s B A, from 4-bit rows in one pass; and in one more, dL/dD from dL/dW*.

Codes, scales, A and B are read and the changed weight is written: D and W exist in registers only, in float32, and
what is written is rounded once. Codes and scales as frozen/fourbit.py stores them.

Shapes: A (rank, in), B (out, rank), W (out, in).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from decompft.adapters.kernels.dequantize import LEVELS, example_storage, sources
from decompft.adapters.kernels.dequantize import plain as plain_weight
from decompft.adapters.kernels.launch import launch, padded
from decompft.adapters.kernels.proved import Proved, close_to

MAX_RANK = 64  # B's and A's parts of a tile lie in registers
_COLUMNS = 64
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """D = s B A, and what W is multiplied by."""

    A: Tensor
    B: Tensor
    s: float
    limit: float | None  # exp(D), where D is held within +- limit; None: 1 + D


def fits(codes: Tensor, block_size: int, dtype: torch.dtype, change: Change) -> bool:
    """Whether `changed` runs on these."""
    A, B = change.A, change.B
    return (
        codes.is_cuda
        and dtype in _DTYPES
        and codes.numel() > 0
        and block_size % _COLUMNS == 0
        and A.dtype == B.dtype == torch.float32
        and A.shape[0] <= MAX_RANK
        and A.is_contiguous()
        and B.is_contiguous()
        and PROVED.runs(codes.device, dtype)
    )


def changed(
    codes: Tensor,
    scales: Tensor,
    code: str,
    block_size: int,
    dtype: torch.dtype,
    change: Change,
    slope: Tensor | None = None,
    *,
    double_quant: bool,
) -> Tensor:
    """W times its factor (out, in), or dL/dD. One launch.

    Args:
        slope: dL/dW* (out, in) in `dtype`, contiguous: it is overwritten by dL/dD, and returned.
    """
    num_rows, width = codes.shape[0], codes.shape[1] * 4
    out = torch.empty(num_rows, width, dtype=dtype, device=codes.device) if slope is None else slope
    rank = change.A.shape[0]
    tile_rows = rows_of(rank)
    stored = sources(codes, scales, code, None, double_quant=double_quant)
    launch(
        _triton(), (width // _COLUMNS, -(-num_rows // tile_rows)), codes.device,
        *stored.pointers, change.A, change.B, out, num_rows, width, block_size, stored.row_floats, rank,
        float(change.s), 0.0 if change.limit is None else float(change.limit),
        **stored.constants, EXACT=change.limit is not None, SLOPE=slope is not None,
        R=padded(rank), ROWS=tile_rows, COLUMNS=_COLUMNS,
    )  # fmt: skip
    return out


def rows_of(rank: int) -> int:
    """Of a tile: with more numbers of B and A in it, its machine code takes seconds to compile."""
    return 1024 // padded(rank)


def plain(weight: Tensor, change: Change, slope: Tensor | None = None) -> Tensor:
    """The twin, over the weight that is used (out, in), in its dtype."""
    D = (change.B @ change.A).mul_(change.s).to(weight.dtype)
    if change.limit is None:
        return weight + weight * D if slope is None else slope * weight
    factor = torch.exp(D.clamp(-change.limit, change.limit))
    if slope is None:
        return weight * factor
    return slope * weight * torch.where(D.abs() <= change.limit, factor, 0)


@cache
def _triton() -> Any:
    # triton only where a GPU is
    from decompft.adapters.kernels import changed_triton

    return changed_triton.changed


def _example(device: torch.device, dtype: torch.dtype) -> None:
    """Both factors, forward and backward, of rows that fill no tile."""
    draw = torch.Generator().manual_seed(0)
    num_rows, rank = rows_of(5) + 5, 5
    codes, scales = example_storage(device, double_quant=True, num_rows=num_rows, num_blocks=3)
    given: tuple[Tensor, Tensor, str, int] = (codes, scales, "nf4", 64)
    weight = plain_weight(*given, torch.float32, double_quant=True).double()
    A, B = (torch.randn(size, generator=draw).to(device) for size in ((rank, 192), (num_rows, rank)))
    slope = torch.randn(num_rows, 192, generator=draw).to(device, dtype)
    for limit in (None, 0.5):
        change = Change(A=A, B=B, s=0.25, limit=limit)
        wide = Change(A=A.double(), B=B.double(), s=0.25, limit=limit)
        for held in (None, slope.clone()):
            exact = plain(weight, wide, None if held is None else held.double())
            # rounded once to `dtype` after a few roundings in float32; 1 + D may be near 0: then its error is that of 1
            bound = torch.finfo(dtype).eps * exact.abs() + 2**-20 * (weight.abs() + exact.abs())
            bound += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            if limit is not None and held is not None:
                D = wide.s * (wide.B @ wide.A)
                bound[(D.abs() - limit).abs() < 1e-5] = torch.inf  # on either side of the limit, by rounding
            found = changed(*given, dtype, change, held, double_quant=True)
            close_to(found, exact.to(dtype), bound)


PROVED = Proved(
    name="changed",
    instead="tiles in torch's operators",
    example=_example,
    methods=("liera", "hira"),
    formats=tuple(LEVELS),
)
