"""How a recipe becomes a plan: everything it leaves open is decided here, by forecast.

The ladder of `strategy: auto` goes from the fastest to the most frugal: single on one rank, else
ddp; hsdp where there are several nodes; fsdp; with offload of the base to the host; each of them first
without recomputation, then with norms, selective, full and offloaded. The first rung that fits is taken. zero1
to zero3 are never taken unasked: they save what fsdp saves and start slower; they are for users whose
cluster is built around DeepSpeed.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

from decompft.launcher.attention import refuse_attention
from decompft.launcher.cuda_graph import decide_cuda_graph
from decompft.launcher.deepspeed_config import make_config
from decompft.launcher.epochs import steps_per_epoch
from decompft.launcher.errors import PlanError
from decompft.launcher.fit import GIB, Budget, cheaper_changes, fits, gib
from decompft.launcher.fitting import fit_to_model
from decompft.launcher.forecast import checkpoint_bytes, forecast
from decompft.launcher.fp8_layers import fp8_warnings, refuse_fp8
from decompft.launcher.layers import forbidden_engines
from decompft.launcher.machine import Machine, detect
from decompft.launcher.models import ModelShape
from decompft.launcher.plan import Batch, Device, Plan, World
from decompft.launcher.plan import to_json as to_json
from decompft.launcher.recipe import Recipe
from decompft.launcher.recompute import BY_PIECES, MODES, Recompute, pieces_of
from decompft.launcher.refusals import (
    absent_deepspeed,
    allowed_strategies,
    group_size,
    refuse_format,
    refuse_strategy,
    refuse_world,
)
from decompft.launcher.speed import save_pause_s, step_time
from decompft.launcher.strategies import STRATEGIES, Strategy
from decompft.launcher.workload import Layout, Workload

# rows of a micro batch on a CPU: more gain no speed there
MAX_CPU_MICRO = 8

FILLED = 0.05  # part of the memory kept free beside Budget.HEADROOM where auto fills it

Rung = tuple[Strategy, Recompute, bool]  # and cpu_offload
_TITLES: dict[Recompute, list[str]] = {
    "none": [],
    "norms": ["recomputation of norms"],
    "selective": ["selective recomputation"],
    "full": ["recomputation"],
    "offloaded": ["recomputation from the host"],
}


def make(recipe: Recipe, *, machine: Machine | None = None) -> Plan:
    """Decide everything that the recipe leaves open.

    Args:
        machine: one node; default this one.

    Raises:
        ModelError: the model's shape cannot be read.
        AdapterError: a target matches nothing.
        PlanError: batch, world size, rank, format, strategy or memory cannot work; the hint says what would.
    """
    machine = machine or detect()
    fitted = fit_to_model(recipe)
    recipe, shape = fitted.recipe, fitted.work.shape
    # what a laptop has installed says nothing of the GPUs it plans for
    work = replace(fitted.work, has_liger=machine.has_liger or machine.device == "cpu")
    world, warnings = _world(recipe, machine)
    refuse_world(recipe, world)
    refuse_format(recipe, machine, world)
    refuse_attention(recipe, fitted.found.config, head_dim=shape.head_dim, device=world.device)
    refuse_fp8(recipe, machine, world)
    budget = _budget(recipe, machine, world)
    layout, reason = _choose(work, world, budget)
    memory = forecast(work, layout, capacity_bytes=budget.device_bytes, host_capacity_bytes=budget.host_bytes)
    batch = _batch(recipe, world, layout.micro_size)
    cuda_graph, cuda_graph_reason = decide_cuda_graph(recipe, layout)
    deepspeed = None
    if layout.spec.is_deepspeed:
        deepspeed = make_config(
            recipe,
            strategy=layout.strategy,
            batch=batch,
            world_size=world.size,
            cpu_offload=layout.cpu_offload,
            hidden=shape.hidden,
        )
    plan = Plan(
        name=recipe.name or "run",
        recipe=recipe,
        shape_source=fitted.found.source,
        model_dir=str(fitted.found.model_dir) if fitted.found.model_dir else None,
        base_config=fitted.found.config,
        world=world,
        strategy=layout.strategy,
        strategy_reason=reason,
        shard_size=layout.shard_size,
        cpu_offload=layout.cpu_offload,
        deepspeed=deepspeed,
        recompute=layout.recompute,
        recompute_blocks=layout.recompute_blocks,
        cuda_graph=cuda_graph,
        cuda_graph_reason=cuda_graph_reason,
        batch=batch,
        num_base_params=shape.num_params,
        num_adapter_params=work.num_adapter_params,
        num_module_params=work.num_module_params + work.num_token_params,
        forecast=memory,
        checkpoint_bytes=checkpoint_bytes(work),
        steps_per_epoch=steps_per_epoch(recipe),
        warnings=(*fitted.warnings, *warnings, *_warnings(shape, recipe, budget, work, layout)),
    )
    time = step_time(work, layout, world, batch.accumulation, machine)
    if time is None:
        return plan
    known = {"seconds_per_step": time.seconds, "time": time, "save_pause_s": save_pause_s(work)}
    return plan.model_copy(update=known)


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
        if machine.num_gpus and ranks > machine.num_gpus and parallel.most_nodes == 1:
            warnings.append(f"parallel.gpus_per_node is {ranks}, this machine has {machine.num_gpus}")
    world = World(nodes=parallel.fewest_nodes, ranks_per_node=ranks, device=device)
    return world, warnings + fp8_warnings(recipe, world)


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


def _modes(recipe: Recipe, world: World, shape: ModelShape, strategy: Strategy) -> list[Recompute]:
    """Modes of recomputation to try, fastest first."""
    wanted = recipe.train.recompute
    known = pieces_of(shape.model_type) is not None
    if wanted != "auto":
        # full keeps less than was asked for: what was counted on to fit does
        return ["full" if wanted in BY_PIECES and not known else wanted]
    # a cut base is gathered for each micro batch, and full takes several times as many rows at once
    gathers_more = STRATEGIES[strategy].shards_base and recipe.train.micro_batch_size == "auto"
    # on a CPU the host is the device
    absent = [*BY_PIECES] * (gathers_more or not known) + ["offloaded"] * (world.device == "cpu")
    return [mode for mode in MODES if mode not in absent]


def _rungs(recipe: Recipe, world: World, shape: ModelShape) -> list[Rung]:
    """Layouts to try, fastest first, that the recipe's own choices leave."""
    parallel = recipe.parallel
    if parallel.strategy != "auto":
        refuse_strategy(recipe, parallel.strategy)
        modes = _modes(recipe, world, shape, parallel.strategy)
        return [(parallel.strategy, mode, parallel.cpu_offload) for mode in modes]
    chosen: list[tuple[Strategy, bool]] = []
    if not parallel.cpu_offload:
        chosen.append(("single" if world.size == 1 else "ddp", False))
        if world.nodes > 1 and world.ranks_per_node > 1:
            chosen.append(("hsdp", False))
        if world.size > 1:
            chosen.append(("fsdp", False))
    # offload hides only a GPU's shortage: on a CPU both are the same memory
    if world.device == "cuda" or parallel.cpu_offload:
        chosen.append(("fsdp", True))
    forbidden = forbidden_engines(recipe.adapter)
    allowed = [(s, offload) for s, offload in chosen if s not in forbidden]
    if not allowed:
        raise PlanError(
            f"adapter.method: {recipe.adapter.method} does not run under {chosen[0][0]}, "
            "nor under what strategy auto would take instead",
            f"try parallel.strategy: {' or '.join(allowed_strategies(recipe, chosen[0][0]))}",
        )
    return [(s, mode, offload) for s, offload in allowed for mode in _modes(recipe, world, shape, s)]


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
            recompute_blocks=_stated_blocks(work, mode),
            group_size=group_size(work.recipe, world) if strategy == "hsdp" else None,
            cpu_offload=offload,
        )
        for strategy, mode, offload in _rungs(work.recipe, world, work.shape)
        for micro in micros
    ]
    chosen = None
    for away in (False, True):
        # what leaves no room to spare but fits on paper runs, with a warning: offload is slower than that
        for headroom in (Budget.HEADROOM, 0.0):
            here = (x for x in layouts if x.cpu_offload == away and fits(work, x, budget, headroom=headroom))
            chosen = chosen or next(here, None)
    if chosen is None:
        smallest = layouts[-1]
        raise PlanError(_too_large(work, smallest, budget), cheaper_changes(work, smallest, budget))
    faster = [x for x in layouts[: layouts.index(chosen)] if _title(x) != _title(chosen)]
    if chosen.recompute == "selective" and work.recipe.train.recompute == "auto":
        chosen = _fewest_blocks(work, chosen, budget)
    return chosen, _reason(work, faster, chosen, budget)


