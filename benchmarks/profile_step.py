"""Where the time of a training step of Llama-2-7B's shape goes: kernels by class beside the card's limits, by name, and
the host's share.

python benchmarks/profile_step.py [KEY=VALUE ...] [--out FILE]
torchrun --nproc-per-node 2 benchmarks/profile_step.py parallel.strategy=fsdp parallel.gpus_per_node=2 ...
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import torch
from step_classes import Class, Sizes, classes, measured_rates, table
from torch.profiler import ProfilerActivity, profile
from trial import Trial, prepare

from decompft.launcher.plan import Plan
from decompft.launcher.planner import make
from decompft.launcher.source import load
from decompft.launcher.worker.engines.choose import make_engine
from decompft.launcher.worker.optimizer import clip_gradients

RECIPE = Path(__file__).resolve().parent / "llama7b_shape.yaml"
STEPS, PROFILED = 8, 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path, help="append the tables to it")
    args = parser.parse_args()
    plan = make(load(RECIPE, args.overrides))
    engine = make_engine(plan)
    engine.start()
    rates = measured_rates()
    torch.cuda.empty_cache()
    trial = prepare(plan, engine)
    for _ in range(4):
        _step(trial)
    times = [_step(trial) for _ in range(STEPS)]
    parts = [sorted(part)[STEPS // 2] * 1000 for part in zip(*times, strict=True)]
    names = ("forward handed over", "backward handed over", "GPU behind", "reduce, clip, step")
    said = ", ".join(f"{name} {ms:.0f} ms" for name, ms in zip(names, parts, strict=True))
    head = f"{' '.join(args.overrides)}\n{plan.strategy} x {engine.world_size}: {sum(parts):.0f} ms: {said}"
    activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU]
    with profile(activities=activities, record_shapes=True) as trace:
        for _ in range(PROFILED):
            _step(trial)
    if engine.rank == 0:
        found = classes(trace.events(), _sizes(plan), PROFILED)
        text = f"{head}\n{table(found, rates)}\n\n{_kernels(found)}\n"
        print(text)
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(text + "\n")
    engine.stop()


def _step(trial: Trial) -> tuple[float, ...]:
    """Seconds until each part was handed to the GPU, and until the GPU was done."""
    engine = trial.engine
    marks = [time.perf_counter()]
    with engine.accumulate(last=True):
        loss = trial.forward()
        marks.append(time.perf_counter())
        engine.backward(loss)
    marks.append(time.perf_counter())
    torch.cuda.synchronize()
    marks.append(time.perf_counter())
    engine.reduce_gradients()
    clip_gradients([], trial.built.trained, engine, 1.0)
    trial.optimizer.step()
    engine.zero_gradients(trial.parameters)
    torch.cuda.synchronize()
    marks.append(time.perf_counter())
    return tuple(b - a for a, b in zip(marks[:-1], marks[1:], strict=True))


def _sizes(plan: Plan) -> Sizes:
    config, length = plan.recipe.model.config, plan.recipe.data.sequence_length
    assert config is not None
    return Sizes(
        tokens=plan.batch.micro_size * length, length=length, hidden=config["hidden_size"],
        inner=config["intermediate_size"], layers=config["num_hidden_layers"], vocab=config["vocab_size"],
    )  # fmt: skip


def _kernels(found: dict[str, Class]) -> str:
    """The longest, by name."""
    every = Counter({(k, name): ms for name, each in found.items() for k, ms in each.kernels.items()})
    return "\n".join(f"{ms:9.2f} ms  {name:<30} {kernel}" for (kernel, name), ms in every.most_common(40))


if __name__ == "__main__":
    main()
