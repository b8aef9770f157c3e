"""The Triton side of combine.py: imported only on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def combine(  # type: ignore[no-untyped-def]
    own_1_ptr,  # (rows, columns), contiguous, as the next two; becomes the sum, and is not read if M is 0
    own_2_ptr,
    own_3_ptr,
    x_ptr,  # (rows, columns), contiguous along columns
    left_ptr,  # (rows, inner), contiguous along inner
    right_ptr,  # (inner, columns) by its strides
    parts_ptr,  # (M, programs) float32: sums of own * x
    num_rows,
    num_columns,
    num_inner,
    x_stride,
    left_stride,
    right_inner_stride,
    right_column_stride,
    M: tl.constexpr,
    DOTS: tl.constexpr,
    THIN: tl.constexpr,
    K: tl.constexpr,  # power of 2, at least num_inner and 16
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < num_columns
    r = tl.arange(0, ROWS)
    # within a tile in 32 bits, which are half the registers; the tile's start in 64
    own_at = r[:, None] * num_columns + columns[None, :]
    if DOTS:
        x_at = r[:, None] * x_stride + columns[None, :]
        dot_1 = 0.0
        dot_2 = 0.0
        dot_3 = 0.0
    if THIN:
        k = tl.arange(0, K)
        in_inner = k < num_inner
        left_at = r[:, None] * left_stride + k[None, :]
        right_at = k[:, None] * right_inner_stride + columns[None, :] * right_column_stride
        right = tl.load(right_ptr + right_at, mask=in_inner[:, None] & in_columns[None, :], other=0.0)
    for tile in range(TILES):
        first = (tl.program_id(1) * TILES + tile).to(tl.int64) * ROWS
        in_rows = first + r < num_rows
        mask = in_rows[:, None] & in_columns[None, :]
        # all loads before anything is computed of them
        if M > 0:
            own_1 = tl.load(own_1_ptr + first * num_columns + own_at, mask=mask, other=0.0)
        if M > 1:
            own_2 = tl.load(own_2_ptr + first * num_columns + own_at, mask=mask, other=0.0)
        if M > 2:
            own_3 = tl.load(own_3_ptr + first * num_columns + own_at, mask=mask, other=0.0)
        if DOTS:
            x = tl.load(x_ptr + first * x_stride + x_at, mask=mask, other=0.0).to(tl.float32)
        if THIN:
            left_mask = in_rows[:, None] & in_inner[None, :]
            left = tl.load(left_ptr + first * left_stride + left_at, mask=left_mask, other=0.0)
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        if M > 0:
            total += own_1.to(tl.float32)
        if DOTS:
            dot_1 += tl.sum(own_1.to(tl.float32) * x)
        if M > 1:
            total += own_2.to(tl.float32)
            if DOTS:
                dot_2 += tl.sum(own_2.to(tl.float32) * x)
        if M > 2:
            total += own_3.to(tl.float32)
            if DOTS:
                dot_3 += tl.sum(own_3.to(tl.float32) * x)
        if THIN:
            total += tl.dot(left, right, input_precision="ieee")
        tl.store(own_1_ptr + first * num_columns + own_at, total.to(own_1_ptr.dtype.element_ty), mask=mask)
    if DOTS:
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        programs = tl.num_programs(0) * tl.num_programs(1)
        tl.store(parts_ptr + program, dot_1)
        if M > 1:
            tl.store(parts_ptr + programs + program, dot_2)
        if M > 2:
            tl.store(parts_ptr + 2 * programs + program, dot_3)
