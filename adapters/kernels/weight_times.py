"""W A^T of an nf4 or fp4 weight and a few rows A: codes are read, and the weight is written nowhere.

Unpacked first, all of the weight is written, four times what its codes take, and read again. Here a tile is unpacked
as dequantize.py has it, rounded to A's dtype and multiplied where it lies; sums are float32, over tiles, then over
stretches of columns, always in the same order.

Shapes: W (O, I), A (R, I), W A^T (O, R).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from decompft.adapters.kernels.dequantize import LEVELS, example_storage, sources
from decompft.adapters.kernels.dequantize import plain as plain_weight
from decompft.adapters.kernels.launch import launch, padded
from decompft.adapters.kernels.proved import Proved, close_to

MAX_RANK = 64
_DTYPES = (torch.bfloat16, torch.float16)
_ROWS, _COLUMNS, _TILES = 64, 64, 8


def fits(codes: Tensor, block_size: int, A: Tensor) -> bool:
    """Whether `weight_times` runs on these."""
    return (
        codes.is_cuda
        and A.dtype in _DTYPES
        and 0 < A.shape[0] <= MAX_RANK
        and A.is_contiguous()
        and codes.numel() > 0
        and block_size % 32 == 0
        and block_size & (block_size - 1) == 0
        and PROVED.runs(codes.device, A.dtype)
    )


def weight_times(
    codes: Tensor, scales: Tensor, A: Tensor, code: str, block_size: int, *, double_quant: bool
) -> Tensor:
    """W A^T in float32, W rounded to A's dtype.

    Args:
        codes, scales: as FourBitLinear stores them.
    """
    (rank, width), num_rows = A.shape, codes.shape[0]
    columns = columns_of(block_size)
    grid = (-(-width // (columns * _TILES)), -(-num_rows // _ROWS))
    parts = torch.empty(grid[0], num_rows, rank, dtype=torch.float32, device=codes.device)
    stored = sources(codes, scales, code, None, double_quant=double_quant)
    launch(
        _triton(), grid, codes.device,
        *stored.pointers, A, parts, num_rows, width, block_size, stored.row_floats, rank,
        **stored.constants, R=padded(rank), ROWS=_ROWS, COLUMNS=columns, TILES=_TILES,
        # low + step * byte is rounded as FUSED says, not as a compiler likes
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return parts.sum(0)


def plain(
    codes: Tensor, scales: Tensor, A: Tensor, code: str, block_size: int, *, double_quant: bool
) -> Tensor:
    """The twin, by the weight as a whole."""
    weight = plain_weight(codes, scales, code, block_size, A.dtype, double_quant=double_quant)
    return weight.float() @ A.float().T


def columns_of(block_size: int) -> int:
    """Of a tile: within a block."""
    return min(block_size, _COLUMNS)


@cache
def _triton() -> Any:
    # triton only where a GPU is
    from decompft.adapters.kernels import weight_times_triton

    return weight_times_triton.weight_times


def example(
    device: torch.device,
    dtype: torch.dtype,
    code: str,
    rank: int,
    size: tuple[int, int],
    *,
    double_quant: bool,
) -> None:
    """Beside the twin in float64.

    Args:
        size: rows, and blocks of 64 in one.

    Raises:
        WrongKernelError: it is further from it than rounding allows.
    """
    codes, scales = example_storage(device, double_quant=double_quant, num_rows=size[0], num_blocks=size[1])
    A = torch.randn(rank, 64 * size[1], generator=torch.Generator().manual_seed(1)).to(device, dtype)
    found = weight_times(codes, scales, A, code, 64, double_quant=double_quant)
    weight = plain_weight(codes, scales, code, 64, dtype, double_quant=double_quant).double()
    # float32 sums of exact products, of which a tensor core may cut two bits off
    bound = 2.0**-22 * A.shape[1] ** 0.5 * 4 * (weight.abs() @ A.double().abs().T)
    close_to(found, (weight @ A.double().T).float(), bound)


def _example(device: torch.device, dtype: torch.dtype) -> None:
    """Rows that fill no tile, columns that fill no stretch, a padded rank."""
    example(device, dtype, "nf4", 16, (_ROWS + 5, _TILES + 3), double_quant=True)
    example(device, dtype, "fp4", 5, (5, 3), double_quant=False)


PROVED = Proved(
    name="weight_times",
    instead="unpacked weights and torch's product",
    example=_example,
    methods=("dora",),
    formats=tuple(LEVELS),
    computes=_DTYPES,
)
