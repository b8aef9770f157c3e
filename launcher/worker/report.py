"""What a run says when it ends: measured peak memory beside the forecast."""

from __future__ import annotations

import torch

from decompft.launcher.plan import Plan
from decompft.launcher.worker.engines.base import Engine

GIB = 2**30


def closing_lines(plan: Plan, engine: Engine) -> list[str]:
    """Lines for the terminal; a collective: every rank calls it."""
    forecast = plan.forecast.total_bytes
    allocated: float | None = None
    if engine.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(engine.device)
        # what the driver holds for this process beyond the allocator: context, cuBLAS, NCCL
        outside = total - free - torch.cuda.memory_reserved(engine.device)
        peak = torch.cuda.max_memory_reserved(engine.device) + outside
        allocated = engine.max_rank(torch.cuda.max_memory_allocated(engine.device))
    else:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = int(engine.max_rank(peak))
    off = 100 * (forecast - peak) / peak
    line = f"peak memory of the fullest rank: {peak / GIB:.2f} GiB measured, {forecast / GIB:.2f} GiB forecast ({off:+.1f} %)"
    if allocated is not None:
        line += f"; {allocated / GIB:.2f} GiB allocated by tensors"
    return [line]
