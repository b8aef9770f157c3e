"""The Triton side of weight_times.py: imported only on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl

from decompft.adapters.kernels.dequantize_triton import block_scale, unpacked


@triton.jit  # type: ignore[untyped-decorator]
def weight_times(  # type: ignore[no-untyped-def]
    codes_ptr,  # (rows, width / 2) bytes, the first code of two in the high half
    bytes_ptr,
    floats_ptr,
    times_ptr,  # of no use here
    levels_ptr,  # (16,) float32
    a_ptr,  # (rank, width), of the dtype to which a weight is rounded
    parts_ptr,  # (grid of columns, rows, rank) float32
    num_rows,
    width,
    block_size,
    row_floats,
    rank,
    DOUBLE: tl.constexpr,
    FUSED: tl.constexpr,
    TIMES: tl.constexpr,
    R: tl.constexpr,  # power of 2, at least rank and 16
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # divides the block size, so that a row of a tile has one scale
    TILES: tl.constexpr,  # beside one another, summed in registers
):
    """What a stretch of columns adds to W A^T."""
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < num_rows
    wide = rows.to(tl.int64)
    r = tl.arange(0, R)
    in_rank = r < rank
    half = tl.arange(0, COLUMNS // 2)
    total = tl.zeros((ROWS, R), dtype=tl.float32)
    for tile in range(TILES):
        column = (tl.program_id(0) * TILES + tile) * COLUMNS
        mask = in_rows & (column < width)
        scale = block_scale(
            bytes_ptr,
            floats_ptr,
            times_ptr,
            wide,
            column // block_size,
            row_floats,
            mask,
            DOUBLE,
            FUSED,
            TIMES,
        )
        byte_at = codes_ptr + wide[:, None] * (width // 2) + (column // 2 + half)[None, :]
        byte = tl.load(byte_at, mask=mask[:, None], other=0).to(tl.int32)
        weight = unpacked(byte, levels_ptr, scale).to(a_ptr.dtype.element_ty)
        columns = column + tl.arange(0, COLUMNS)
        of_a = in_rank[:, None] & (columns < width)[None, :]
        a = tl.load(a_ptr + r[:, None] * width + columns[None, :], mask=of_a, other=0.0)
        total = tl.dot(weight, tl.trans(a), total)
    at = parts_ptr + (tl.program_id(0).to(tl.int64) * num_rows + wide[:, None]) * rank + r[None, :]
    tl.store(at, total, mask=in_rows[:, None] & in_rank[None, :])
