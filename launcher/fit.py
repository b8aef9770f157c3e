"""Does a layout fit into memory, and if not, which smallest change would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from decompft.adapters.formats import FORMAT_SPECS
from decompft.launcher.forecast import forecast
from decompft.launcher.layers import forbidden_engines
from decompft.launcher.recompute import BY_PIECES, MODES, Recompute, pieces_of
from decompft.launcher.refusals import fits_blocks
from decompft.launcher.strategies import Strategy
from decompft.launcher.workload import Layout, Workload

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
    if layout.recompute == "offloaded" and work.recipe.train.recompute == "auto":
        # auto's last resort takes from the host what a change may need there
        layout = replace(layout, recompute="full")
    for change in _CHANGES:
        changed = change(work, layout)
        if changed and fits(changed.work, changed.layout, budget):
            return f"smallest change that fits: {changed.key}: {changed.value} ({_needs(changed)})"
    together = _least_together(work, layout, budget)
    if together:
        said, changed = together
        return f"these together fit: {_listed(said)} ({_needs(changed)})"
    rows, sharded = work.recipe.train.global_batch_size, _sharded(work, layout)
    for ranks in range(layout.world_size + 1, min(rows, MAX_RANKS) + 1):
        if sharded is None or rows % ranks:
            continue
        more = replace(
            layout,
            world_size=ranks,
            strategy=sharded,
            group_size=None,
            # auto's last rung offloads unasked; more ranks may do without
            cpu_offload=work.recipe.parallel.cpu_offload,
        )
        together = _least_together(work, more, budget)
        if together:
            said, changed = together
            also = _listed({"parallel.strategy": sharded} | said)
            return f"{ranks} ranks fit, with {also} ({_needs(changed)})"
    where = "; a recipe for GPUs elsewhere states parallel.gpu_memory_gib" if layout.device == "cpu" else ""
    return f"no setting fits: take a smaller model, a shorter data.sequence_length, or larger devices{where}"


def gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / (1 << 20):.1f} MiB"


@dataclass(frozen=True)
class _Changed:
    """A key of the recipe with another value, and what comes of it."""

    key: str
    value: str
    work: Workload
    layout: Layout


def _norms(work: Workload, layout: Layout) -> _Changed | None:
    return _mode(work, layout, "norms")


def _selective(work: Workload, layout: Layout) -> _Changed | None:
    if layout.recompute_blocks is not None:
        return _Changed("train.recompute_blocks", "null", work, replace(layout, recompute_blocks=None))
    return _mode(work, layout, "selective")


def _full(work: Workload, layout: Layout) -> _Changed | None:
    return _mode(work, layout, "full")


def _offloaded(work: Workload, layout: Layout) -> _Changed | None:
    return _mode(work, layout, "offloaded") if layout.device == "cuda" else None


def _mode(work: Workload, layout: Layout, mode: Recompute) -> _Changed | None:
    if MODES.index(mode) <= MODES.index(layout.recompute):
        return None
    if mode in BY_PIECES and pieces_of(work.shape.model_type) is None:
        return None
    return _Changed("train.recompute", mode, work, replace(layout, recompute=mode, recompute_blocks=None))


def _micro_one(work: Workload, layout: Layout) -> _Changed | None:
    if layout.micro_size == 1:
        return None
    return _Changed("train.micro_batch_size", "1", work, replace(layout, micro_size=1))


def _int8(work: Workload, layout: Layout) -> _Changed | None:
    # one byte a weight is nearer to a dense base than half of one
    is_dense = not FORMAT_SPECS[work.recipe.quantization.format].is_quantized
    return _format(work, layout, "int8") if is_dense else None


def _nf4(work: Workload, layout: Layout) -> _Changed | None:
    has_blocks = FORMAT_SPECS[work.recipe.quantization.format].has_blocks  # half a byte already
    return None if has_blocks else _format(work, layout, "nf4")


def _format(work: Workload, layout: Layout, name: str) -> _Changed | None:
    given = work.recipe.quantization
    quantization = given.model_copy(update={"format": name, "outlier_threshold": 0.0})
    recipe = work.recipe.model_copy(update={"quantization": quantization})
    if not fits_blocks(work.shape, recipe):
        return None
    return _Changed("quantization.format", name, replace(work, recipe=recipe), layout)


def _shard_all(work: Workload, layout: Layout) -> _Changed | None:
    name = _sharded(work, layout)
    if name is None or layout.shard_size == layout.world_size:
        return None
    return _Changed("parallel.strategy", name, work, replace(layout, strategy=name, group_size=None))


def _offload(work: Workload, layout: Layout) -> _Changed | None:
    if layout.cpu_offload or layout.device == "cpu":
        return None
    if layout.spec.may_offload:
        return _Changed("parallel.cpu_offload", "true", work, replace(layout, cpu_offload=True))
    name = _sharded(work, layout)
    if name is None:
        return None
    away = replace(layout, strategy=name, group_size=None, cpu_offload=True)
    return _Changed("parallel.strategy", f"{name} with cpu_offload: true", work, away)


def _sharded(work: Workload, layout: Layout) -> Strategy | None:
    """What cuts everything over all ranks, of the library that was asked for, if the adapter runs under it."""
    name: Strategy = "zero3" if layout.spec.is_deepspeed else "fsdp"
    return None if name in forbidden_engines(work.recipe.adapter) else name


_Change = Callable[[Workload, Layout], _Changed | None]
_CHANGES: tuple[_Change, ...] = (
    _norms, _selective, _full, _micro_one, _offloaded, _int8, _nf4, _shard_all, _offload,
)  # fmt: skip


def _least_together(work: Workload, layout: Layout, budget: Budget) -> tuple[dict[str, str], _Changed] | None:
    """Changes of which none can be left out, and what comes of them; None where even all do not fit."""
    rows = work.recipe.train.global_batch_size

    def made(changes: Sequence[_Change]) -> tuple[dict[str, str], _Changed]:
        said: dict[str, str] = {}  # a later value of a key replaces an earlier one
        now = _Changed("", "", work, layout)
        for change in changes:
            changed = change(now.work, now.layout)
            if changed:
                now, said[changed.key] = changed, changed.value
        return said, now

    def works(changes: Sequence[_Change]) -> bool:
        now = made(changes)[1]
        # with more ranks a micro batch that was stated may break the batch law
        is_even = rows % (now.layout.world_size * now.layout.micro_size) == 0
        return is_even and fits(now.work, now.layout, budget)

    frugal = [
        x for x in _CHANGES if x is not _offloaded
    ]  # which needs of the host what others may need there
    kept = next((x for x in (frugal, list(_CHANGES)) if works(x)), None)
    if kept is None:
        return None
    for change in reversed(_CHANGES):  # the largest is dropped first
        fewer = [x for x in kept if x is not change]
        kept = fewer if works(fewer) else kept
    return made(kept)


def _listed(said: Mapping[str, str]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in said.items())


def _needs(changed: _Changed) -> str:
    memory = forecast(changed.work, changed.layout, capacity_bytes=None)
    device = gib(memory.total_bytes)
    if not changed.layout.cpu_offload and changed.layout.recompute != "offloaded":
        return f"{device} a rank"
    return f"{device} a rank, and of the host {gib(memory.host_total_bytes)} a rank"
