"""Where the time of a training step of Llama-2-7B's shape goes: kernels by their sum on the GPU, and the host's share.

python benchmarks/profile_step.py [KEY=VALUE ...]
torchrun --nproc-per-node 2 benchmarks/profile_step.py parallel.strategy=fsdp parallel.gpus_per_node=2 ...
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from trial import prepare

from decompft.launcher.planner import make
from decompft.launcher.source import load
from decompft.launcher.worker.engines.choose import make_engine
from decompft.launcher.worker.optimizer import clip_gradients

RECIPE = Path(__file__).resolve().parent / "llama7b_shape.yaml"
STEPS = 8


def main() -> None:
    plan = make(load(RECIPE, sys.argv[1:]))
    engine = make_engine(plan)
    engine.start()
    trial = prepare(plan, engine)
    trained = trial.built.trained

    def step() -> tuple[float, ...]:
        """Seconds until each part was handed to the GPU, and until the GPU was done."""
        marks = [time.perf_counter()]
        with engine.accumulate(last=True):
            loss = trial.forward()
            marks.append(time.perf_counter())
            engine.backward(loss)
        marks.append(time.perf_counter())
        torch.cuda.synchronize()
        marks.append(time.perf_counter())
        engine.reduce_gradients()
        clip_gradients([], trained, engine, 1.0)
        trial.optimizer.step()
        engine.zero_gradients(trial.parameters)
        torch.cuda.synchronize()
        marks.append(time.perf_counter())
        return tuple(b - a for a, b in zip(marks[:-1], marks[1:], strict=True))

    for _ in range(4):
        step()
    times = [step() for _ in range(STEPS)]
    parts = [sorted(part)[STEPS // 2] * 1000 for part in zip(*times, strict=True)]
    names = ("forward handed over", "backward handed over", "GPU behind", "reduce, clip, step")
    if engine.rank == 0:
        said = ", ".join(f"{name} {ms:.0f} ms" for name, ms in zip(names, parts, strict=True))
        print(f"{plan.strategy} x {engine.world_size}: {sum(parts):.0f} ms: {said}")
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        step()
        step()
    if engine.rank == 0:
        for key in ("self_cuda_time_total", "self_cpu_time_total"):
            print(trace.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=70))
    engine.stop()


if __name__ == "__main__":
    main()
