"""The Triton side of fp8.py: imported only on a GPU.

A block of 4-bit codes has one factor, so that its weights are 16 numbers in e4m3: 16 bytes, which a thread keeps in
four registers. Eight codes, a word, become eight bytes of that table by `prmt`, which picks four of eight bytes at
once: no weight is multiplied, converted or looked up in memory. See fp8_words.py for the instructions.

`rows` casts to its output's element type at the very end: Triton's interpreter rounds to e4m3 wrongly
(triton pull request 11897), and is asked for float32 instead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from decompft.adapters.kernels.fp8_words import looked_up, packed, transposed

SMALLEST = tl.constexpr(1e-30)
LARGEST = tl.constexpr(448.0)
PIECE = tl.constexpr(64)  # inputs of a thread of fourbit_columns: never more than a block


@triton.jit  # type: ignore[untyped-decorator]
def rows(  # type: ignore[no-untyped-def]
    x_ptr,  # (rows, columns), contiguous along columns
    times_ptr,  # (columns,) float32
    out_ptr,  # (rows, columns), contiguous
    scale_ptr,  # (rows,) float32
    num_columns,
    x_stride,
    TIMES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    mask = columns < num_columns
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if TIMES:
        x = x * tl.load(times_ptr + columns, mask=mask, other=0.0)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0), SMALLEST) / LARGEST
    tl.store(scale_ptr + row, scale)
    tl.store(out_ptr + row * num_columns + columns, (x / scale).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def absmax(  # type: ignore[no-untyped-def]
    bytes_ptr,  # (rows, SCALE_BYTES)
    floats_ptr,  # the same memory as float32
    row,  # two arrays that broadcast, as the mask's two parts do
    block,
    mask,
    SCALE_BYTES: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """Of blocks, 0 where masked."""
    FLOATS: tl.constexpr = SCALE_BYTES // 4
    if DOUBLE:
        code = tl.load(bytes_ptr + row * SCALE_BYTES + block, mask=mask, other=0).to(tl.float32)
        # the same for a whole row: the cache answers
        low = tl.load(floats_ptr + row * FLOATS + (FLOATS - 2) + block * 0, mask=mask, other=0.0)
        step = tl.load(floats_ptr + row * FLOATS + (FLOATS - 1) + block * 0, mask=mask, other=0.0)
        found = low + code * step
    else:
        found = tl.load(floats_ptr + row * FLOATS + block, mask=mask, other=0.0)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def four_levels(levels_ptr, FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
    at = levels_ptr + FIRST
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def quarter(levels, times):  # type: ignore[no-untyped-def]
    """Four levels times a block's factor, as bytes of a word."""
    return packed(levels[0] * times, levels[1] * times, levels[2] * times, levels[3] * times)