def _stated_blocks(work: Workload, mode: Recompute) -> int | None:
    """The recipe's; None: all.

    Raises:
        PlanError: the model has fewer.
    """
    stated, there = work.recipe.train.recompute_blocks, work.shape.num_layers
    if stated is not None and stated > there:
        raise PlanError(
            f"train.recompute_blocks: {stated}, but the model has {there} blocks",
            "leave it out, or give fewer",
        )
    return stated if mode == "selective" and stated != there else None


def _fewest_blocks(work: Workload, layout: Layout, budget: Budget) -> Layout:
    """With as few blocks that compute their MLP again as fit; all do.

    It fills the memory, and measured peaks lay up to 4 % over their forecast: so much more is left free.
    """
    headroom = Budget.HEADROOM + FILLED
    count = bisect_left(
        range(work.shape.num_layers), True,
        key=lambda n: fits(work, replace(layout, recompute_blocks=n), budget, headroom=headroom),
    )  # fmt: skip
    return layout if count == work.shape.num_layers else replace(layout, recompute_blocks=count)


def _reason(work: Workload, faster: list[Layout], chosen: Layout, budget: Budget) -> str:
    def need(layout: Layout) -> str:
        return gib(forecast(work, layout, capacity_bytes=None).total_bytes)

    ranks = "one rank" if chosen.world_size == 1 else f"{chosen.world_size} ranks"
    if budget.device_bytes is None:
        return f"{_title(chosen)}: {ranks}, {need(chosen)} each; the memory of a device is unknown"
    text = f"{_title(chosen)}: {ranks}, {need(chosen)} of {gib(budget.device_bytes)} each"
    if faster:
        # the one that came nearest to fitting
        near = min(reversed(faster), key=lambda x: forecast(work, x, capacity_bytes=None).total_bytes)
        text += f"; {_title(near)} would need {need(near)} at micro batch {near.micro_size}"
    return text


