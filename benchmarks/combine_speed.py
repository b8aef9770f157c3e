"""How near is the kernel `combine` to the card's memory, beside torch's operators? One GPU, about a minute.

python benchmarks/combine_speed.py [--tokens 8192]

Cases are those of Llama-2-7B's shape at rank 16: y and dx under `quantization.compute: fp8`, dx and the dots of MAP.
Each is also timed with other tiles than the kernel's own. Bytes count once for each array that is read or written.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from step_classes import seconds
from torch import Tensor

from decompft.adapters.kernels import combine
from decompft.adapters.kernels.columns import dot

# name, arrays, dots, inner size, columns, right is transposed
CASES = (
    ("y of q, before it", 0, False, 16, 4096, True),
    ("y of gate, before it", 0, False, 16, 11008, True),
    ("dx of q, k, v, before", 0, False, 48, 4096, False),
    ("y of q, fp8", 1, False, 16, 4096, True),
    ("y of gate, fp8", 1, False, 16, 11008, True),
    ("dx of q, k, v, fp8", 3, False, 48, 4096, False),
    ("dx of o, MAP", 1, True, 16, 4096, False),
    ("dx of down, MAP", 1, True, 16, 11008, False),
    ("dx of gate, up, MAP", 2, True, 32, 4096, False),
    ("dx of q, k, v, MAP", 3, True, 48, 4096, False),
)
TILES = tuple(combine.Tile(*t) for t in itertools.product((64, 128), (1, 4, 8), (4, 8)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=8192)
    tokens, by_default = parser.parse_args().tokens, combine.TILES
    print(f"{'case':<22}{'torch ms':>10}{'kernel ms':>11}{'TB/s':>7}   columns, tiles, warps: ms")
    for name, num, dots, inner, columns, tall in CASES:
        owns = [made(tokens, columns) for _ in range(max(num, 1))]
        x = made(tokens, columns) if dots else None
        thin = made(tokens, inner), made(columns, inner).T if tall else made(inner, columns)
        if not combine.fits(owns[0], thin):
            print(f"{name}: {combine.PROVED.reason(owns[0].device, owns[0].dtype)}")
            continue
        work, twin = (of_product, by_torch_alone) if num == 0 else (of_sum, by_torch)
        before = 1000 * seconds(lambda owns=owns, x=x, thin=thin, twin=twin: twin(owns, x, thin))
        found = {}
        own = combine.TILES[num]
        for tile in (own, *(t for t in TILES if t != own)):
            combine.TILES = (tile,) * (combine.MOST + 1)  # type: ignore[assignment]
            found[tile] = 1000 * seconds(lambda owns=owns, x=x, thin=thin, work=work: work(owns, x, thin))
        combine.TILES = by_default
        bytes_ = 2 * tokens * columns * (num + 1 + dots) + 2 * inner * (tokens + columns)
        best = ", ".join(
            f"{tuple(t)}: {ms:.3f}" for t, ms in sorted(found.items(), key=lambda item: item[1])[:3]
        )
        print(f"{name:<22}{before:10.3f}{found[own]:11.3f}{bytes_ / found[own] / 1e9:7.2f}   {best}")


def made(*size: int) -> Tensor:
    """Small, as the sum is added to again and again."""
    return 1e-3 * torch.randn(size, device="cuda", dtype=torch.bfloat16)


def of_sum(owns: list[Tensor], x: Tensor | None, thin: combine.Product) -> None:
    combine.add_(owns, x, thin)


def of_product(owns: list[Tensor], x: Tensor | None, thin: combine.Product) -> None:
    combine.product(*thin)


def by_torch_alone(owns: list[Tensor], x: Tensor | None, thin: combine.Product) -> None:
    torch.mm(*thin)


def by_torch(owns: list[Tensor], x: Tensor | None, thin: combine.Product) -> None:
    if x is not None:
        for own in owns:
            dot(x, own)
    for own in owns[1:]:
        owns[0].add_(own)
    owns[0].addmm_(*thin)


if __name__ == "__main__":
    main()
