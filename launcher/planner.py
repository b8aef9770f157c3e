"""How a recipe becomes a plan: everything it leaves open is decided here, by forecast.

The ladder of `strategy: auto` goes from the fastest to the most frugal: ddp, ddp with
recomputation, fsdp, fsdp with recomputation, fsdp with offload. The first rung that fits is taken.
"""

from __future__ import annotations

from decompft.adapters.spec import ADAPTER_SPECS
from decompft.launcher.epochs import steps_per_epoch
from decompft.launcher.errors import PlanError
from decompft.launcher.families import shape_of
from decompft.launcher.fit import GIB, Budget, cheaper_changes, fits, gib
from decompft.launcher.forecast import (
    Layout,
    Recompute,
    Workload,
    forecast,
    known_speed,
    quantized,
    time_forecast,
    workload,
)
from decompft.launcher.machine import Machine, detect
from decompft.launcher.model_source import find_config
from decompft.launcher.models import LAYER, ModelShape
from decompft.launcher.plan import Batch, Device, Plan, Strategy, World
from decompft.launcher.plan import to_json as to_json
from decompft.launcher.recipe import Recipe

# families whose positions are rows of a weight: there is none beyond the last
LEARNED_POSITIONS = ("gpt2", "bert")

# rows of a micro batch on a CPU: more gain no speed there
MAX_CPU_MICRO = 8

Rung = tuple[Strategy, Recompute, bool]  # and cpu_offload


def make(recipe: Recipe, *, machine: Machine | None = None) -> Plan:
    """Decide everything that the recipe leaves open.

    Args:
        machine: one node; default this one.

    Raises:
        ModelError: the model's shape cannot be read.
        AdapterError: a target matches nothing.
        PlanError: batch, world size, rank or memory cannot work; the hint says what would.
    """
    machine = machine or detect()
    found = find_config(recipe)
    shape = shape_of(found.config, recipe.model.task, recipe.model.num_labels)
    work = workload(shape, recipe)
    _check_adapter(work)
    world, warnings = _world(recipe, machine)
    budget = _budget(recipe, machine, world)
    layout, reason = _choose(work, world, budget)
    memory = forecast(work, layout, capacity_bytes=budget.device_bytes, host_capacity_bytes=budget.host_bytes)
    plan = Plan(
        name=recipe.name or "run",
        recipe=recipe,
        shape_source=found.source,
        model_dir=str(found.model_dir) if found.model_dir else None,
        base_config=found.config,
        world=world,
        strategy=layout.strategy,
        strategy_reason=reason,
        cpu_offload=layout.cpu_offload,
        recompute=layout.recompute,
        batch=_batch(recipe, world, layout.micro_size),
        num_base_params=shape.num_params,
        num_adapter_params=work.num_adapter_params,
        num_module_params=work.num_module_params,
        forecast=memory,
        steps_per_epoch=steps_per_epoch(recipe),
        warnings=(*warnings, *_warnings(shape, recipe, budget, work, layout)),
    )
    speed = known_speed(work, layout, machine.gpu_name)
    return plan.model_copy(update={"seconds_per_step": time_forecast(plan, speed)}) if speed else plan


def show(plan: Plan) -> None:
    """Print the plan for a reader; tables and colours on a terminal only."""
    from decompft.launcher.plan_view import show as show_plan

    show_plan(plan)


def _world(recipe: Recipe, machine: Machine) -> tuple[World, list[str]]:
    parallel = recipe.parallel
    device: Device = machine.device
    warnings = []
    if device == "cpu" and parallel.gpu_memory_gib != "auto" and not machine.is_cpu_forced:
        # a login node plans for the nodes that have the GPUs the recipe speaks of
        device = "cuda"
        warnings.append(
            f"this machine has no GPU; planned for GPUs of {parallel.gpu_memory_gib:g} GiB "
            "(parallel.gpu_memory_gib)"
        )
    if parallel.gpus_per_node == "auto":
        ranks = max(1, machine.num_gpus)
    else:
        ranks = parallel.gpus_per_node
        if machine.num_gpus and ranks > machine.num_gpus and parallel.nodes == 1:
            warnings.append(f"parallel.gpus_per_node is {ranks}, this machine has {machine.num_gpus}")
    return World(nodes=parallel.nodes, ranks_per_node=ranks, device=device), warnings


