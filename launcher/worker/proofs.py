"""What a run proves about itself while it trains (DESIGN.md section 6)."""

from __future__ import annotations

import math

import torch

from decompft.adapters.inject import adapters
from decompft.adapters.spec import ADAPTER_SPECS
from decompft.adapters.token_rows import only_looked_up
from decompft.launcher.errors import RunFailed
from decompft.launcher.worker.build import Built
from decompft.launcher.worker.engines.base import Engine, full_shape

STEPS_WITH_ZEROS = 1  # the spec's exact zeros are excused at the first step only
LAST_STEP = 2  # checked at steps 0 and 2, counted from the start and from the begin of every second phase


def steps_to_prove(built: Built) -> set[int]:
    """The optimizer steps (from 0) before which `prove_gradients` is asked."""
    begins = {0} | {step for _, a in adapters(built.model.model) for step in a.restarts().values()}
    return begins | {step + LAST_STEP for step in begins}


def prove_gradients(built: Built, engine: Engine, step: int) -> None:
    """Every trained tensor has a finite, non-zero gradient, before step `step` (from 0) is taken.

    A single number (MAP's magnitude a) is excused at the first step, too: where a norm follows the
    layer (Gemma 2 and 3, Qwen 3) the scale of its output has no slope while nothing is added to it.

    Raises:
        RunFailed: names the tensors that would not train.
    """
    excused = {f"{n}.{t}" for n, a in adapters(built.model.model) for t in a.asleep(step)}
    excused |= only_looked_up(built.model.model)  # a batch need not have any of these tokens
    if step < STEPS_WITH_ZEROS:
        excused |= {
            f"{n}.{t}"
            for n, a in adapters(built.model.model)
            for t in ADAPTER_SPECS[a.config.method].zero_grad_at_start(a.config)
        } | {n for n, p in built.trained.items() if math.prod(full_shape(p)) == 1}
    # counted, not squared: the square of a small number is 0; NaN counts
    counts = torch.stack(
        [
            torch.zeros((), device=engine.device) if grad is None
            else torch.count_nonzero(grad).float().to(engine.device)
            for grad in map(engine.gradient, built.trained.values())
        ]
    )  # fmt: skip
    values = engine.sum_pieces(counts).tolist()
    dead = [n for n, v in zip(built.trained, values, strict=True) if v == 0 and n not in excused]
    if dead:  # NaN and inf are stopped by the loop, with the samples that made them
        raise RunFailed(
            f"step {step + 1}: {len(dead)} trained tensors have a zero gradient, first {dead[0]}; "
            "they would silently not train",
            (
                ""
                if step == 0
                else "numbers may have grown until nothing moves any more: lower train.learning_rate; else "
            )
            + "this is a defect of the model's wiring or of the data (every token masked?): "
            "see decompft inspect data, and report the recipe if the data is fine",
        )
