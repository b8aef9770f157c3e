"""What a run says when it ends: measured peak memory beside the forecast."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from decompft.launcher.plan import Plan
from decompft.launcher.worker.engines.base import Engine

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Bytes of the fullest rank, since its process began, each beside its forecast."""

    measured: int  # GPU: reserved by the allocator and held by the driver; CPU: resident
    forecast: int
    allocated: int | None = None  # GPU only: in tensors
    allocated_forecast: int | None = None
    host: int | None = None  # GPU only: resident on the host, mapped file pages included
    host_forecast: int | None = None

    def line(self) -> str:
        text = f"peak memory of the fullest rank: {_beside(self.measured, self.forecast)}"
        if self.allocated is not None and self.allocated_forecast is not None:
            text += f"; in tensors {_beside(self.allocated, self.allocated_forecast)}"
        if self.host is not None and self.host_forecast is not None:
            text += f"; on the host {_beside(self.host, self.host_forecast)}"
        return text


def peak_memory(plan: Plan, engine: Engine) -> PeakMemory:
    """Measure; a collective, so every rank calls it."""
    memory, measured = plan.forecast, peak_bytes(engine.device)
    if engine.device.type == "cpu":
        return PeakMemory(measured=int(engine.max_rank(measured)), forecast=memory.total_bytes)
    free, total = torch.cuda.mem_get_info(engine.device)
    # what the driver holds beyond the allocator: context, cuBLAS, NCCL
    measured += total - free - torch.cuda.memory_reserved(engine.device)
    return PeakMemory(
        measured=int(engine.max_rank(measured)),
        forecast=memory.total_bytes,
        allocated=int(engine.max_rank(torch.cuda.max_memory_allocated(engine.device))),
        allocated_forecast=memory.allocated_bytes,
        host=int(engine.max_rank(_resident_peak())),
        host_forecast=memory.host_total_bytes,
    )


def peak_bytes(device: torch.device) -> int:
    """Of this rank: reserved on a GPU, resident on a CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else _resident_peak()


def _resident_peak() -> int:
    # the kernel's own high-water mark; ru_maxrss would inherit the parent's over fork and exec
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def _beside(measured: int, forecast: int) -> str:
    off = 100 * (forecast / measured - 1)
    return f"{measured / GIB:.2f} GiB measured, {forecast / GIB:.2f} GiB forecast ({off:+.1f} %)"
