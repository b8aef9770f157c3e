"""The Triton side of columns.py: imported only on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def columns(  # type: ignore[no-untyped-def]
    a_ptr,  # (rows, columns), contiguous along columns, as b and out
    b_ptr,
    scale_ptr,  # (columns,) float32
    out_ptr,
    parts_ptr,  # (grid of rows, columns) float32: sums of a * b
    num_rows,
    num_columns,
    a_stride,
    b_stride,
    out_stride,
    DOTS: tl.constexpr,
    SCALES: tl.constexpr,  # out = b * scale
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < num_columns
    first = tl.program_id(1).to(tl.int64) * ROWS * TILES
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    if SCALES:
        scale = tl.load(scale_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
    for tile in range(TILES):
        rows = first + tile * ROWS + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None] & in_columns[None, :]
        b = tl.load(b_ptr + rows[:, None] * b_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if DOTS:
            a = tl.load(a_ptr + rows[:, None] * a_stride + columns[None, :], mask=mask, other=0.0)
            total += tl.sum(a.to(tl.float32) * b, axis=0)
        if SCALES:
            at = out_ptr + rows[:, None] * out_stride + columns[None, :]
            tl.store(at, (b * scale[None, :]).to(out_ptr.dtype.element_ty), mask=mask)
    if DOTS:
        tl.store(parts_ptr + tl.program_id(1) * num_columns + columns, total, mask=in_columns)
