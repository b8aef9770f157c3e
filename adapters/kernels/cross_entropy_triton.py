"""The Triton side of cross_entropy.py: imported only on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl

# what is subtracted before exp stays finite: inf - inf is not a number
_MOST = tl.constexpr(3e38)


@triton.jit  # type: ignore[untyped-decorator]
def cross_entropy(  # type: ignore[no-untyped-def]
    logits_ptr,  # (rows, columns), contiguous along its second dimension; becomes slopes
    targets_ptr,  # (rows,) int64
    losses_ptr,  # (rows,) float32
    num_columns,
    logits_stride,
    ignore,  # target of rows of zeros
    SLOPES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program's row."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    in_block = tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row)
    if target == ignore:
        tl.store(losses_ptr + row, 0.0)
        if SLOPES:
            zeros = tl.zeros((BLOCK,), dtype=logits_ptr.dtype.element_ty)
            first = 0
            while first < num_columns:
                columns = first + in_block
                tl.store(logits_ptr + columns, zeros, mask=columns < num_columns)
                first += BLOCK
    else:
        # before the sums, whose threads wait for each other: none has yet written where this is read
        is_column = (target >= 0) & (target < num_columns)
        chosen = tl.load(logits_ptr + target, mask=is_column, other=float("nan")).to(tl.float32)
        most = -_MOST
        sums = tl.zeros((BLOCK,), dtype=tl.float32)
        first = 0
        while first < num_columns:
            columns = first + in_block
            x = tl.load(logits_ptr + columns, mask=columns < num_columns, other=-float("inf")).to(tl.float32)
            more = tl.minimum(tl.maximum(most, tl.max(x, axis=0)), _MOST)
            sums = sums * tl.exp(most - more) + tl.exp(x - more)
            most = more
            first += BLOCK
        norm = most + tl.log(tl.sum(sums, axis=0))
        tl.store(losses_ptr + row, norm - chosen)
        if SLOPES:
            # from the last block to the first: the last were read last, and are the likeliest to be in cache
            first -= BLOCK
            while first >= 0:
                columns = first + in_block
                mask = columns < num_columns
                x = tl.load(logits_ptr + columns, mask=mask, other=-float("inf")).to(tl.float32)
                slope = tl.exp(x - norm) - tl.where(columns == target, 1.0, 0.0)
                tl.store(logits_ptr + columns, slope.to(logits_ptr.dtype.element_ty), mask=mask)
                first -= BLOCK
