"""What the host needs for a forward and a backward pass of Llama-2-7B's shape, and which functions take it.

python benchmarks/host_time.py [KEY=VALUE ...]

Both run on one thread, or cProfile would not see the backward pass; the device is waited for after each step.
"""

from __future__ import annotations

import cProfile
import pstats
import sys
import time
from pathlib import Path

import torch
from trial import Trial, prepare

from decompft.launcher.planner import make
from decompft.launcher.source import load
from decompft.launcher.worker.engines.choose import make_engine

RECIPE = Path(__file__).resolve().parent / "llama7b_shape.yaml"
SHOWN = 40


def main() -> None:
    plan = make(load(RECIPE, ["parallel.strategy=single", "parallel.gpus_per_node=1", *sys.argv[1:]]))
    engine = make_engine(plan)
    engine.start()
    trial = prepare(plan, engine)
    torch.autograd.set_multithreading_enabled(False)
    for _ in range(3):
        step(trial)
    forward, backward = (
        1000 * sorted(part)[2] for part in zip(*(step(trial) for _ in range(5)), strict=True)
    )
    print(f"handed over: forward {forward:.0f} ms, backward {backward:.0f} ms")
    with cProfile.Profile() as found:
        for _ in range(3):
            step(trial)
    pstats.Stats(found).sort_stats("tottime").print_stats(SHOWN)
    engine.stop()


def step(trial: Trial) -> tuple[float, float]:
    """Seconds until each pass was handed over."""
    engine, began = trial.engine, time.perf_counter()
    with engine.accumulate(last=True):
        loss = trial.forward()
        middle = time.perf_counter()
        engine.backward(loss)
        end = time.perf_counter()
    engine.zero_gradients(trial.parameters)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return middle - began, end - middle


if __name__ == "__main__":
    main()