@triton.jit
def four_words(codes_ptr, at, mask):  # type: ignore[no-untyped-def]
    """Words at, at + 1, at + 2, at + 3 in one load of 16 bytes; 0 where masked.

    Args:
        at: (N,), multiples of 4.
    """
    word = tl.load(codes_ptr + at[:, None] + tl.arange(0, 4)[None, :], mask=mask[:, None], other=0)
    even, odd = tl.split(tl.reshape(word, (word.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit  # type: ignore[untyped-decorator]
def fourbit_rows(  # type: ignore[no-untyped-def]
    codes_ptr,  # (rows, INPUTS / 8) int32, 16-byte aligned
    bytes_ptr,
    floats_ptr,
    levels_ptr,  # (16,) float32
    out_ptr,  # (rows, INPUTS / 4) int32
    scale_ptr,  # (rows,) float32
    INPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_POWER: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    DOUBLE: tl.constexpr,
    THREADS: tl.constexpr,  # each has 32 weights at a time, half a block or less
):
    CHUNKS: tl.constexpr = INPUTS // 32
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, BLOCKS_POWER)
    of_blocks = absmax(bytes_ptr, floats_ptr, row, blocks, blocks < BLOCKS, SCALE_BYTES, DOUBLE)
    scale = tl.maximum(tl.max(of_blocks, axis=0), SMALLEST) / LARGEST
    tl.store(scale_ptr + row, scale)
    # before the loop, whose stores may be to anything for all that a compiler knows
    q0, q1 = four_levels(levels_ptr, 0), four_levels(levels_ptr, 4)
    q2, q3 = four_levels(levels_ptr, 8), four_levels(levels_ptr, 12)
    for start in range(0, CHUNKS, THREADS):
        chunk = start + tl.arange(0, THREADS)
        mask = chunk < CHUNKS
        times = absmax(bytes_ptr, floats_ptr, row, chunk * 32 // BLOCK, mask, SCALE_BYTES, DOUBLE)
        times = times / scale
        t0, t1, t2, t3 = quarter(q0, times), quarter(q1, times), quarter(q2, times), quarter(q3, times)
        c0, c1, c2, c3 = four_words(codes_ptr + row * (INPUTS // 8), chunk * 4, mask)
        w0, w1 = looked_up(c0, t0, t1, t2, t3)
        w2, w3 = looked_up(c1, t0, t1, t2, t3)
        w4, w5 = looked_up(c2, t0, t1, t2, t3)
        w6, w7 = looked_up(c3, t0, t1, t2, t3)
        # a word's place in binary, its last digit joined last
        low = tl.join(tl.join(w0, w4), tl.join(w2, w6))
        high = tl.join(tl.join(w1, w5), tl.join(w3, w7))
        words = tl.reshape(tl.join(low, high), (THREADS, 8))
        to = chunk[:, None] * 8 + tl.arange(0, 8)[None, :]
        tl.store(out_ptr + row * (INPUTS // 4) + to, words, mask=mask[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def block_highs(  # type: ignore[no-untyped-def]
    bytes_ptr,
    floats_ptr,
    high_ptr,  # (grid, BLOCKS) float32: each program's largest absmax of a block
    num_rows,
    INPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_POWER: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    blocks = tl.arange(0, BLOCKS_POWER)
    known = (row < num_rows)[:, None] & (blocks < BLOCKS)[None, :]
    of_blocks = absmax(bytes_ptr, floats_ptr, row[:, None], blocks[None, :], known, SCALE_BYTES, DOUBLE)
    tl.store(high_ptr + tl.program_id(0) * BLOCKS + blocks, tl.max(of_blocks, axis=0), mask=blocks < BLOCKS)


@triton.jit  # type: ignore[untyped-decorator]
def fourbit_columns(  # type: ignore[no-untyped-def]
    codes_ptr,  # (rows, INPUTS / 8) int32, 16-byte aligned
    bytes_ptr,
    floats_ptr,
    levels_ptr,
    high_ptr,  # (BLOCKS,) float32: largest absmax over all rows
    out_ptr,  # (INPUTS, rows / 4) int32
    scale_ptr,  # (INPUTS,) float32
    fours,  # rows / 4
    INPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_POWER: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    DOUBLE: tl.constexpr,
    THREADS: tl.constexpr,  # each has four rows, a word of the output: a warp writes 128 bytes of an input
    PIECES: tl.constexpr,  # of inputs, one after the other
):
    four = tl.program_id(1) * THREADS + tl.arange(0, THREADS)
    in_rows = four < fours
    row = four.to(tl.int64) * 4
    q0, q1 = four_levels(levels_ptr, 0), four_levels(levels_ptr, 4)
    q2, q3 = four_levels(levels_ptr, 8), four_levels(levels_ptr, 12)
    for i in range(PIECES):
        piece = tl.program_id(0) * PIECES + i
        if piece < INPUTS // PIECE:
            block = piece * PIECE // BLOCK
            scale = tl.maximum(tl.load(high_ptr + block), SMALLEST) / LARGEST
            times = absmax(bytes_ptr, floats_ptr, row, block, in_rows, SCALE_BYTES, DOUBLE) / scale
            a0, a1, a2, a3 = quarter(q0, times), quarter(q1, times), quarter(q2, times), quarter(q3, times)
            times = absmax(bytes_ptr, floats_ptr, row + 1, block, in_rows, SCALE_BYTES, DOUBLE) / scale
            b0, b1, b2, b3 = quarter(q0, times), quarter(q1, times), quarter(q2, times), quarter(q3, times)
            times = absmax(bytes_ptr, floats_ptr, row + 2, block, in_rows, SCALE_BYTES, DOUBLE) / scale
            c0, c1, c2, c3 = quarter(q0, times), quarter(q1, times), quarter(q2, times), quarter(q3, times)
            times = absmax(bytes_ptr, floats_ptr, row + 3, block, in_rows, SCALE_BYTES, DOUBLE) / scale
            d0, d1, d2, d3 = quarter(q0, times), quarter(q1, times), quarter(q2, times), quarter(q3, times)
            for half in tl.static_range(2):
                at = row * (INPUTS // 8) + piece * (PIECE // 8) + half * 4
                a = four_words(codes_ptr, at, in_rows)
                b = four_words(codes_ptr, at + INPUTS // 8, in_rows)
                c = four_words(codes_ptr, at + 2 * (INPUTS // 8), in_rows)
                d = four_words(codes_ptr, at + 3 * (INPUTS // 8), in_rows)
                for word in tl.static_range(4):
                    a_low, a_high = looked_up(a[word], a0, a1, a2, a3)
                    b_low, b_high = looked_up(b[word], b0, b1, b2, b3)
                    c_low, c_high = looked_up(c[word], c0, c1, c2, c3)
                    d_low, d_high = looked_up(d[word], d0, d1, d2, d3)
                    to = out_ptr + (piece * PIECE + half * 32 + word * 8).to(tl.int64) * fours + four
                    store_four(to, fours, a_low, b_low, c_low, d_low, in_rows)
                    store_four(to + 4 * fours, fours, a_high, b_high, c_high, d_high, in_rows)
            if tl.program_id(1) == 0:
                inputs = piece * PIECE + tl.arange(0, PIECE)
                tl.store(scale_ptr + inputs, tl.zeros((PIECE,), tl.float32) + scale)


@triton.jit
def store_four(to, fours, a, b, c, d, mask):  # type: ignore[no-untyped-def]
    """Four inputs of four rows."""
    w0, w1, w2, w3 = transposed(a, b, c, d)
    tl.store(to, w0, mask=mask)
    tl.store(to + fours, w1, mask=mask)
    tl.store(to + 2 * fours, w2, mask=mask)
    tl.store(to + 3 * fours, w3, mask=mask)
