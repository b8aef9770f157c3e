"""Learning-rate schedules, as transformers.get_scheduler has them, as pure functions of the step.

Written out because importing transformers' own brings its trainer, and PEFT where that is installed; a test compares
each with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from decompft.launcher.recipe import TrainSection

POLYNOMIAL_END = 1e-7  # the rate that `polynomial` (of power 1) ends with
INVERSE_SQRT_STEPS = 10_000  # its time scale without warm-up


def factor_of(train: TrainSection, total_steps: int) -> Callable[[int], float]:
    """Step (from 0) -> factor of the learning rate."""
    warmup = train.warmup_steps
    after = {
        "constant": lambda step: 1.0,
        "constant_with_warmup": lambda step: 1.0,
        "linear": lambda step: _left(step, warmup, total_steps),
        "cosine": lambda step: _cosine(step, warmup, total_steps),
        "polynomial": lambda step: _polynomial(step, warmup, total_steps, train.learning_rate),
        "inverse_sqrt": lambda step: _inverse_sqrt(step, warmup),
    }[train.schedule]

    def factor(step: int) -> float:
        return step / max(1, warmup) if step < warmup else after(step)

    return factor


def position(train: TrainSection, total_steps: int, step: int) -> dict[str, Any]:
    """What a checkpoint of `step` keeps of the schedule: its length and the rates of the steps on both sides."""
    factor = factor_of(train, total_steps)
    before, after = (train.learning_rate * factor(max(0, at)) for at in (step - 1, step))
    return {"total_steps": total_steps, "rate": before, "next_rate": after}


def jump(saved: Mapping[str, Any] | None, train: TrainSection, total_steps: int, step: int) -> str:
    """In words how the learning rate jumps where a checkpoint of `step` is resumed; "" where it goes on as laid out.

    Args:
        saved: what `position` gave when it was written; None in one from before that was kept.
        total_steps: of the schedule from now on.
    """
    now = position(train, total_steps, step)
    if saved is None or step == 0 or step >= total_steps:
        return ""
    if math.isclose(saved["next_rate"], now["next_rate"], rel_tol=1e-6):
        return ""
    why = "this recipe has another rate or schedule"
    if (laid_out := saved["total_steps"]) != total_steps:
        why = f"the schedule was laid out for {laid_out} steps, now it is for {total_steps} (train.max_steps)"
    ends = f"from {saved['rate']:.3g} at step {step} to {now['next_rate']:.3g} at step {step + 1}"
    return f"the learning rate jumps {ends}: {why}"


def _left(step: int, warmup: int, total: int) -> float:
    return max(0.0, (total - step) / max(1, total - warmup))


def _cosine(step: int, warmup: int, total: int) -> float:
    progress = (step - warmup) / max(1, total - warmup)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


def _polynomial(step: int, warmup: int, total: int, rate: float) -> float:
    if step > total:
        return POLYNOMIAL_END / rate
    left = 1 - (step - warmup) / (total - warmup)
    return ((rate - POLYNOMIAL_END) * left + POLYNOMIAL_END) / rate


def _inverse_sqrt(step: int, warmup: int) -> float:
    scale = warmup or INVERSE_SQRT_STEPS
    return 1 / math.sqrt((step + scale - warmup) / scale)
