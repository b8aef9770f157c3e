"""Both products that a thin branch's backward pass makes of dy, from one reading of dy: dy up, and dy^T hq.

dy is by far the largest array of the two products, and both wait for memory. Each program has a stretch of rows and
columns of dy, multiplies it by both thin arrays and writes float32 parts, which a second launch adds up in a fixed
order: the same input gives the same bits. gu is rounded once to the compute dtype, d_up not at all.

Shapes: T tokens, O out, R the rank; dy (T, O), up (O, R), hq = q h (T, R), gu (T, R).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from decompft.adapters.kernels.launch import launch, padded
from decompft.adapters.kernels.proved import Proved, close_to

# parts are float32: those of a stretch of 512 x 256 are 0.19 of dy's bytes for R = 16 and 0.38 for 32, and are written
# and read; at 64 they would cost more than the second reading of dy that they save
MAX_RANK = 32
_DTYPES = (torch.bfloat16, torch.float16)  # those that tensor cores multiply as they are
_ROWS, _COLUMNS = 64, 256  # of a tile; 64 rows are the least that a multiplication of a warp group takes
_TILES = 8  # a program's at most, one below the other
_PROGRAMS = 256  # at least, where dy is large enough: two for nearly each of 132 multiprocessors
_STAGES = 3  # two tiles are fetched while one is multiplied: 110 KiB of shared memory for R = 16, so two programs fit
_SIZE = 256  # numbers that a program of the second launch makes
_PARTS = 16  # of each, read at once


def fits(dy_TO: Tensor, up_OR: Tensor, hq_TR: Tensor) -> bool:
    """Whether `visit` runs on these."""
    return (
        dy_TO.is_cuda
        and dy_TO.dtype in _DTYPES
        and dy_TO.dtype == up_OR.dtype == hq_TR.dtype
        and up_OR.shape[1] <= MAX_RANK
        and dy_TO.numel() > 0
        and dy_TO.stride(1) == up_OR.stride(1) == hq_TR.stride(1) == 1
        and PROVED.runs(dy_TO.device, dy_TO.dtype)
    )


def visit(dy_TO: Tensor, up_OR: Tensor, hq_TR: Tensor, gu_TR: Tensor, scale: float) -> Tensor:
    """gu becomes scale (dy up); returns dy^T hq (O, R) in float32. Two launches.

    Args:
        gu_TR: contiguous along R; rows may be further apart than they are long, as those of all others may.
    """
    return _launch(dy_TO, up_OR, hq_TR, gu_TR, scale, _tiles_of(*dy_TO.shape))


def plain(dy_TO: Tensor, up_OR: Tensor, hq_TR: Tensor, gu_TR: Tensor, scale: float) -> Tensor:
    """The twin of `visit`, in any dtype; what it returns is float32 or better."""
    dtype = torch.promote_types(dy_TO.dtype, torch.float32)
    dy_TO = dy_TO.to(dtype)
    gu_TR.copy_((dy_TO @ up_OR.to(dtype)).mul_(scale))
    return dy_TO.T @ hq_TR.to(dtype)


def _launch(dy_TO: Tensor, up_OR: Tensor, hq_TR: Tensor, gu_TR: Tensor, scale: float, tiles: int) -> Tensor:
    (num_rows, num_columns), rank = dy_TO.shape, up_OR.shape[1]
    column_blocks, row_blocks = -(-num_columns // _COLUMNS), -(-num_rows // (_ROWS * tiles))
    gu_parts = hq_TR.new_empty(column_blocks, num_rows, rank, dtype=torch.float32)
    d_up_parts = hq_TR.new_empty(row_blocks, num_columns, rank, dtype=torch.float32)
    d_up_OR = hq_TR.new_empty(num_columns, rank, dtype=torch.float32)
    gu_size, d_up_size = num_rows * rank, num_columns * rank
    launch(
        _triton().visit_parts, (column_blocks, row_blocks), dy_TO.device,
        dy_TO, up_OR, hq_TR, gu_parts, d_up_parts, num_rows, num_columns, rank,
        dy_TO.stride(0), up_OR.stride(0), hq_TR.stride(0),
        R=padded(rank), ROWS=_ROWS, COLUMNS=_COLUMNS, TILES=tiles, num_warps=4, num_stages=_STAGES,
    )  # fmt: skip
    launch(
        _triton().visit_sums, (-(-gu_size // _SIZE) - (-d_up_size // _SIZE),), dy_TO.device,
        gu_parts, d_up_parts, gu_TR, d_up_OR, rank, gu_size, d_up_size, column_blocks, row_blocks,
        gu_TR.stride(0), scale, SIZE=_SIZE, PARTS=_PARTS,
    )  # fmt: skip
    return d_up_OR


def _tiles_of(num_rows: int, num_columns: int) -> int:
    """Of a program: the more, the fewer parts of d_up; a power of 2, as each number is compiled by itself."""
    tiles = -(-num_rows // _ROWS) * -(-num_columns // _COLUMNS)
    return min(_TILES, 1 << max(0, (tiles // _PROGRAMS).bit_length() - 1))


@cache
def _triton() -> Any:
    # triton only where a GPU is
    from decompft.adapters.kernels import visit_triton

    return visit_triton


def _example(device: torch.device, dtype: torch.dtype) -> None:
    """Odd strides, which are read number by number, and even ones, whose tiles are fetched ahead; float64 beside it."""
    draw = torch.Generator().manual_seed(0)
    num_rows = _ROWS * (_TILES + 2) + 5  # the second program's last tiles are part empty, and empty
    for rank, num_columns, before in ((5, _COLUMNS + 23, 3), (16, _COLUMNS + 32, 16), (MAX_RANK, 32, 0)):
        sizes = ((num_rows, num_columns), (num_columns, rank), (num_rows, before + rank))
        dy, up, wide = (torch.randn(size, generator=draw).to(device, dtype) for size in sizes)
        hq, gu = wide[:, before:], torch.empty_like(wide)[:, before:]
        d_up = _launch(dy, up, hq, gu, 0.7, _TILES)
        exact_gu = torch.empty(gu.shape, dtype=torch.float64, device=device)
        exact_d_up = plain(dy.double(), up.double(), hq.double(), exact_gu, 0.7)
        # float32 sums of n terms in any order: n half spacings of what was added up, twice for tensor cores that cut
        # off; gu is rounded once more
        spacing, near_zero = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
        of_gu = 2 * 2**-24 * num_columns * 0.7 * (dy.double().abs() @ up.double().abs())
        of_d_up = 2 * 2**-24 * num_rows * (dy.double().abs().T @ hq.double().abs())
        close_to(gu, exact_gu.to(dtype), of_gu + spacing * (exact_gu.abs() + near_zero))
        close_to(d_up, exact_d_up.float(), of_d_up)


PROVED = Proved(name="visit", instead="two products of torch's", example=_example, computes=_DTYPES)
