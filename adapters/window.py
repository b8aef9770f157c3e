"""Between which optimizer steps do the ranks of AdaLoRA and FlexLoRA change?

Without torch: a recipe whose warm-ups leave no step is refused before anything starts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """The optimizer steps (from 0) between which ranks change."""

    first: int
    last: int
    interval: int

    def progress(self, step: int) -> float:
        """0 at `first`, 1 at `last`."""
        return min(1.0, max(0.0, (step - self.first) / max(1, self.last - self.first)))

    def is_due(self, step: int) -> bool:
        """After which steps ranks change; always after `last`."""
        return step == self.last or (self.first < step < self.last and step % self.interval == 0)


def window(init_warmup: float, final_warmup: float, interval: int, total_steps: int) -> Window:
    """Both warm-ups in steps, or below 1 as a share of `total_steps`.

    Raises:
        ValueError: they leave no step between them.
    """
    before, after = (
        math.floor(w * total_steps) if w < 1 else math.floor(w) for w in (init_warmup, final_warmup)
    )
    if before + after >= total_steps:
        raise ValueError(
            f"init_warmup {before} and final_warmup {after} leave none of the {total_steps} steps"
        )
    return Window(first=before, last=min(total_steps - after, total_steps - 1), interval=interval)
