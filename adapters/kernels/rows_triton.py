"""The Triton side of rows.py: imported only on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def factors(  # type: ignore[no-untyped-def]
    p_ptr,  # (out, rank), as b and up
    gram_ptr,  # (rank, rank)
    b_ptr,
    squares_ptr,  # (out,), as the next four
    m_ptr,
    n_ptr,
    row_ptr,
    per_b_ptr,
    up_ptr,
    num_out,
    rank,
    s,
    tiny,
    R: tl.constexpr,  # power of 2, at least rank and 16
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    r = tl.arange(0, R)
    in_rows, in_rank = rows < num_out, r < rank
    mask = in_rows[:, None] & in_rank[None, :]
    at = rows[:, None] * rank + r[None, :]
    B = tl.load(b_ptr + at, mask=mask, other=0.0)
    P = tl.load(p_ptr + at, mask=mask, other=0.0)
    gram_mask = in_rank[:, None] & in_rank[None, :]
    AAt = tl.load(gram_ptr + r[:, None] * rank + r[None, :], mask=gram_mask, other=0.0)
    both = 2.0 * s * P + s * s * tl.dot(B, AAt, input_precision="ieee")
    square = tl.sum(both * B, axis=1) + tl.load(squares_ptr + rows, mask=in_rows, other=1.0)
    n = tl.sqrt_rn(tl.where(square < tiny, tiny, square))  # NaN stays NaN
    row = tl.div_rn(tl.load(m_ptr + rows, mask=in_rows, other=0.0), n)
    tl.store(n_ptr + rows, n, mask=in_rows)
    tl.store(row_ptr + rows, row, mask=in_rows)
    tl.store(per_b_ptr + rows, row * s, mask=in_rows)
    tl.store(up_ptr + at, B * (row * s)[:, None], mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def pull(  # type: ignore[no-untyped-def]
    dup_ptr,  # (out, rank): becomes dB
    b_ptr,  # (out, rank)
    drow_ptr,  # (out,), as the next three
    n_ptr,
    per_b_ptr,
    dm_ptr,
    num_out,
    rank,
    s,
    R: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    r = tl.arange(0, R)
    in_rows = rows < num_out
    mask = in_rows[:, None] & (r < rank)[None, :]
    at = rows[:, None] * rank + r[None, :]
    B = tl.load(b_ptr + at, mask=mask, other=0.0)
    dup = tl.load(dup_ptr + at, mask=mask, other=0.0)
    slope = tl.load(drow_ptr + rows, mask=in_rows, other=0.0) + s * tl.sum(dup * B, axis=1)
    n = tl.load(n_ptr + rows, mask=in_rows, other=1.0)
    tl.store(dm_ptr + rows, tl.div_rn(slope, n), mask=in_rows)
    per_b = tl.load(per_b_ptr + rows, mask=in_rows, other=0.0)
    tl.store(dup_ptr + at, dup * per_b[:, None], mask=mask)
