"""The Triton side of dequantize.py: imported only on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def block_scale(  # type: ignore[no-untyped-def]
    bytes_ptr,  # the storage of scales by bytes
    floats_ptr,  # and by float32
    times_ptr,  # float32 that every scale of a row is multiplied by: (1,) or (rows,); unused without TIMES
    rows,  # of any shape
    blocks,  # in the row, of a shape that goes with it
    row_floats,  # float32 in a row of the storage
    mask,
    DOUBLE: tl.constexpr,  # one byte a block, then float32 low and step of the row
    FUSED: tl.constexpr,  # low + step * byte is rounded once
    TIMES: tl.constexpr,  # 0: by nothing, 1: by one number, 2: by one a row
):
    """The float32 absmax of blocks."""
    if DOUBLE:
        byte = tl.load(bytes_ptr + rows * (4 * row_floats) + blocks, mask=mask, other=0).to(tl.float32)
        tail = floats_ptr + rows * row_floats + (row_floats - 2)
        low = tl.load(tail, mask=mask, other=0.0)
        step = tl.load(tail + 1, mask=mask, other=0.0)
        if FUSED:
            found = tl.fma(byte, step, low)
        else:
            found = low + byte * step
    else:
        found = tl.load(floats_ptr + rows * row_floats + blocks, mask=mask, other=0.0)
    if TIMES == 1:
        found = found * tl.load(times_ptr)
    if TIMES == 2:
        found = found * tl.load(times_ptr + rows, mask=mask, other=0.0)
    return found


@triton.jit
def unpacked(byte, levels_ptr, scale):  # type: ignore[no-untyped-def]
    """Bytes (n, k) of two codes -> numbers (n, 2 k), float32; scale (n,) of each row."""
    high = tl.load(levels_ptr + (byte >> 4)) * scale[:, None]
    low = tl.load(levels_ptr + (byte & 15)) * scale[:, None]
    return tl.interleave(high, low)


@triton.jit  # type: ignore[untyped-decorator]
def dequantize(  # type: ignore[no-untyped-def]
    codes_ptr,  # (blocks of all rows, HALF) bytes, the first code of two in the high half
    bytes_ptr,
    floats_ptr,
    times_ptr,
    levels_ptr,  # (16,) float32
    out_ptr,  # (blocks of all rows, 2 HALF)
    total,  # blocks in all
    row_blocks,  # blocks in a row
    row_floats,
    DOUBLE: tl.constexpr,
    FUSED: tl.constexpr,
    TIMES: tl.constexpr,
    HALF: tl.constexpr,  # bytes in a block
    BLOCKS: tl.constexpr,  # of a program
):
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    is_block = block < total
    row = block // row_blocks
    scale = block_scale(
        bytes_ptr, floats_ptr, times_ptr, row.to(tl.int64), block % row_blocks, row_floats, is_block,
        DOUBLE, FUSED, TIMES,
    )  # fmt: skip
    mask = is_block[:, None]
    start = block.to(tl.int64)[:, None] * HALF
    byte = tl.load(codes_ptr + start + tl.arange(0, HALF)[None, :], mask=mask, other=0).to(tl.int32)
    weight = unpacked(byte, levels_ptr, scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + 2 * start + tl.arange(0, 2 * HALF)[None, :], weight, mask=mask)
