"""The Triton side of fp8.py: imported only on a GPU.

Every kernel casts to its output's element type at the very end: Triton's interpreter rounds to e4m3 wrongly
(triton pull request 11897), and is asked for float32 instead.
"""

from __future__ import annotations

import triton
import triton.language as tl

SMALLEST = tl.constexpr(1e-30)
LARGEST = tl.constexpr(448.0)


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
def dequantized(codes_ptr, levels_ptr, row, at, times, mask, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Levels of the bytes `at` of rows, two a byte, times (rows, bytes)."""
    pair = tl.load(codes_ptr + row[:, None] * WIDTH + at[None, :], mask=mask, other=0).to(tl.int32)
    return tl.interleave(tl.load(levels_ptr + (pair >> 4)) * times, tl.load(levels_ptr + (pair & 15)) * times)


@triton.jit  # type: ignore[untyped-decorator]
def fourbit_rows(  # type: ignore[no-untyped-def]
    codes_ptr,  # (rows, INPUTS / 2) bytes
    bytes_ptr,
    floats_ptr,
    levels_ptr,  # (16,) float32
    out_ptr,  # (rows, INPUTS)
    scale_ptr,  # (rows,) float32
    num_rows,
    INPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_POWER: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    WIDTH: tl.constexpr = INPUTS // 2
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < num_rows
    blocks = tl.arange(0, BLOCKS_POWER)
    known = in_rows[:, None] & (blocks < BLOCKS)[None, :]
    of_blocks = absmax(bytes_ptr, floats_ptr, row[:, None], blocks[None, :], known, SCALE_BYTES, DOUBLE)
    scale = tl.maximum(tl.max(of_blocks, axis=1), SMALLEST) / LARGEST
    tl.store(scale_ptr + row, scale, mask=in_rows)
    for start in range(0, WIDTH, BYTES):
        at = start + tl.arange(0, BYTES)
        mask = in_rows[:, None] & (at < WIDTH)[None, :]
        block = (at * 2) // BLOCK
        times = absmax(bytes_ptr, floats_ptr, row[:, None], block[None, :], mask, SCALE_BYTES, DOUBLE)
        times = times / scale[:, None]
        values = dequantized(codes_ptr, levels_ptr, row, at, times, mask, WIDTH)
        inputs = start * 2 + tl.arange(0, 2 * BYTES)
        inside = in_rows[:, None] & (inputs < INPUTS)[None, :]
        to = out_ptr + row[:, None] * INPUTS + inputs[None, :]
        tl.store(to, values.to(out_ptr.dtype.element_ty), mask=inside)


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
    codes_ptr,
    bytes_ptr,
    floats_ptr,
    levels_ptr,
    high_ptr,  # (BLOCKS,) float32: largest absmax over all rows
    out_ptr,  # (INPUTS, rows)
    scale_ptr,  # (INPUTS,) float32
    num_rows,
    INPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_POWER: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    WIDTH: tl.constexpr = INPUTS // 2
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < num_rows
    start = tl.program_id(1) * BYTES
    at = start + tl.arange(0, BYTES)
    mask = in_rows[:, None] & (at < WIDTH)[None, :]
    block = (at * 2) // BLOCK
    high = tl.load(high_ptr + block, mask=at < WIDTH, other=0.0)
    times = absmax(bytes_ptr, floats_ptr, row[:, None], block[None, :], mask, SCALE_BYTES, DOUBLE)
    times = times / (tl.maximum(high, SMALLEST) / LARGEST)[None, :]
    values = dequantized(codes_ptr, levels_ptr, row, at, times, mask, WIDTH)
    inputs = start * 2 + tl.arange(0, 2 * BYTES)
    in_inputs = inputs < INPUTS
    to = out_ptr + inputs.to(tl.int64)[None, :] * num_rows + row[:, None]
    tl.store(to, values.to(out_ptr.dtype.element_ty), mask=in_rows[:, None] & in_inputs[None, :])
    if tl.program_id(0) == 0:
        of_inputs = tl.load(high_ptr + inputs // BLOCK, mask=in_inputs, other=0.0)
        tl.store(scale_ptr + inputs, tl.maximum(of_inputs, SMALLEST) / LARGEST, mask=in_inputs)
