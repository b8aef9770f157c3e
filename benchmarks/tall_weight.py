"""A trial: would dx = dy W be quicker of a W that is unpacked transposed? One GPU, a minute.

python benchmarks/tall_weight.py

torch's product of two row-major matrices is slower than that of one by the transpose of the other, which the forward
pass has (products.py: forward beside backward). To have it in the backward pass, too, the 4-bit weight would have to be
unpacked into rows of inputs. Nothing uses this kernel: it goes into adapters/kernels/dequantize.py or away.
"""

from __future__ import annotations

import itertools
import sys

import torch
import triton
import triton.language as tl
from step_classes import replayed, seconds
from torch import Tensor

from decompft.adapters.frozen.fourbit import Nf4Linear
from decompft.adapters.kernels import dequantize
from decompft.adapters.kernels.dequantize_triton import block_scale

TOKENS = 8192
SIZES = ((4096, 4096), (11008, 4096), (4096, 11008))  # (O, I)
TILES = tuple(itertools.product((32, 64), (64, 128, 256), (2, 4, 8)))  # inputs, output rows, warps


@triton.jit  # type: ignore[untyped-decorator]
def tall(  # type: ignore[no-untyped-def]
    codes_ptr,  # (rows, inputs / 2) bytes
    bytes_ptr,
    floats_ptr,
    times_ptr,
    levels_ptr,
    out_ptr,  # (inputs, rows)
    num_rows,
    row_bytes,
    row_floats,
    DOUBLE: tl.constexpr,
    FUSED: tl.constexpr,
    TIMES: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,  # inputs of a tile, of one block
    ROWS: tl.constexpr,
):
    piece = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < num_rows
    wide = rows.to(tl.int64)
    scale = block_scale(
        bytes_ptr,
        floats_ptr,
        times_ptr,
        wide,
        piece * PIECE // BLOCK,
        row_floats,
        in_rows,
        DOUBLE,
        FUSED,
        TIMES,
    )
    at = codes_ptr + wide[:, None] * row_bytes + (piece * (PIECE // 2) + tl.arange(0, PIECE // 2))[None, :]
    byte = tl.load(at, mask=in_rows[:, None], other=0).to(tl.int32)
    high = tl.load(levels_ptr + (byte >> 4)) * scale[:, None]
    low = tl.load(levels_ptr + (byte & 15)) * scale[:, None]
    weight = tl.interleave(high, low).to(out_ptr.dtype.element_ty)
    inputs = (piece * PIECE + tl.arange(0, PIECE)).to(tl.int64)
    tl.store(out_ptr + inputs[:, None] * num_rows + rows[None, :], tl.trans(weight), mask=in_rows[None, :])


def unpacked(layer: Nf4Linear, storage: tuple[Tensor, Tensor], tile: tuple[int, int, int]) -> Tensor:
    """(I, O)."""
    codes, scales = storage
    piece, rows, warps = tile
    stored = dequantize.sources(codes, scales, "nf4", None, double_quant=layer.double_quant)
    out = torch.empty(layer.in_features, layer.out_features, dtype=torch.bfloat16, device=codes.device)
    tall[(layer.in_features // piece, -(-layer.out_features // rows))](
        *stored.pointers, out, layer.out_features, layer.in_features // 2, stored.row_floats, **stored.constants,
        BLOCK=layer.block_size, PIECE=piece, ROWS=rows, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def made(num_out: int, num_in: int, device: str) -> tuple[Nf4Linear, tuple[Tensor, Tensor]]:
    layer = Nf4Linear(num_in, num_out, block_size=64, double_quant=True, bias_dtype=None).to(device)
    codes, scales = layer.pack(torch.randn(num_out, num_in, device=device) / 64)
    return layer, (codes, scales)


def main() -> None:
    for num_out, num_in in SIZES:
        layer, storage = made(num_out, num_in, "cuda")
        dy = torch.randn(TOKENS, num_out, device="cuda", dtype=torch.bfloat16)
        dx = torch.empty(TOKENS, num_in, device="cuda", dtype=torch.bfloat16)
        weight = layer.unpack(storage, torch.bfloat16)
        found = {}
        for tile in TILES:
            assert torch.equal(unpacked(layer, storage, tile), weight.T), tile
            found[tile] = 1000 * replayed([lambda s=storage, t=tile, own=layer: unpacked(own, s, t)] * 20)
        plain = 1000 * replayed([lambda own=layer, s=storage: own.unpack(s, torch.bfloat16)] * 20)
        best = min(found, key=lambda t: found[t])
        turned = unpacked(layer, storage, best)
        rows, columns = (
            1000 * seconds(lambda w=w, dy=dy, dx=dx: torch.mm(dy, w, out=dx)) for w in (weight, turned.T)
        )
        three = ", ".join(f"{t}: {ms:.4f}" for t, ms in sorted(found.items(), key=lambda item: item[1])[:3])
        print(
            f"{num_out} -> {num_in}: product {rows:.3f} ms, of the transposed {columns:.3f}; unpack {plain:.4f}, "
            f"transposed {three}; gained {rows + plain - columns - found[best]:+.3f}", flush=True,
        )  # fmt: skip


def interpret() -> None:
    """On a CPU, with TRITON_INTERPRET=1; the levels as float32, as it rounds bfloat16 otherwise."""
    dequantize._addcmul_is_fused = lambda device: False  # type: ignore[assignment]
    layer, storage = made(70, 128, "cpu")
    expected = dequantize.plain(*storage, "nf4", 64, torch.bfloat16, double_quant=True).T
    assert torch.allclose(unpacked(layer, storage, (32, 64, 4)).float(), expected.float(), rtol=2**-7, atol=0)
    print("as torch")


if __name__ == "__main__":
    interpret() if sys.argv[1:] == ["interpret"] else main()
