"""Where does the GPU wait in the steps of a run, as a user starts it? One GPU, a minute.

python benchmarks/step_gaps.py [KEY=VALUE ...]

The recipe is llama7b_shape.yaml's. Of a few steps of the training loop, the GPU's work alone is traced; printed are the
time between its kernels by length, and the longest waits of a step with the kernels before and after them.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_7b import RECIPE, WORK, write_text
from reordered import prepared_rank
from torch.profiler import ProfilerActivity, profile

from decompft.launcher.worker.data.ahead import Ahead
from decompft.launcher.worker.main import run_rank

FIRST, LAST = 10, 14  # steps [FIRST, LAST) are traced
LONGEST = 12


@dataclass(frozen=True, kw_only=True)
class Kernel:
    name: str
    begin: float  # ms
    end: float


def main() -> None:
    WORK.mkdir(exist_ok=True)
    write_text(WORK / "random.jsonl", num_records=200)
    fixed = ["parallel.strategy=single", "parallel.gpus_per_node=1", f"train.max_steps={LAST + 2}"]
    folder = Path(tempfile.mkdtemp(prefix="gaps-")) / "run"
    rank = prepared_rank(RECIPE, folder, [*fixed, *sys.argv[1:]])
    trace = profile(activities=[ProfilerActivity.CUDA])
    original = Ahead.step

    def watched(self: Ahead, step: int) -> Any:
        if step == FIRST:
            trace.start()
        if step == LAST:
            torch.cuda.synchronize()
            trace.stop()
        return original(self, step)

    Ahead.step = watched  # type: ignore[method-assign]
    run_rank(rank)
    say(sys.argv[1:], kernels(trace))


def kernels(trace: Any) -> list[Kernel]:
    found = [
        Kernel(name=e.name, begin=e.time_range.start / 1000, end=e.time_range.end / 1000)
        for e in trace.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    ]
    return sorted(found, key=lambda k: k.begin)


def say(asked: list[str], found: list[Kernel]) -> None:
    steps = LAST - FIRST
    gaps: list[tuple[float, Kernel, Kernel]] = []
    last = found[0]  # that ends last, of those so far
    for kernel in found[1:]:
        if kernel.begin > last.end:
            gaps.append((kernel.begin - last.end, last, kernel))
        last = max(last, kernel, key=lambda k: k.end)
    whole = last.end - found[0].begin
    busy = whole - sum(g for g, *_ in gaps)
    print(
        f"{' '.join(asked)}: {whole / steps:.1f} ms a step, busy {busy / steps:.1f}, {len(found) // steps} kernels"
    )
    for low, high in ((0, 0.002), (0.002, 0.005), (0.005, 0.02), (0.02, 0.1), (0.1, 1), (1, 1e9)):
        within = [g for g, *_ in gaps if low <= g < high]
        print(
            f"  waits of {low} to {high} ms: {len(within) / steps:8.1f} a step, {sum(within) / steps:7.2f} ms"
        )
    for gap, before, after in sorted(gaps, key=lambda g: -g[0])[: LONGEST * steps : steps]:
        print(f"  {gap:7.3f} ms between {before.name[:60]} and {after.name[:60]}")
    print(f"  a kernel lasts {1000 * statistics.median(k.end - k.begin for k in found):.1f} us in the median")


if __name__ == "__main__":
    main()
