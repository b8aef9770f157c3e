"""How long a run takes, where the speed of its device was measured."""

from __future__ import annotations

import math

from decompft.launcher.machine import Machine
from decompft.launcher.plan import Plan, StepTime, World
from decompft.launcher.rates import (
    GPUS,
    MIN_KNOWN_HIDDEN,
    NETWORK_GBIT_PER_S,
    SAVE_BYTES_PER_S,
    Rates,
    fabric,
)
from decompft.launcher.simulator import simulate
from decompft.launcher.workload import Layout, Workload

SAVED_BYTES = 12  # of a trained number: itself and two moments, float32


def step_time(
    work: Workload, layout: Layout, world: World, accumulation: int, machine: Machine
) -> StepTime | None:
    """The time of an optimizer step, or None where nothing like it was measured."""
    rates = _rates(machine.gpu_name)
    is_measured = layout.device == "cuda" and not layout.cpu_offload and work.shape.hidden >= MIN_KNOWN_HIDDEN
    if rates is None or not is_measured:
        return None
    known = {"bfloat16": rates.flops, "fp8": rates.fp8_flops}
    if known.get(work.recipe.quantization.compute) is None:
        return None
    joined = fabric(machine.network_gbit_per_s or NETWORK_GBIT_PER_S)
    return simulate(work, layout, rates, joined, nodes=world.nodes, accumulation=accumulation)


def save_pause_s(work: Workload) -> float:
    """Seconds that a save adds to the steps around it."""
    return work.num_trained * SAVED_BYTES / SAVE_BYTES_PER_S


def run_seconds(plan: Plan) -> tuple[int, float, float] | None:
    """(steps, their seconds, seconds of saves) of a whole run; None where one of them is unknown."""
    steps = _num_steps(plan)
    if plan.seconds_per_step is None or steps is None:
        return None
    every = plan.recipe.checkpoint.every_steps
    saves = 1 + (steps - 1) // every if every else 1
    return steps, steps * plan.seconds_per_step, saves * plan.save_pause_s


def tokens_per_s_and_gpu(plan: Plan) -> float | None:
    """Of full rows."""
    if plan.seconds_per_step is None:
        return None
    return plan.batch.tokens_per_step / plan.seconds_per_step / plan.world.size


def _num_steps(plan: Plan) -> int | None:
    train = plan.recipe.train
    if train.epochs is None or plan.steps_per_epoch is None:
        return train.max_steps
    return math.ceil(train.epochs * plan.steps_per_epoch)


def _rates(gpu_name: str | None) -> Rates | None:
    return next((rates for name, rates in GPUS.items() if name in (gpu_name or "")), None)
