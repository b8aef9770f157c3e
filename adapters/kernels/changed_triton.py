"""The Triton side of changed.py: imported only on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl

from decompft.adapters.kernels.dequantize_triton import block_scale, unpacked


@triton.jit  # type: ignore[untyped-decorator]
def changed(  # type: ignore[no-untyped-def]
    codes_ptr,  # (rows, width / 2) bytes, the first code of two in the high half
    bytes_ptr,
    floats_ptr,
    times_ptr,
    levels_ptr,  # (16,) float32
    a_ptr,  # (rank, width) float32
    b_ptr,  # (rows, rank) float32
    out_ptr,  # (rows, width)
    num_rows,
    width,
    block_size,
    row_floats,
    rank,
    s,
    limit,
    DOUBLE: tl.constexpr,
    FUSED: tl.constexpr,
    TIMES: tl.constexpr,
    EXACT: tl.constexpr,  # the factor is exp(D), |D| at most `limit`; else 1 + D
    SLOPE: tl.constexpr,  # out, which holds a slope of the factor times W, becomes D's; else out is W times the factor
    R: tl.constexpr,  # power of 2, at least rank and 16
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # divides the block size, so that a row of a tile has one scale
):
    column = tl.program_id(0) * COLUMNS
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < num_rows
    mask = in_rows[:, None]
    wide = rows.to(tl.int64)
    scale = block_scale(
        bytes_ptr,
        floats_ptr,
        times_ptr,
        wide,
        column // block_size,
        row_floats,
        in_rows,
        DOUBLE,
        FUSED,
        TIMES,
    )
    half = tl.arange(0, COLUMNS // 2)
    byte_at = codes_ptr + wide[:, None] * (width // 2) + (column // 2 + half)[None, :]
    byte = tl.load(byte_at, mask=mask, other=0).to(tl.int32)
    found = unpacked(byte, levels_ptr, scale)
    columns = column + tl.arange(0, COLUMNS)
    out_at = out_ptr + wide[:, None] * width + columns[None, :]
    if EXACT or not SLOPE:
        r = tl.arange(0, R)
        in_rank = r < rank
        B = tl.load(b_ptr + rows[:, None] * rank + r[None, :], mask=mask & in_rank[None, :], other=0.0)
        A = tl.load(a_ptr + r[:, None] * width + columns[None, :], mask=in_rank[:, None], other=0.0)
        D = s * tl.dot(B, A, input_precision="ieee")
        if EXACT:
            factor = tl.exp(tl.where(D > limit, limit, tl.where(D < -limit, -limit, D)))
            if SLOPE:
                factor = tl.where(tl.abs(D) <= limit, factor, 0.0)
            found = found * factor
        else:
            found = found + found * D
    if SLOPE:
        found = found * tl.load(out_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_at, found.to(out_ptr.dtype.element_ty), mask=mask)