def _budget(recipe: Recipe, machine: Machine, world: World) -> Budget:
    host = machine.host_memory_bytes and machine.host_memory_bytes // world.ranks_per_node
    stated = recipe.parallel.gpu_memory_gib
    if stated != "auto":
        device: int | None = int(stated * GIB)
    else:
        device = machine.gpu_memory_bytes if world.device == "cuda" else host
    # a login node's own memory says nothing of the nodes that will run this
    is_here = world.device == machine.device
    return Budget(device_bytes=device, host_bytes=host if is_here else None)


def _rungs(recipe: Recipe, world: World) -> list[Rung]:
    """Layouts to try, fastest first, that the recipe's own choices leave."""
    parallel, wanted = recipe.parallel, recipe.train.recompute
    if parallel.strategy == "single" and world.size > 1:
        raise PlanError(
            f"parallel.strategy: single is one rank, but the world has {world.size} "
            f"({world.nodes} nodes x {world.ranks_per_node})",
            "use strategy auto, ddp or fsdp, or nodes: 1 with gpus_per_node: 1",
        )
    modes: list[Recompute] = ["none", "full"] if wanted == "auto" else [wanted]
    if parallel.strategy != "auto":
        chosen: list[tuple[Strategy, bool]] = [(parallel.strategy, parallel.cpu_offload)]
    elif parallel.cpu_offload:
        chosen = [("fsdp", True)]
    elif world.size == 1:
        chosen = [("single", False)]
    else:
        # offload hides only a GPU's shortage: on a CPU both are the same memory
        chosen = [("ddp", False), ("fsdp", False)]
        if world.device == "cuda":
            chosen.append(("fsdp", True))
    forbidden = ADAPTER_SPECS[recipe.adapter.method].forbids_engines
    allowed = [(s, offload) for s, offload in chosen if s not in forbidden]
    if not allowed:
        raise PlanError(
            f"adapter.method: {recipe.adapter.method} does not run under {chosen[0][0]}",
            f"it is refused under: {', '.join(forbidden)}",
        )
    return [(strategy, mode, offload) for strategy, offload in allowed for mode in modes]


def _choose(work: Workload, world: World, budget: Budget) -> tuple[Layout, str]:
    """The first rung that fits, with the largest micro batch that fits on it, and why."""
    micros = _micro_sizes(work.recipe, world)
    layouts = [
        Layout(
            device=world.device,
            strategy=strategy,
            world_size=world.size,
            micro_size=micro,
            recompute=mode,
            cpu_offload=offload,
        )
        for strategy, mode, offload in _rungs(work.recipe, world)
        for micro in micros
    ]
    chosen = next((x for x in layouts if fits(work, x, budget)), None)
    if chosen is None:
        # nothing has room to spare; what fits on paper runs, with a warning
        chosen = next((x for x in layouts if fits(work, x, budget, headroom=0.0)), None)
    if chosen is None:
        smallest = layouts[-1]
        raise PlanError(_too_large(work, smallest, budget), cheaper_changes(work, smallest, budget))
    return chosen, _reason(work, layouts, chosen, budget)


def _reason(work: Workload, layouts: list[Layout], chosen: Layout, budget: Budget) -> str:
    def need(layout: Layout) -> str:
        return gib(forecast(work, layout, capacity_bytes=None).total_bytes)

    ranks = "one rank" if chosen.world_size == 1 else f"{chosen.world_size} ranks"
    if budget.device_bytes is None:
        return f"{_title(chosen)}: {ranks}, {need(chosen)} each; the memory of a device is unknown"
    text = f"{_title(chosen)}: {ranks}, {need(chosen)} of {gib(budget.device_bytes)} each"
    faster = [x for x in layouts[: layouts.index(chosen)] if _title(x) != _title(chosen)]
    if faster:
        text += f"; {_title(faster[-1])} would need {need(faster[-1])} at micro batch {faster[-1].micro_size}"
    return text


def _title(layout: Layout) -> str:
    extras = ["recomputation"] * (layout.recompute == "full") + ["offload"] * layout.cpu_offload
    return layout.strategy + (" with " + " and ".join(extras) if extras else "")


