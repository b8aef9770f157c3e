"""What a run says when it ends: measured peak memory beside the forecast."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from decompft.launcher.plan import Plan
from decompft.launcher.worker.engines.base import Engine

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Bytes of the fullest rank, since its process began."""

    measured: int  # GPU: reserved by the allocator and held by the driver; CPU: resident
    allocated: int | None  # GPU only: in tensors
    forecast: int

    def line(self) -> str:
        off = 100 * (self.forecast / self.measured - 1)
        text = f"peak memory of the fullest rank: {self.measured / GIB:.2f} GiB measured, "
        text += f"{self.forecast / GIB:.2f} GiB forecast ({off:+.1f} %)"
        return text if self.allocated is None else f"{text}; {self.allocated / GIB:.2f} GiB in tensors"


def peak_memory(plan: Plan, engine: Engine) -> PeakMemory:
    """Measure; a collective, so every rank calls it."""
    allocated = None
    measured = peak_bytes(engine.device)
    if engine.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(engine.device)
        # what the driver holds beyond the allocator: context, cuBLAS, NCCL
        measured += total - free - torch.cuda.memory_reserved(engine.device)
        allocated = int(engine.max_rank(torch.cuda.max_memory_allocated(engine.device)))
    return PeakMemory(
        measured=int(engine.max_rank(measured)), allocated=allocated, forecast=plan.forecast.total_bytes
    )


def peak_bytes(device: torch.device) -> int:
    """Of this rank: reserved on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    # the kernel's own high-water mark; ru_maxrss would inherit the parent's over fork and exec
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
