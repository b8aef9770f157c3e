"""A trial: would W* = W + q up down, made whole while a 4-bit weight is unpacked, be faster than thin products?

    python benchmarks/whole_weight.py

The product is then one, y = x W*^T, without a thin product written before it; the thin factors are multiplied tile by
tile in the registers of the kernel that unpacks. It is what mixed-precision training multiplies with: a weight that
stands in float32, rounded for each product. Only for a weight off bfloat16's grid, as a quantized one is: one that lies
on it would lose every change below half a step. Times both ways on a GPU at Llama-2-7B's widths, rank 16, after
comparing the kernel with torch in float64; nothing of the package uses it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from step_classes import seconds
from torch import Tensor

from decompft.adapters.frozen.fourbit import Nf4Linear
from decompft.adapters.kernels import dequantize
from decompft.adapters.kernels.dequantize_triton import block_scale

T, R, COLUMNS = 8192, 16, 64
TILES = ((32, 4), (64, 4), (128, 4), (128, 8))  # rows, warps


@triton.jit  # type: ignore[untyped-decorator]
def whole(  # type: ignore[no-untyped-def]
    codes_ptr,  # (rows, width / 2) bytes, the first code of two in the high half
    bytes_ptr,
    floats_ptr,
    times_ptr,
    levels_ptr,  # (16,) float32
    up_ptr,  # (rows, rank)
    down_ptr,  # (rank, width)
    q_ptr,  # (1,) float32; unused without Q
    out_ptr,  # (rows, width)
    num_rows,
    width,
    block_size,
    row_floats,
    rank,
    q,
    DOUBLE: tl.constexpr,
    FUSED: tl.constexpr,
    TIMES: tl.constexpr,
    Q: tl.constexpr,  # q is a tensor
    R: tl.constexpr,  # power of 2, at least rank and 16
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # divides the block size, so that a row of a tile has one scale
):
    column = tl.program_id(0) * COLUMNS
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < num_rows
    mask = in_rows[:, None]
    wide = rows.to(tl.int64)
    scale = block_scale(
        bytes_ptr, floats_ptr, times_ptr, wide, column // block_size, row_floats, in_rows, DOUBLE, FUSED, TIMES,
    )  # fmt: skip
    r = tl.arange(0, R)
    in_rank = r < rank
    columns = column + tl.arange(0, COLUMNS)
    up = tl.load(up_ptr + wide[:, None] * rank + r[None, :], mask=mask & in_rank[None, :], other=0.0)
    down = tl.load(down_ptr + r[:, None] * width + columns[None, :], mask=in_rank[:, None], other=0.0)
    thin = tl.dot(up, down, input_precision="ieee")
    if Q:
        thin = thin * tl.load(q_ptr)
    else:
        thin = thin * q
    half = tl.arange(0, COLUMNS // 2)
    byte_at = codes_ptr + wide[:, None] * (width // 2) + (column // 2 + half)[None, :]
    byte = tl.load(byte_at, mask=mask, other=0).to(tl.int32)
    high = tl.load(levels_ptr + (byte >> 4)) * scale[:, None]
    low = tl.load(levels_ptr + (byte & 15)) * scale[:, None]
    found = tl.interleave(high, low) + thin
    out_at = out_ptr + wide[:, None] * width + columns[None, :]
    tl.store(out_at, found.to(out_ptr.dtype.element_ty), mask=mask)


def make(base: Nf4Linear, up: Tensor, down: Tensor, q: float, tile: tuple[int, int]) -> Tensor:
    """W* (out, in) in the factors' dtype; up (out, R), down (R, in)."""
    codes, scales = base.storage()
    out = torch.empty(base.out_features, base.in_features, dtype=up.dtype, device=up.device)
    rows, warps = tile
    whole[(base.in_features // COLUMNS, -(-base.out_features // rows))](
        **dequantize.sources(codes, scales, base.code, None, double_quant=base.double_quant),
        up_ptr=up, down_ptr=down, q_ptr=None, out_ptr=out, num_rows=base.out_features, width=base.in_features,
        block_size=base.block_size, rank=len(down), q=q, Q=False, R=R, ROWS=rows, COLUMNS=COLUMNS, num_warps=warps,
    )  # fmt: skip
    return out


def main() -> None:
    print("milliseconds; share: of a copy of as many bytes")
    copied = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(copied)
    bytes_per_s = 2 * copied.nbytes / seconds(lambda: other.copy_(copied))
    for num_in, num_out in ((4096, 4096), (4096, 11008), (11008, 4096)):
        base, up, down, x, h = _setting(num_in, num_out)
        weight = base.dense(torch.float32).double()
        exact = weight + 0.5 * (up.double() @ down.double())
        least = num_in * num_out * (2 + 0.5 + 1 / 64) / bytes_per_s

        def unpack(base: Nf4Linear = base) -> Tensor:
            return base.dense(torch.bfloat16)

        found = [("unpack", seconds(unpack))]
        for tile in TILES:
            apart = (make(base, up, down, 0.5, tile).double() - exact).abs()
            assert bool((apart <= 2**-8 * exact.abs() + 1e-6).all()), f"{tile}: {apart.max()}"
            found.append(
                (f"whole {tile}", seconds(lambda t=tile, b=base, u=up, d=down: make(b, u, d, 0.5, t)))
            )
        print(
            f"{num_in} -> {num_out}: " + ", ".join(f"{n} {1000 * s:.4f} ({least / s:.0%})" for n, s in found)
        )
        wide = base.dense(torch.bfloat16)
        y = torch.empty(T, num_out, dtype=torch.bfloat16, device="cuda")
        ways = (
            ("product", lambda y=y, x=x, w=wide: torch.mm(x, w.T, out=y)),
            ("thin first", lambda y=y, x=x, w=wide, h=h, u=up: torch.mm(h, u.T, out=y).addmm_(x, w.T)),
        )
        print("    " + ", ".join(f"{name} {1000 * seconds(work):.4f}" for name, work in ways))


def _setting(num_in: int, num_out: int) -> tuple[Nf4Linear, Tensor, Tensor, Tensor, Tensor]:
    base = Nf4Linear(num_in, num_out, block_size=64, double_quant=True, bias_dtype=None).cuda()
    for parameter, rows in zip(
        base.storage(), base.pack(torch.randn(num_out, num_in, device="cuda") / 64), strict=True
    ):
        parameter.data.copy_(rows)
    sizes = ((num_out, R), (R, num_in), (T, num_in), (T, R))
    up, down, x, h = (torch.randn(size, device="cuda", dtype=torch.bfloat16) / 64 for size in sizes)
    return base, up, down, x, h


if __name__ == "__main__":
    main()
