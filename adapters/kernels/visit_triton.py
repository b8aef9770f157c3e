"""The Triton side of visit.py: imported only on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def visit_parts(  # type: ignore[no-untyped-def]
    dy_ptr,  # (rows, columns), contiguous along its second dimension, as all here
    up_ptr,  # (columns, rank)
    hq_ptr,  # (rows, rank)
    gu_parts_ptr,  # (grid of columns, rows, rank) float32
    d_up_parts_ptr,  # (grid of rows, columns, rank) float32
    num_rows,
    num_columns,
    rank,
    dy_stride,
    up_stride,
    hq_stride,
    R: tl.constexpr,  # power of 2, at least rank and 16
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
):
    """What one stretch of rows and columns of dy adds to dy up and to dy^T hq."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < num_columns
    r = tl.arange(0, R)
    in_rank = r < rank
    of_columns = in_columns[:, None] & in_rank[None, :]
    up = tl.load(up_ptr + columns[:, None] * up_stride + r[None, :], mask=of_columns, other=0.0)
    # 64 bits to where a stretch begins only: within it 32 are enough, and half the registers
    first = tl.program_id(1).to(tl.int64) * (ROWS * TILES)
    dy_ptr += first * dy_stride
    hq_ptr += first * hq_stride
    gu_parts_ptr += (tl.program_id(0).to(tl.int64) * num_rows + first) * rank
    rows_left = num_rows - first
    d_up = tl.zeros((COLUMNS, R), dtype=tl.float32)
    for tile in range(TILES):
        rows = tile * ROWS + tl.arange(0, ROWS)
        in_rows = rows < rows_left
        of_rows = in_rows[:, None] & in_rank[None, :]
        at = dy_ptr + rows[:, None] * dy_stride + columns[None, :]
        dy = tl.load(at, mask=in_rows[:, None] & in_columns[None, :], other=0.0)
        hq = tl.load(hq_ptr + rows[:, None] * hq_stride + r[None, :], mask=of_rows, other=0.0)
        d_up = tl.dot(tl.trans(dy), hq, d_up)
        tl.store(gu_parts_ptr + rows[:, None] * rank + r[None, :], tl.dot(dy, up), mask=of_rows)
    d_up_parts_ptr += tl.program_id(1).to(tl.int64) * num_columns * rank
    tl.store(d_up_parts_ptr + columns[:, None] * rank + r[None, :], d_up, mask=of_columns)


@triton.jit  # type: ignore[untyped-decorator]
def _sum_of_parts(parts_ptr, at, size, num_parts, SIZE: tl.constexpr, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the numbers `at` (SIZE,) of each part, always in the same order."""
    total = tl.zeros((SIZE,), dtype=tl.float32)
    first = 0
    while first < num_parts:
        part = first + tl.arange(0, PARTS)
        mask = (part < num_parts)[:, None] & (at < size)[None, :]
        where = parts_ptr + part.to(tl.int64)[:, None] * size + at[None, :]
        total += tl.sum(tl.load(where, mask=mask, other=0.0), axis=0)
        first += PARTS
    return total


@triton.jit  # type: ignore[untyped-decorator]
def visit_sums(  # type: ignore[no-untyped-def]
    gu_parts_ptr,  # as `visit_parts` left them
    d_up_parts_ptr,
    gu_ptr,  # (rows, rank)
    d_up_ptr,  # (columns, rank) float32, contiguous
    rank,
    gu_size,  # rows * rank
    d_up_size,  # columns * rank
    num_gu_parts,
    num_d_up_parts,
    gu_stride,
    scale,  # of gu
    SIZE: tl.constexpr,  # numbers that a program makes
    PARTS: tl.constexpr,  # read at once
):
    """Add up both kinds of parts: the first programs gu's, the others d_up's."""
    program = tl.program_id(0)
    gu_blocks = tl.cdiv(gu_size, SIZE)
    if program < gu_blocks:
        at = program * SIZE + tl.arange(0, SIZE)
        gu = scale * _sum_of_parts(gu_parts_ptr, at, gu_size, num_gu_parts, SIZE, PARTS)
        row = at // rank
        to = gu_ptr + row.to(tl.int64) * gu_stride + (at - row * rank)
        tl.store(to, gu.to(gu_ptr.dtype.element_ty), mask=at < gu_size)
    else:
        at = (program - gu_blocks) * SIZE + tl.arange(0, SIZE)
        d_up = _sum_of_parts(d_up_parts_ptr, at, d_up_size, num_d_up_parts, SIZE, PARTS)
        tl.store(d_up_ptr + at, d_up, mask=at < d_up_size)
