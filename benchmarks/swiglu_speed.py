"""How near is the kernel `swiglu` to the card's memory, beside Liger's and a branch by itself? One GPU, a minute.

python benchmarks/swiglu_speed.py [--tokens 8192] [--columns 11008] [--rank 16]

In bfloat16, as CUDA graphs of several arrays, so that neither the host nor a cache counts. A limit is the bytes of all
arrays, each read or written once, at the speed of a large copy. Other tiles are timed beside the kernel's own. The last
table is W A^T of nf4 weights, unpacked first and by the kernel `weight_times`.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial

import torch
from step_classes import copy_rate, replayed
from torch import Tensor

from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.frozen.fourbit import Nf4Linear
from decompft.adapters.kernels import combine, swiglu

COPIES = 4
TILES = tuple(
    swiglu.Tile(*t)
    for t in itertools.product((32, 64, 128), (64, 128, 256), (1, 4), (4, 8))
    if t[0] * t[1] <= 16384
)
WEIGHTS = ((4096, 4096), (11008, 4096), (4096, 11008))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=11008)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    draw = torch.Generator(device).manual_seed(0)

    def made(*size: int) -> Tensor:
        return torch.randn(size, generator=draw, device=device).bfloat16()

    sets = [[made(args.tokens, args.columns) for _ in range(3)] for _ in range(COPIES)]
    h, w = made(args.tokens, 2 * args.rank), made(args.columns, args.rank)
    branches = [(h[:, : args.rank], w), (h[:, args.rank :], w)]
    if not swiglu.fits(sets[0][0]):
        raise SystemExit(swiglu.PROVED.reason(device, torch.bfloat16))
    memory, each = copy_rate(), 2 * args.tokens * args.columns
    print(f"memory {memory / 1e12:.2f} TB/s")

    def times(work: Callable[..., object]) -> float:
        return 1e6 * replayed([partial(work, *s) for s in sets])

    def row(name: str, arrays: int, work: Callable[..., object], beside: float | None) -> None:
        found, limit = times(work), 1e6 * arrays * each / memory
        other = "" if beside is None else f"{beside:11.1f}"
        print(f"{name:<28}{arrays:7d}{limit:10.1f}{found:11.1f}{limit / found:7.0%}{other}", flush=True)

    print(f"{'pass':<28}{'arrays':>7}{'limit us':>10}{'kernel us':>11}{'of it':>7}{'liger us':>11}")
    before = liger()
    row(
        "forward, no branches",
        3,
        lambda g, u, dy: swiglu.forward(g, u, None, None),
        before and times(before[0]),
    )
    row("forward", 3, lambda g, u, dy: swiglu.forward(g, u, *branches), None)
    row(
        "backward, no branches",
        5,
        lambda g, u, dy: swiglu.backward(dy, g, u, None, None),
        before and times(before[1]),
    )
    row("backward", 5, lambda g, u, dy: swiglu.backward(dy, g, u, *branches), None)
    row("backward with dots", 5, lambda g, u, dy: swiglu.backward(dy, g, u, *branches, (True, True)), None)
    row("a branch by itself", 1, lambda g, u, dy: combine.product(branches[0][0], w.T), None)
    for name, work in (
        ("FORWARD", lambda g, u, dy: swiglu.forward(g, u, *branches)),
        ("BACKWARD", lambda g, u, dy: swiglu.backward(dy, g, u, *branches)),
    ):
        own, found = getattr(swiglu, name), {}
        for tile in (own, *(t for t in TILES if t != own)):
            setattr(swiglu, name, tile)
            try:
                found[tuple(tile)] = times(work)
            except Exception as error:  # a tile that does not fit
                print(f"{tile}: {type(error).__name__}")
        setattr(swiglu, name, own)
        best = ", ".join(f"{t}: {us:.1f}" for t, us in sorted(found.items(), key=lambda item: item[1])[:6])
        print(f"{name} rows, columns, tiles, warps: us: {best}", flush=True)
    print(f"{'out':>8}{'in':>8}{'unpacked us':>13}{'kernel us':>11}")
    for out, in_ in WEIGHTS:
        base, A = nf4(out, in_, device), made(args.rank, in_)
        storage = base.storage()
        unpacked = 1e6 * replayed([lambda: FrozenLinear.times(base, storage, A, torch.bfloat16)] * COPIES)  # noqa: B023
        own_us = 1e6 * replayed([lambda: base.times(storage, A, torch.bfloat16)] * COPIES)  # noqa: B023
        print(f"{out:8d}{in_:8d}{unpacked:13.1f}{own_us:11.1f}", flush=True)


def nf4(out: int, in_: int, device: torch.device) -> Nf4Linear:
    with device:
        base = Nf4Linear(in_, out, block_size=64, double_quant=True, bias_dtype=None)
    rows = torch.randn(out, in_, device=device) / in_**0.5
    for parameter, packed in zip(base.storage(), base.pack(rows), strict=True):
        parameter.data.copy_(packed)
    return base


def liger() -> tuple[Callable[..., object], Callable[..., object]] | None:
    """Forward and backward of its activation; None without Liger."""
    try:
        from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward
    except ImportError:
        return None
    return (lambda g, u, dy: swiglu_forward(g, u)), (lambda g, u, dy: swiglu_backward(g, u, dy))


if __name__ == "__main__":
    main()