def _title(layout: Layout) -> str:
    extras = [*_TITLES[layout.recompute], *["offload"] * layout.cpu_offload]
    if layout.recompute_blocks is not None:
        extras[0] += f" in {layout.recompute_blocks} blocks"
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


def _warnings(shape: ModelShape, recipe: Recipe, budget: Budget, work: Workload, layout: Layout) -> list[str]:
    found = []
    length = recipe.data.sequence_length
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
    if (wanted := recipe.train.recompute) in BY_PIECES and layout.recompute != wanted:
        found.append(
            f"train.recompute: {wanted} does not know the blocks of {shape.model_type}; {layout.recompute} is taken"
        )
    if layout.recompute == "offloaded" and layout.device == "cpu":
        found.append(
            "train.recompute: offloaded saves nothing on a CPU, whose memory is the host's; full is the same"
        )
    if layout.device == "cuda" and shape.saved.has_liger and not work.has_liger:
        found.append(
            "liger-kernel is not installed here: the memory forecast counts what torch's own norms and "
            "activations keep, which is more, and a step takes longer than the time says; "
            "where it runs: pip install 'decompft[gpu]'"
        )
    absent = absent_deepspeed(layout.strategy)
    if absent:
        found.append(f"{absent}; where it runs: pip install 'decompft[deepspeed]'")
    if layout.cpu_offload and not recipe.parallel.cpu_offload:
        found.append(
            "shards are kept in host memory, which is slow; a smaller quantization.format, more or larger "
            "GPUs avoid it"
        )
    what = ["the shards"] * layout.cpu_offload + ["the layers' inputs"] * (layout.recompute == "offloaded")
    if what and layout.device == "cuda" and budget.host_bytes is None:
        found.append(
            f"the host's memory is unknown: whether {' and '.join(what)} that are kept there fit was not checked "
            "(the table of host memory says what each rank of a node needs)"
        )
    return found