def _too_large(work: Workload, layout: Layout, budget: Budget) -> str:
    memory = forecast(work, layout, capacity_bytes=budget.device_bytes, host_capacity_bytes=budget.host_bytes)
    where = "this machine's memory" if layout.device == "cpu" else "the device"
    if budget.device_bytes is not None and memory.total_bytes > budget.device_bytes:
        has, needs, terms = budget.device_bytes, memory.total_bytes, memory.terms
    else:
        assert budget.host_bytes is not None, budget
        where, has, needs, terms = "the host", budget.host_bytes, memory.host_total_bytes, memory.host_terms
    largest = sorted(terms, key=lambda t: -t.num_bytes)[:2]
    shares = ", ".join(f"{t.name} {gib(t.num_bytes)}" for t in largest)
    return (
        f"memory: {_title(layout)} at micro batch {layout.micro_size} needs {gib(needs)} a rank, "
        f"{where} has {gib(has)} (largest: {shares})"
    )


def _micro_sizes(recipe: Recipe, world: World) -> list[int]:
    """Micro batch sizes that keep the batch law, largest first.

    Raises:
        PlanError: none does.
    """
    total, micro = recipe.train.global_batch_size, recipe.train.micro_batch_size
    step = world.size * (1 if micro == "auto" else micro)
    if total % step:
        law = f"a multiple of {world.size} ranks"
        if micro != "auto":
            law = f"micro_batch_size {micro} x accumulation x {world.size} ranks"
        below, above = total // step * step, -(-total // step) * step
        near = f"{below} or {above}" if below else f"{above}"
        raise PlanError(
            f"train.global_batch_size: {total} is not {law}",
            f"the nearest that work: {near}" + ("" if micro == "auto" else "; or micro_batch_size: auto"),
        )
    if micro != "auto":
        return [micro]
    rows = total // world.size
    sizes = [n for n in range(rows, 0, -1) if rows % n == 0]
    if world.device == "cpu":
        return [n for n in sizes if n <= MAX_CPU_MICRO]
    # kernels like few odd factors: 2^k and 3 x 2^k
    return [n for n in sizes if n // (n & -n) in (1, 3)]


def _batch(recipe: Recipe, world: World, micro: int) -> Batch:
    total = recipe.train.global_batch_size
    return Batch(
        global_size=total,
        micro_size=micro,
        accumulation=total // (micro * world.size),
        tokens_per_step=total * recipe.data.sequence_length,
    )


def _check_adapter(work: Workload) -> None:
    recipe, rank = work.recipe, work.recipe.adapter.rank
    name, out, in_ = min(work.adapted, key=lambda x: min(x[1], x[2]))
    last = name.rpartition(".")[2]
    if rank > min(out, in_):
        raise PlanError(
            f"adapter.rank: {rank} is larger than the smallest target ({min(out, in_)}, {name})",
            f"use rank <= {min(out, in_)}, or leave {last} out of adapter.targets",
        )
    size = recipe.quantization.block_size
    for x in quantized(work.shape, recipe):
        if x.in_ % size:
            other = next((s for s in (64, 128) if s != size and x.in_ % s == 0), None)
            raise PlanError(
                f"quantization.block_size: {x.name.replace(LAYER, '*')} is {x.in_} wide, "
                f"not a multiple of {size}",
                (f"use quantization.block_size: {other}" if other else "use quantization.format: none")
                + "; all linear layers are quantized, whatever adapter.targets names",
            )


def _warnings(shape: ModelShape, recipe: Recipe, budget: Budget, work: Workload, layout: Layout) -> list[str]:
    found = []
    length = recipe.data.sequence_length
    if length > shape.max_positions and shape.model_type in LEARNED_POSITIONS:
        raise PlanError(
            f"data.sequence_length {length} is longer than the {shape.max_positions} positions that "
            f"this {shape.model_type} has weights for",
            f"use data.sequence_length <= {shape.max_positions}",
        )
    if length > shape.max_positions:
        found.append(
            f"data.sequence_length {length} is longer than the {shape.max_positions} positions "
            "the model was made for"
        )
    if budget.device_bytes is None:
        found.append(
            "the memory of a device is unknown: whether it fits was not checked "
            "(state parallel.gpu_memory_gib)"
        )
    elif not fits(work, layout, budget):
        found.append(
            f"the forecast leaves less than {Budget.HEADROOM:.0%} of the memory free; "
            "if it runs out, lower train.micro_batch_size"
        )
    if layout.cpu_offload and not recipe.parallel.cpu_offload:
        found.append("shards are kept in host memory, which is slow; more or larger GPUs avoid it")
    return found
