"""What does the loss cost beside its head's products, with the kernel and without? One GPU, about a minute.

python benchmarks/cross_entropy_speed.py [--tokens 8192] [--hidden 4096]

Forward passes of `token_loss_sum` in bfloat16 with a frozen head, which make the gradient, too; the products alone; the
kernel alone over all logits, with other blocks beside its own. The limit is each logit read and written once, at the
speed of a large copy.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import torch
from step_classes import copy_rate, replayed, seconds
from torch import Tensor

from decompft.adapters.kernels import cross_entropy
from decompft.launcher.worker.data.batches import IGNORE
from decompft.launcher.worker.loss import CHUNK_TOKENS, token_loss_sum

# columns of a block, warps
BLOCKS = tuple(itertools.product((4096, 8192, 16384), (8, 16, 32)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    args = parser.parse_args()
    memory = copy_rate()
    print(f"a large copy: {memory / 1e12:.2f} TB/s; ms:")
    print(
        f"{'vocabulary':>10}{'torch':>9}{'fused':>9}{'products':>10}{'kernel':>9}{'limit':>9}   columns, warps"
    )
    for vocab in (32000, 128256):
        hidden, weight = (
            torch.randn(n, args.hidden, device="cuda", dtype=torch.bfloat16) for n in (args.tokens, vocab)
        )
        hidden.requires_grad_()
        weight *= args.hidden**-0.5
        targets = torch.randint(vocab, (args.tokens,), device="cuda")
        fits = cross_entropy.fits
        assert fits(hidden, targets), cross_entropy.PROVED.reason(hidden.device, hidden.dtype)

        def loss(hidden: Tensor = hidden, weight: Tensor = weight, targets: Tensor = targets) -> Tensor:
            return token_loss_sum(hidden, weight, None, targets, None)

        fused = 1000 * seconds(loss)
        cross_entropy.fits = lambda like, targets_T: False
        plain = 1000 * seconds(loss)
        cross_entropy.fits = fits
        products = 1000 * seconds(lambda hidden=hidden, weight=weight: both_products(hidden.detach(), weight))
        logits = torch.randn(args.tokens, vocab, device="cuda", dtype=torch.bfloat16)
        found, own = {}, (cross_entropy._BLOCK, cross_entropy._WARPS)
        for block in (own, *(b for b in BLOCKS if b != own)):
            cross_entropy._BLOCK, cross_entropy._WARPS = block
            found[block] = 1000 * args.tokens / CHUNK_TOKENS * replayed(chunks(logits, targets))
        cross_entropy._BLOCK, cross_entropy._WARPS = own
        limit = 1000 * 2 * logits.nbytes / memory
        best = ", ".join(f"{b}: {ms:.3f}" for b, ms in sorted(found.items(), key=lambda item: item[1])[:4])
        print(f"{vocab:10d}{plain:9.3f}{fused:9.3f}{products:10.3f}{found[own]:9.3f}{limit:9.3f}   {best}")


def both_products(hidden: Tensor, weight: Tensor) -> None:
    for h in hidden.split(CHUNK_TOKENS):
        (h @ weight.T) @ weight


def chunks(logits: Tensor, targets: Tensor) -> list[Callable[[], Tensor]]:
    return [
        lambda x=x, t=t: cross_entropy.losses_(x, t, IGNORE, slopes=True)
        for x, t in zip(logits.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
    ]


if __name__ == "__main__":
    main()
