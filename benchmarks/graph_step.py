"""What CUDA graphs are worth: steps of Llama-2-7B's shape with passes recorded and replayed, and launched as ever.

    python benchmarks/graph_step.py --out FILE [--cases lora map dora] [--micro 4 8] [--override KEY=VALUE ...]

One GPU, one process. The base is built once; each method's adapters are put over it as in adapters_7b.py, trained
for some steps plainly, set back, and trained again with passes recorded. A row a case and micro batch: seconds of
both, their ratio, kernels and busy time by the profiler, peak memory, how long recording took, and the largest
difference of the losses. Exit code 1 where something could not be recorded, or losses differ by more than 1 %.
Not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adapters_7b import LATE, Bench, kernels  # first: it sets the allocator's environment

import torch  # isort: skip
from scoreboard_cases import cases
from torch import Tensor
from trial import random_batch

from decompft.adapters.copies import round_factors
from decompft.adapters.inject import adapters
from decompft.launcher.worker.build import DTYPES
from decompft.launcher.worker.engines.choose import make_engine
from decompft.launcher.worker.graph_recorder import CudaRecorder
from decompft.launcher.worker.optimizer import clip_gradients, make_optimizer
from decompft.launcher.worker.pulse import Pulse
from decompft.launcher.worker.recorded import Passes, PlainPasses, RecordedPasses

CASES = ["lora", "map", "dora", "adalora", "delora", "liera"]
MAX_DIFFERENCE = 0.01


def main(argv: Sequence[str] | None = None, *, recorder: Callable[..., Any] | None = None) -> int:
    """`recorder(model)`: instead of CUDA's, in a test."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", default=CASES)
    parser.add_argument("--micro", nargs="*", type=int, default=[4, 8])
    parser.add_argument("--steps", type=int, default=8, help="measured, after two")
    parser.add_argument("--override", nargs="*", default=[], help="KEY=VALUE of the recipe")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    bench, named, rows = Bench(args.override), {case.name: case for case in cases()}, []
    for name in args.cases:
        for micro in args.micro:
            bench.swap(named[name])
            row = {"case": name, "micro_batch": micro} | compare(bench, micro, args.steps, recorder)
            rows.append(row)
            print(line(row), flush=True)
            args.out.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    return int(any(row["said"] or row["loss_difference"] > MAX_DIFFERENCE for row in rows))


def line(row: dict[str, Any]) -> str:
    plain, recorded = row["plain"], row["recorded"]
    text = f"{row['case']} x {row['micro_batch']}: {1000 * plain['step_s']:.0f} ms plain, "
    text += f"{1000 * recorded['step_s']:.0f} ms recorded, ratio {row['recorded_over_plain']:.3f}"
    if "launches" in plain:
        text += f"; {plain['launches']} kernels, busy {1000 * plain['gpu_busy_s']:.0f} ms"
    return text + "".join(f"; {said}" for said in row["said"])


def compare(bench: Bench, micro: int, steps: int, recorder: Callable[..., Any] | None) -> dict[str, Any]:
    """Steps of the adapters that are in place, plainly and then recorded, from the same values."""
    trained = {n: p for n, p in bench.model.named_parameters() if p.requires_grad}
    start = [p.detach().clone() for p in trained.values()]
    said: list[str] = []

    def plain() -> Passes:
        return PlainPasses(bench.model, bench.engine, Pulse())

    def recorded() -> Passes:
        made = CudaRecorder(bench.engine.device) if recorder is None else recorder(bench.model)
        return RecordedPasses(
            bench.model, bench.engine, list(trained.values()), made, pulse=Pulse(), say=said.append,
            is_demanded=False, pad_multiple=8,
        )  # fmt: skip

    found: dict[str, Any] = {}
    for kind, make in (("plain", plain), ("recorded", recorded)):
        bench.engine = make_engine(bench.plan)  # one that drops gradients, until it is told to keep them
        for parameter, value in zip(trained.values(), start, strict=True):
            parameter.grad = None
            parameter.data.copy_(value)
        found[kind] = train(bench, make(), trained, micro, steps)
    losses = zip(found["plain"]["losses"], found["recorded"]["losses"], strict=True)
    return found | {
        "recorded_over_plain": found["recorded"]["step_s"] / found["plain"]["step_s"],
        "loss_difference": max(abs(b / a - 1) for a, b in losses),
        "recording": [s for s in said if s.startswith("recorded ")],
        "said": [s for s in said if not s.startswith("recorded ")],
        "device": torch.cuda.get_device_name() if bench.on_gpu else "cpu",
    }


def train(bench: Bench, passes: Passes, trained: dict[str, Tensor], micro: int, steps: int) -> dict[str, Any]:
    recipe, layers = bench.plan.recipe, list(adapters(bench.model))
    optimizer = make_optimizer(bench.model, trained, recipe.train, bench.engine)
    batch = random_batch(micro, recipe.data.sequence_length)
    rounded = round_factors(bench.model.model, DTYPES[recipe.quantization.activations])

    def step(number: int) -> float:
        for _, adapter in layers:
            adapter.on_step(LATE + number)
        rounded.refresh()
        passes.begin_step()
        loss = passes.run(batch, batch.num_targets)
        rounded.drop()
        clip_gradients(layers, trained, bench.engine, recipe.train.max_grad_norm)
        optimizer.step()
        bench.engine.zero_gradients(list(trained.values()))
        return loss.item()

    if bench.on_gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for number in range(2 + steps):
        began = time.perf_counter()
        losses.append(step(number))
        if bench.on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    found = {
        "step_s": statistics.median(seconds[2:]), "steps_s": [round(s, 5) for s in seconds], "losses": losses,
        "peak_bytes": torch.cuda.max_memory_allocated() if bench.on_gpu else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if bench.on_gpu else None,
    }  # fmt: skip
    return found | (kernels(lambda: step(2 + steps)) if bench.on_gpu else {})


if __name__ == "__main__":
    sys.exit(main())
