"""The Triton side of rms_norm.py: imported only on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def rms_norm_forward(  # type: ignore[no-untyped-def]
    x_ptr,  # (rows, columns), contiguous, as all here
    weight_ptr,  # (columns,)
    y_ptr,  # (rows, columns)
    rstd_ptr,  # (rows,) float32
    num_rows,
    num_columns,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # power of 2, at least num_columns
):
    """y and rstd of some whole rows."""
    # 64 bits to where the rows begin only: within them 32 are enough
    first = tl.program_id(0).to(tl.int64) * ROWS
    x_ptr += first * num_columns
    y_ptr += first * num_columns
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    in_rows, in_columns = rows < num_rows - first, columns < num_columns
    mask = in_rows[:, None] & in_columns[None, :]
    at = rows[:, None] * num_columns + columns[None, :]
    weight = tl.load(weight_ptr + columns[None, :], mask=in_columns[None, :], other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / num_columns + eps)
    # rounded before the weight, as transformers does
    normed = (x * rstd[:, None]).to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + at, (normed * weight).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + first + rows, rstd, mask=in_rows)


@triton.jit  # type: ignore[untyped-decorator]
def rms_norm_backward(  # type: ignore[no-untyped-def]
    dy_ptr,  # (rows, columns), contiguous, as all here
    x_ptr,
    weight_ptr,  # (columns,)
    rstd_ptr,  # (rows,) float32
    other_ptr,  # (rows, columns); read if SUMS
    dx_ptr,
    num_rows,
    num_columns,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # power of 2, at least num_columns
):
    """dx of some whole rows, with what else comes back to x."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    dy_ptr += first * num_columns
    x_ptr += first * num_columns
    dx_ptr += first * num_columns
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    in_rows, in_columns = rows < num_rows - first, columns < num_columns
    mask = in_rows[:, None] & in_columns[None, :]
    at = rows[:, None] * num_columns + columns[None, :]
    weight = tl.load(weight_ptr + columns[None, :], mask=in_columns[None, :], other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + first + rows, mask=in_rows, other=0.0)[:, None]
    if SUMS:  # on its way while the rows are summed
        other = tl.load(other_ptr + first * num_columns + at, mask=mask, other=0.0).to(tl.float32)
    d_normed = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32) * weight
    normed = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) * rstd
    mean = tl.sum(d_normed * normed, axis=1)[:, None] / num_columns
    dx = (rstd * (d_normed - normed * mean)).to(dx_ptr.dtype.element_ty)
    if SUMS:
        dx = (dx.to(tl.float32) + other).to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + at, dx, mask=mask)
