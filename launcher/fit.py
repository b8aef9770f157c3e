"""Does a layout fit into memory, and if not, which smallest change would make it fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from decompft.launcher.forecast import Layout, Workload, forecast, quantized

GIB = 1 << 30
# how many ranks are tried before the answer is a smaller model
MAX_RANKS = 1024


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Memory of a rank; None is unknown, which everything fits."""

    HEADROOM: ClassVar[float] = 0.03  # part kept free when there is a choice: forecasts err

    device_bytes: int | None
    host_bytes: int | None  # beside a GPU: the rank's part of the node


def fits(work: Workload, layout: Layout, budget: Budget, *, headroom: float = Budget.HEADROOM) -> bool:
    memory = forecast(work, layout, capacity_bytes=budget.device_bytes, host_capacity_bytes=budget.host_bytes)
    pairs = [(memory.total_bytes, budget.device_bytes)]
    if layout.device == "cuda":
        pairs.append((memory.host_total_bytes, budget.host_bytes))
    return all(limit is None or need <= limit * (1 - headroom) for need, limit in pairs)


def cheaper_changes(work: Workload, layout: Layout, budget: Budget) -> str:
    """The smallest change that fits, in words: each alone first, then one on top of the other."""
    alone = ((say, change(work, layout)) for say, change in _CHANGES)
    for say, changed in alone:
        if changed and fits(*changed, budget):
            return f"smallest change that fits: {say} ({_needs(*changed)})"
    said: list[str] = []
    now = (work, layout)
    for say, change in _CHANGES:
        changed = change(*now)
        if changed:
            now, said = changed, [*said, say]
            if fits(*now, budget):
                return f"these together fit: {', '.join(said)} ({_needs(*now)})"
    rows = work.recipe.train.global_batch_size
    for ranks in range(layout.world_size + 1, min(rows, MAX_RANKS) + 1):
        more = replace(now[1], world_size=ranks, strategy="fsdp")
        if rows % ranks == 0 and fits(now[0], more, budget):
            also = ", ".join(dict.fromkeys([*said, "parallel.strategy: fsdp"]))
            return f"{ranks} ranks fit, with {also} ({_needs(now[0], more)})"
    where = "; a recipe for GPUs elsewhere states parallel.gpu_memory_gib" if layout.device == "cpu" else ""
    return f"no setting fits: take a smaller model, a shorter data.sequence_length, or larger devices{where}"


def gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / (1 << 20):.1f} MiB"


Changed = tuple[Workload, Layout] | None


def _recompute(work: Workload, layout: Layout) -> Changed:
    return None if layout.recompute == "full" else (work, replace(layout, recompute="full"))


def _micro_one(work: Workload, layout: Layout) -> Changed:
    return None if layout.micro_size == 1 else (work, replace(layout, micro_size=1))


def _nf4(work: Workload, layout: Layout) -> Changed:
    if work.recipe.quantization.format == "nf4":
        return None
    quantization = work.recipe.quantization.model_copy(update={"format": "nf4"})
    recipe = work.recipe.model_copy(update={"quantization": quantization})
    if any(x.in_ % quantization.block_size for x in quantized(work.shape, recipe)):
        return None
    return replace(work, recipe=recipe), layout


def _fsdp(work: Workload, layout: Layout) -> Changed:
    if layout.strategy == "fsdp" or layout.world_size == 1:
        return None
    return work, replace(layout, strategy="fsdp")


def _offload(work: Workload, layout: Layout) -> Changed:
    if layout.cpu_offload or layout.device == "cpu":
        return None
    return work, replace(layout, strategy="fsdp", cpu_offload=True)


_CHANGES: tuple[tuple[str, Callable[[Workload, Layout], Changed]], ...] = (
    ("train.recompute: full", _recompute),
    ("train.micro_batch_size: 1", _micro_one),
    ("quantization.format: nf4", _nf4),
    ("parallel.strategy: fsdp", _fsdp),
    ("parallel.strategy: fsdp with cpu_offload: true", _offload),
)


def _needs(work: Workload, layout: Layout) -> str:
    return f"{gib(forecast(work, layout, capacity_bytes=None).total_bytes)} a rank"
