"""Which directions of AdaLoRA and FlexLoRA live: pure functions of scores, of e, and of the optimizer step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from decompft.adapters.window import Window


def budget(start: int, target: int, at: Window, step: int) -> int:
    """AdaLoRA's directions over all matrices after step `step` (eq. 12): cubic from `start` to `target`."""
    return int((start - target) * (1 - at.progress(step)) ** 3 + target)


def keep_largest(scores: Tensor, num_kept: int) -> Tensor:
    """1 for the `num_kept` largest of scores (n,), else 0; of equals, the earlier ones are kept."""
    order = scores.sort(descending=True, stable=True).indices
    kept = torch.zeros_like(scores)
    kept[order[:num_kept]] = 1.0
    return kept


def entropy(e: Tensor, mask: Tensor) -> float:
    """FlexLoRA's importance of a matrix: entropy of e^2 / sum e^2 over its live directions, over its largest value.

    A uniform spectrum gives 1. So do a single direction and e = 0, where 0/0 says nothing: such a matrix
    may grow, and a matrix of one direction cannot lose it anyway.
    """
    squares = e[mask > 0].double().square()
    total = float(squares.sum())
    if len(squares) < 2 or total == 0.0:
        return 1.0
    p = squares / total
    return float(-torch.xlogy(p, p).sum()) / math.log(len(squares))


def exchange(
    e: list[Tensor], masks: list[Tensor], most: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """FlexLoRA's moves: (matrix, direction) pairs that end, and as many that begin.

    The matrices of lowest entropy lose the direction of smallest |e|, those of highest gain a free one, at
    most `most` of each and never the same matrix; one direction always stays.
    """
    ranked = sorted(range(len(e)), key=lambda i: entropy(e[i], masks[i]))
    losers = [i for i in ranked if masks[i].sum() > 1]
    winners = [i for i in reversed(ranked) if masks[i].min() == 0]
    moves: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    taken: set[int] = set()
    for _ in range(min(most, len(e) // 2)):
        loser = next((i for i in losers if i not in taken), None)
        winner = next((i for i in winners if i not in taken and i != loser), None)
        if loser is None or winner is None:
            break
        taken |= {loser, winner}
        live = torch.where(masks[loser] > 0, e[loser].abs(), torch.inf)
        moves[0].append((loser, int(live.argmin())))
        moves[1].append((winner, int(masks[winner].argmin())))
    return moves


def num_exchanged(first: int, at: Window, step: int) -> int:
    """FlexLoRA's b: cubic from `first` to 0."""
    return math.ceil(first * (1 - at.progress(step)) ** 3)
