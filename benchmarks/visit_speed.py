"""How near is the kernel `visit` to the card's memory, beside torch's two products? One GPU, about a minute.

python benchmarks/visit_speed.py [--tokens 8192]

At rank 16 over the widths of Llama-2-7B's shape, with other tiles beside the kernel's own. dy's bytes count, once.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from step_classes import seconds

from decompft.adapters.kernels import visit

RANK = 16
# rows and columns of a tile, tiles of a program, stages
TILES = tuple(itertools.product((64, 128), (128, 256, 512), (4, 8, 16), (2, 3)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=8192)
    tokens = parser.parse_args().tokens
    own = visit._ROWS, visit._COLUMNS, visit._TILES, visit._STAGES
    print(f"{'columns':>8}{'torch ms':>10}{'kernel ms':>11}{'TB/s':>7}   rows, columns, tiles, stages: ms")
    for columns in (4096, 11008):
        dy = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
        up, hq = (torch.randn(n, RANK, device="cuda", dtype=torch.bfloat16) for n in (columns, tokens))
        gu = torch.empty_like(hq)
        before = 1000 * seconds(lambda dy=dy, up=up, hq=hq: (dy @ up, dy.T @ hq))
        found = {}
        for tile in (own, *(t for t in TILES if t != own)):
            visit._ROWS, visit._COLUMNS, visit._TILES, visit._STAGES = tile
            try:
                found[tile] = 1000 * seconds(
                    lambda dy=dy, up=up, hq=hq, gu=gu, n=tile[2]: visit._launch(dy, up, hq, gu, 0.5, n)
                )
            except Exception as error:  # a tile that does not fit into shared memory
                print(f"{tile}: {type(error).__name__}")
        visit._ROWS, visit._COLUMNS, visit._TILES, visit._STAGES = own
        best = ", ".join(f"{t}: {ms:.4f}" for t, ms in sorted(found.items(), key=lambda item: item[1])[:5])
        print(f"{columns:8d}{before:10.4f}{found[own]:11.4f}{dy.nbytes / found[own] / 1e9:7.2f}   {best}")


if __name__ == "__main__":
    main()
