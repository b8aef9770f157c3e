"""The Triton side of norm.py: imported only on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def gram_part(  # type: ignore[no-untyped-def]
    x_ptr,  # (rank, length) by its strides
    part_ptr,  # (rank, rank) of this split
    split,
    rank,
    length,
    rank_stride,
    length_stride,
    R: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS,  # in a stretch
):
    """The part of x x^T that comes from one stretch of x."""
    r = tl.arange(0, R)
    in_rank = r < rank
    total = tl.zeros((R, R), dtype=tl.float32)
    chunk = 0
    while chunk < CHUNKS:
        k = (split * CHUNKS + chunk) * CHUNK + tl.arange(0, CHUNK)
        at = x_ptr + r[:, None] * rank_stride + k[None, :] * length_stride
        x = tl.load(at, mask=in_rank[:, None] & (k < length)[None, :], other=0.0)
        total += tl.dot(x, tl.trans(x), input_precision="ieee")
        chunk += 1
    at = part_ptr + r[:, None] * rank + r[None, :]
    tl.store(at, total, mask=in_rank[:, None] & in_rank[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def gram(  # type: ignore[no-untyped-def]
    a_ptr,  # (rank, in)
    b_ptr,  # (out, rank)
    parts_ptr,  # (2, SPLITS, rank, rank): of A A^T, of B^T B
    rank,
    num_in,
    num_out,
    SPLITS: tl.constexpr,
    R: tl.constexpr,  # power of 2, at least rank and 16
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,  # in a stretch; SPLITS stretches hold the longer side
):
    program = tl.program_id(0)
    part = parts_ptr + program * rank * rank
    if program < SPLITS:
        gram_part(a_ptr, part, program, rank, num_in, num_in, 1, R, CHUNK, CHUNKS)
    else:
        gram_part(b_ptr, part, program - SPLITS, rank, num_out, 1, rank, R, CHUNK, CHUNKS)


@triton.jit  # type: ignore[untyped-decorator]
def finish(  # type: ignore[no-untyped-def]
    parts_ptr,  # (2, SPLITS, rank, rank)
    a_ptr,  # (1,), as the next two
    b_ptr,
    base_norm_ptr,
    grams_ptr,  # (2, rank, rank)
    found_ptr,  # (5, STRIDE): n, per_a, per_b, q, row
    rank,
    eps,
    eps_over_s,
    SPLITS: tl.constexpr,
    R: tl.constexpr,
    STRIDE: tl.constexpr,
):
    a, b, base_norm = tl.load(a_ptr), tl.load(b_ptr), tl.load(base_norm_ptr)
    finish_layer(parts_ptr, a, b, base_norm, grams_ptr, found_ptr, rank, eps, eps_over_s, SPLITS, R, STRIDE)


@triton.jit  # type: ignore[untyped-decorator]
def finish_layer(  # type: ignore[no-untyped-def]
    parts_ptr,
    a,
    b,
    base_norm,
    grams_ptr,
    found_ptr,
    rank,
    eps,
    eps_over_s,
    SPLITS: tl.constexpr,
    R: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Add up a layer's parts; its scalars."""
    r = tl.arange(0, R)
    mask = (r < rank)[:, None] & (r < rank)[None, :]
    at = r[:, None] * rank + r[None, :]
    size = rank * rank
    AAt = tl.zeros((R, R), dtype=tl.float32)
    BtB = tl.zeros((R, R), dtype=tl.float32)
    for split in range(SPLITS):
        AAt += tl.load(parts_ptr + split * size + at, mask=mask, other=0.0)
        BtB += tl.load(parts_ptr + (SPLITS + split) * size + at, mask=mask, other=0.0)
    tl.store(grams_ptr + at, AAt, mask=mask)
    tl.store(grams_ptr + size + at, BtB, mask=mask)
    inner = tl.sum(tl.sum(AAt * BtB, axis=1), axis=0)
    n = tl.sqrt_rn(tl.where(inner < 0.0, 0.0, inner))  # NaN stays NaN
    per_a = tl.div_rn(1.0, base_norm + eps)
    per_b = tl.div_rn(1.0, n + eps_over_s)
    tl.store(found_ptr, n)
    tl.store(found_ptr + STRIDE, per_a)
    tl.store(found_ptr + 2 * STRIDE, per_b)
    tl.store(found_ptr + 3 * STRIDE, b * per_b)
    tl.store(found_ptr + 4 * STRIDE, a * per_a)


@triton.jit  # type: ignore[untyped-decorator]
def pull(  # type: ignore[no-untyped-def]
    a_ptr,  # (rank, in)
    b_ptr,  # (out, rank)
    grams_ptr,
    found_ptr,
    dq_ptr,  # (1,)
    drow_ptr,  # (1,)
    da_ptr,  # (rank, in), added to
    db_ptr,  # (out, rank): the slope of q B, becomes B's
    slopes_ptr,  # (2, STRIDE): of a, of b
    rank,
    num_in,
    num_out,
    R: tl.constexpr,
    CHUNK: tl.constexpr,
    STRIDE: tl.constexpr,
):
    program = tl.program_id(0)
    r = tl.arange(0, R)
    in_rank = r < rank
    gram_mask = in_rank[:, None] & in_rank[None, :]
    gram_at = grams_ptr + r[:, None] * rank + r[None, :]
    n = tl.load(found_ptr)
    of_b = tl.load(dq_ptr) * tl.load(found_ptr + 2 * STRIDE)
    q = tl.load(found_ptr + 3 * STRIDE)
    slope = -tl.div_rn(of_b * q, n + 1e-30)
    blocks_in = tl.cdiv(num_in, CHUNK)
    if program < blocks_in:
        k = program * CHUNK + tl.arange(0, CHUNK)
        mask = in_rank[:, None] & (k < num_in)[None, :]
        at = r[:, None] * num_in + k[None, :]
        BtB = tl.load(gram_at + rank * rank, mask=gram_mask, other=0.0)
        A = tl.load(a_ptr + at, mask=mask, other=0.0)
        dA = tl.load(da_ptr + at, mask=mask, other=0.0)
        tl.store(da_ptr + at, dA + slope * tl.dot(BtB, A, input_precision="ieee"), mask=mask)
    else:
        rows = (program - blocks_in) * CHUNK + tl.arange(0, CHUNK)
        rows_mask = (rows < num_out)[:, None] & in_rank[None, :]
        rows_at = rows[:, None] * rank + r[None, :]
        AAt = tl.load(gram_at, mask=gram_mask, other=0.0)
        B = tl.load(b_ptr + rows_at, mask=rows_mask, other=0.0)
        dB = tl.load(db_ptr + rows_at, mask=rows_mask, other=0.0)
        tl.store(db_ptr + rows_at, q * dB + slope * tl.dot(B, AAt, input_precision="ieee"), mask=rows_mask)
    if program == 0:
        tl.store(slopes_ptr, tl.load(drow_ptr) * tl.load(found_ptr + STRIDE))
        tl.store(slopes_ptr + STRIDE, of_b)
