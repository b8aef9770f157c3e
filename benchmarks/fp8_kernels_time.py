"""What each kernel of adapters/kernels/fp8.py costs beside the bytes that it moves, and which of its tiles is fastest.

    python benchmarks/fp8_kernels_time.py

Weights of Llama-2-7B's linears in nf4 with double quantization, 8,192 tokens in bfloat16. Each line: milliseconds of
one launch, what it reads and writes over them, and that as a share of a large copy's rate in the same process. Launches
are replayed from a CUDA graph over as many weights as the L2 cache cannot hold; the median of 20 replays. Tiles of one
kernel have to give the same bits; the fastest by the sum over the sizes is named last, to be made the default in
fp8.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import chain

import torch
from check_fp8_kernels import ROW_WARPS, TALL_TILES
from step_classes import copy_rate, replayed
from torch import Tensor

from decompft.adapters.frozen.fourbit import Nf4Linear
from decompft.adapters.kernels import dequantize, fp8
from decompft.adapters.kernels.fp8 import FourBit, Rows

TOKENS = 8192
SIZES = ((4096, 4096), (11008, 4096), (4096, 11008))  # (O, I)
CUDA = torch.device("cuda")
_BEYOND_CACHE = 1 << 28  # bytes
Launch = Callable[[], object]


def main() -> None:
    rate = copy_rate()
    print(f"a copy of 2 GiB: {rate / 1e9:,.0f} GB/s", flush=True)
    print(f"{'kernel':>16} {'out':>6} {'in':>6} {'tile':>10} {'ms':>8} {'GB/s':>7} {'of copy':>8}")
    in_all: dict[str, dict[object, float]] = defaultdict(lambda: defaultdict(float))
    for num_out, num_in in SIZES:
        for kernel, tile, num_bytes, launches in chain(over_weights(num_out, num_in), over_tokens(num_in)):
            took = replayed(launches)
            in_all[kernel][tile] += took
            speed = num_bytes / took
            shown = "" if tile is None else str(tile)
            print(
                f"{kernel:>16} {num_out:6d} {num_in:6d} {shown:>10} {1000 * took:8.4f} {speed / 1e9:7,.0f} "
                f"{speed / rate:8.0%}", flush=True,
            )  # fmt: skip
    for kernel, by_tile in in_all.items():
        if len(by_tile) > 1:
            default = fp8._ROW_WARPS if kernel == "fourbit_rows" else (fp8._TALL_WARPS, fp8._TALL_PIECES)
            print(f"{kernel}: {min(by_tile, key=lambda t: by_tile[t])} is fastest, {default} is the default")


Timed = tuple[str, object, int, list[Launch]]  # kernel, tile, bytes of a launch, one launch for each weight


def over_weights(num_out: int, num_in: int) -> Iterator[Timed]:
    count = -(-_BEYOND_CACHE // (num_out * num_in))
    layer = Nf4Linear(num_in, num_out, block_size=64, double_quant=True, bias_dtype=None).to(CUDA)
    weights = [packed(layer) for _ in range(count)]
    size = num_out * num_in
    read = weights[0].codes.nbytes + weights[0].scales.nbytes

    rows = [fp8._room(num_out, num_in, CUDA) for _ in weights]
    first: list[Rows] = []
    for warps in ROW_WARPS:
        yield (
            "fourbit_rows",
            warps,
            read + size,
            [with_warps(warps, w, r) for w, r in zip(weights, rows, strict=True)],
        )
        first = same_bits(first, rows)
    highs = [torch.empty(-(-num_out // fp8._HIGH_ROWS), num_in // 64, device=CUDA) for _ in weights]
    launches = [lambda w=w, h=h: fp8.launch_block_highs(w, h) for w, h in zip(weights, highs, strict=True)]
    yield "block_highs", None, weights[0].scales.nbytes + highs[0].nbytes, launches
    columns, first = [fp8._room(num_in, num_out, CUDA) for _ in weights], []
    given = [(w, h.amax(0), r) for w, h, r in zip(weights, highs, columns, strict=True)]
    for tile in TALL_TILES:
        yield "fourbit_columns", tile, read + size, [with_tile(tile, *each) for each in given]
        first = same_bits(first, columns)
    launches = [lambda w=w: dense(w) for w in weights]
    yield "dequantize", None, read + 2 * size, launches


def packed(layer: Nf4Linear) -> FourBit:
    codes, scales = layer.pack(torch.randn(layer.out_features, layer.in_features, device=CUDA) / 64)
    return layer.four_bit((codes, scales))


def with_warps(warps: int, weight: FourBit, to: Rows) -> Launch:
    def launch() -> None:
        fp8._ROW_WARPS = warps
        fp8.launch_fourbit_rows(weight, *to)

    return with_defaults(launch)


def with_tile(tile: tuple[int, int], weight: FourBit, high_B: Tensor, to: Rows) -> Launch:
    def launch() -> None:
        fp8._TALL_WARPS, fp8._TALL_PIECES = tile
        fp8.launch_fourbit_columns(weight, high_B, *to)

    return with_defaults(launch)


def with_defaults(launch: Launch) -> Launch:
    def restored() -> None:
        before = fp8._ROW_WARPS, fp8._TALL_WARPS, fp8._TALL_PIECES
        launch()
        fp8._ROW_WARPS, fp8._TALL_WARPS, fp8._TALL_PIECES = before

    return restored


def same_bits(first: list[Rows], found: list[Rows]) -> list[Rows]:
    """Of the first weight, the first tile's beside this one's.

    Raises: AssertionError: they differ."""
    codes, scale = found[0].codes.view(torch.uint8), found[0].scale
    if first:
        assert torch.equal(first[0].codes, codes) and torch.equal(first[0].scale, scale), "tiles differ"
        return first
    return [Rows(codes.clone(), scale.clone())]


def dense(weight: FourBit) -> Tensor:
    codes, scales = (s.view(torch.bfloat16) for s in (weight.codes, weight.scales))  # as they are stored
    return dequantize.dequantize(
        codes, scales, "nf4", weight.block_size, torch.bfloat16, double_quant=weight.double_quant
    )


def over_tokens(width: int) -> Iterator[Timed]:
    count = -(-_BEYOND_CACHE // (TOKENS * width))
    given = [torch.randn(TOKENS, width, device=CUDA, dtype=torch.bfloat16) for _ in range(count)]
    found = [fp8._room(TOKENS, width, CUDA) for _ in given]
    launches = [lambda x=x, to=to: fp8.launch_rows(x, None, *to) for x, to in zip(given, found, strict=True)]
    yield "rows", None, given[0].nbytes + found[0].codes.nbytes, launches


if __name__ == "__main__":
    main()
