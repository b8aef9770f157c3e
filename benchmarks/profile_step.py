"""Where the time of one step goes, by kernel: python benchmarks/profile_step.py [KEY=VALUE ...]"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from decompft.launcher.planner import make
from decompft.launcher.source import load
from decompft.launcher.worker.build import build
from decompft.launcher.worker.data.batches import collate
from decompft.launcher.worker.data.rows import Row
from decompft.launcher.worker.engines.choose import make_engine
from decompft.launcher.worker.optimizer import make_optimizer

RECIPE = Path(__file__).resolve().parent / "llama7b_shape.yaml"


def main() -> None:
    plan = make(load(RECIPE, sys.argv[1:]))
    recipe, engine = plan.recipe, make_engine(plan)
    built = build(
        recipe.model, recipe.quantization, recipe.adapter, engine,
        seed=0, model_dir=None, recompute=plan.recompute == "full",
    )  # fmt: skip
    optimizer = make_optimizer(built.model.model, built.trained, recipe.train, engine)
    engine.prepare_gradients(list(built.trained.values()))
    length = recipe.data.sequence_length
    draw = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(plan.batch.micro_size):
        tokens = torch.randint(0, 256, (length,), generator=draw, dtype=torch.int32).numpy()
        rows.append(Row(id=0, tokens=tokens, trained=tokens >= 0, doc_lengths=(length,)))
    batch = collate(rows, 0).to(engine.device)
    built.model.train()

    def step() -> None:
        (built.model(batch) / batch.num_targets).backward()
        optimizer.step()
        engine.zero_gradients(list(built.trained.values()))

    for _ in range(4):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        step()
        step()
        torch.cuda.synchronize()
    print(trace.key_averages().table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90))


if __name__ == "__main__":
    main()
