"""The Triton side of swiglu.py: imported only on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _columns_of(w_ptr, stride, rank, at, inside, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows `at` of w (n, rank), transposed: (R, ...)."""
    r = tl.arange(0, R)
    mask = inside[:, None] & (r < rank)[None, :]
    return tl.trans(tl.load(w_ptr + at[:, None] * stride + r[None, :], mask=mask, other=0.0))


@triton.jit  # type: ignore[untyped-decorator]
def _with_branch(y, h_ptr, stride, rank, at, inside, w, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """y plus rows `at` of h (n, rank) times w."""
    r = tl.arange(0, R)
    mask = inside[:, None] & (r < rank)[None, :]
    return tl.dot(tl.load(h_ptr + at[:, None] * stride + r[None, :], mask=mask, other=0.0), w, y)


@triton.jit  # type: ignore[untyped-decorator]
def swiglu_forward(  # type: ignore[no-untyped-def]
    gate_ptr,  # (rows, columns), contiguous, as all of this size
    up_ptr,
    y_ptr,
    gate_h_ptr,  # (rows, rank), contiguous along its second dimension, as all factors
    gate_w_ptr,  # (columns, rank)
    up_h_ptr,
    up_w_ptr,
    num_rows,
    num_columns,
    gate_rank,  # 0 and no factors where there is no branch
    up_rank,
    gate_h_stride,
    gate_w_stride,
    up_h_stride,
    up_w_stride,
    GATE_R: tl.constexpr,  # power of 2, at least the rank and 16; 0 for no branch
    UP_R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,  # one below the other: the factors of the columns are read once for all
):
    """y = silu(gate + its branch) (up + its branch), of one stretch of rows and columns."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < num_columns
    if GATE_R > 0:
        gate_w = _columns_of(gate_w_ptr, gate_w_stride, gate_rank, columns, in_columns, GATE_R)
    if UP_R > 0:
        up_w = _columns_of(up_w_ptr, up_w_stride, up_rank, columns, in_columns, UP_R)
    # 64 bits to where a stretch begins only: within it 32 are enough, and half the registers
    first = tl.program_id(1).to(tl.int64) * (ROWS * TILES)
    gate_ptr += first * num_columns
    up_ptr += first * num_columns
    y_ptr += first * num_columns
    rows_left = num_rows - first
    for tile in range(TILES):
        rows = tile * ROWS + tl.arange(0, ROWS)
        in_rows = rows < rows_left
        mask = in_rows[:, None] & in_columns[None, :]
        at = rows[:, None] * num_columns + columns[None, :]
        gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if GATE_R > 0:
            h_ptr = gate_h_ptr + first * gate_h_stride
            gate = _with_branch(gate, h_ptr, gate_h_stride, gate_rank, rows, in_rows, gate_w, GATE_R)
        if UP_R > 0:
            h_ptr = up_h_ptr + first * up_h_stride
            up = _with_branch(up, h_ptr, up_h_stride, up_rank, rows, in_rows, up_w, UP_R)
        y = gate * tl.sigmoid(gate) * up
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def swiglu_backward(  # type: ignore[no-untyped-def]
    dy_ptr,  # (rows, columns)
    gate_ptr,  # what comes back to it is written over it
    up_ptr,  # likewise
    gate_dots_ptr,  # (grid of rows, columns) float32; written if GATE_DOTS
    up_dots_ptr,
    gate_h_ptr,  # the rest as above
    gate_w_ptr,
    up_h_ptr,
    up_w_ptr,
    num_rows,
    num_columns,
    gate_rank,
    up_rank,
    gate_h_stride,
    gate_w_stride,
    up_h_stride,
    up_w_stride,
    GATE_DOTS: tl.constexpr,
    UP_DOTS: tl.constexpr,
    GATE_R: tl.constexpr,
    UP_R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
):
    """What comes back to gate and to up; of each, if asked for, the columns' dots with what it is written over."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < num_columns
    if GATE_R > 0:
        gate_w = _columns_of(gate_w_ptr, gate_w_stride, gate_rank, columns, in_columns, GATE_R)
    if UP_R > 0:
        up_w = _columns_of(up_w_ptr, up_w_stride, up_rank, columns, in_columns, UP_R)
    first = tl.program_id(1).to(tl.int64) * (ROWS * TILES)
    dy_ptr += first * num_columns
    gate_ptr += first * num_columns
    up_ptr += first * num_columns
    rows_left = num_rows - first
    gate_dots = tl.zeros((COLUMNS,), dtype=tl.float32)
    up_dots = tl.zeros((COLUMNS,), dtype=tl.float32)
    for tile in range(TILES):
        rows = tile * ROWS + tl.arange(0, ROWS)
        in_rows = rows < rows_left
        mask = in_rows[:, None] & in_columns[None, :]
        at = rows[:, None] * num_columns + columns[None, :]
        bare_gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
        bare_up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        gate, up = bare_gate, bare_up
        if GATE_R > 0:
            h_ptr = gate_h_ptr + first * gate_h_stride
            gate = _with_branch(gate, h_ptr, gate_h_stride, gate_rank, rows, in_rows, gate_w, GATE_R)
        if UP_R > 0:
            h_ptr = up_h_ptr + first * up_h_stride
            up = _with_branch(up, h_ptr, up_h_stride, up_rank, rows, in_rows, up_w, UP_R)
        part = tl.sigmoid(gate)
        silu = gate * part
        d_gate = (dy * up * (silu * (1.0 - part) + part)).to(gate_ptr.dtype.element_ty)
        d_up = (dy * silu).to(up_ptr.dtype.element_ty)
        if GATE_DOTS:
            gate_dots += tl.sum(d_gate.to(tl.float32) * bare_gate, axis=0)
        if UP_DOTS:
            up_dots += tl.sum(d_up.to(tl.float32) * bare_up, axis=0)
        tl.store(gate_ptr + at, d_gate, mask=mask)
        tl.store(up_ptr + at, d_up, mask=mask)
    to = tl.program_id(1).to(tl.int64) * num_columns + columns
    if GATE_DOTS:
        tl.store(gate_dots_ptr + to, gate_dots, mask=in_columns)
    if UP_DOTS:
        tl.store(up_dots_ptr + to, up_dots, mask=in_columns)
