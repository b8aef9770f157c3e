"""`decompft plan --scale`: the same work on more GPUs, by the simulator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from decompft.launcher.errors import PlanError, UserError
from decompft.launcher.machine import Machine, detect
from decompft.launcher.plan import Plan
from decompft.launcher.planner import make
from decompft.launcher.rates import GPU_MEMORY_GIB, NETWORK_GBIT_PER_S, NODE_GPUS
from decompft.launcher.recipe import Recipe
from decompft.launcher.speed import tokens_per_s_and_gpu

if TYPE_CHECKING:
    from rich.console import Console

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaled:
    """One number of GPUs; plans are None where none can be made, `refusal` says why."""

    gpus: int
    grown: Plan | None  # as many rows a GPU as the recipe gives one node, so that the batch grows
    same: Plan | None  # the recipe's own batch
    refusal: str = ""


def planned_machine(recipe: Recipe, gpu: str | None, network_gbit_per_s: float | None) -> Machine:
    """This machine, or with `gpu` a node of such GPUs: as many as parallel.gpus_per_node says, else eight.

    Raises:
        UserError: nothing was measured on that GPU, or the network is none.
    """
    if network_gbit_per_s is not None and network_gbit_per_s <= 0:
        raise UserError(f"--network: {network_gbit_per_s:g} Gbit/s carry nothing", "e.g. --network 400")
    if gpu is None:
        return replace(detect(), network_gbit_per_s=network_gbit_per_s)
    if gpu not in GPU_MEMORY_GIB:
        raise UserError(f"--gpu: {gpu} was not measured", f"measured are: {', '.join(GPU_MEMORY_GIB)}")
    per_node = recipe.parallel.gpus_per_node
    return Machine(
        num_gpus=NODE_GPUS if per_node == "auto" else per_node,
        gpu_memory_bytes=int(GPU_MEMORY_GIB[gpu] * GIB),
        gpu_name=gpu,
        network_gbit_per_s=network_gbit_per_s,
    )


def scale(recipe: Recipe, machine: Machine, counts: list[int]) -> list[Scaled]:
    """Plans of `recipe` on each number of GPUs, in nodes as large as `machine`.

    Raises:
        UserError: a number is no whole number of nodes, or nothing was measured on the machine's GPUs.
        PlanError: the recipe cannot be planned as it stands.
    """
    first = make(recipe, machine=machine)
    if first.time is None:
        raise UserError(
            "--scale: no speed was measured for this device, model size or setting",
            f"--gpu {' or '.join(GPU_MEMORY_GIB)} plans for one that was measured; "
            "quantization.compute: bfloat16, without offload",
        )
    rows = first.batch.micro_size * first.batch.accumulation
    return [_scaled(recipe, machine, count, rows) for count in counts]


def show(found: list[Scaled], recipe: Recipe, machine: Machine, console: Console | None = None) -> None:
    """Print the table; plain where there is no terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)
    grown = next((x.grown for x in found if x.grown is not None), None)
    rows = grown.batch.micro_size * grown.batch.accumulation if grown else 0
    network = machine.network_gbit_per_s or NETWORK_GBIT_PER_S
    console.print(
        f"{rows} rows a GPU and step; right, the {recipe.train.global_batch_size} rows that the recipe says. Nodes of "
        f"{machine.num_gpus}, {network:,.0f} Gbit/s each.\nSimulated; up to 2 GPUs it was compared with runs.",
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    left = ("GPUs", "strategy", "rows a step", "s a step", "tokens/s a GPU", "efficiency", "limit")
    right = ("same rows: s a step", "tokens/s a GPU", "efficiency")
    for name in (*left, *right):
        table.add_column(name, justify="left" if name in ("strategy", "limit") else "right")
    for cells in table_rows(found):
        table.add_row(*cells)
    console.print(table)
    for row in found:
        if row.refusal:
            console.print(f"{row.gpus} GPUs: {row.refusal}", markup=False, soft_wrap=True)


def table_rows(found: list[Scaled]) -> list[tuple[str, ...]]:
    """The cells of the table, row by row; efficiency is tokens/s a GPU over those of the first row."""
    bests = [next((s for x in found if (s := _speed(plan(x))) is not None), None) for plan in (_grown, _same)]
    return [
        (
            f"{x.gpus:,}",
            x.grown.strategy + (", recomputed" if x.grown.recompute == "full" else "") if x.grown else "-",
            f"{x.grown.batch.global_size:,}" if x.grown else "-",
            *_cells(x.grown, bests[0]),
            x.grown.time.limit if x.grown and x.grown.time else "-",
            *_cells(x.same, bests[1]),
        )
        for x in found
    ]


def _grown(row: Scaled) -> Plan | None:
    return row.grown


def _same(row: Scaled) -> Plan | None:
    return row.same


def _speed(plan: Plan | None) -> float | None:
    return None if plan is None else tokens_per_s_and_gpu(plan)


def _cells(plan: Plan | None, best: float | None) -> tuple[str, str, str]:
    speed = _speed(plan)
    if plan is None or plan.seconds_per_step is None or speed is None or best is None:
        return "-", "-", "-"
    return f"{plan.seconds_per_step:.3f}", f"{speed:,.0f}", f"{speed / best:.1%}"


def _scaled(recipe: Recipe, machine: Machine, count: int, rows: int) -> Scaled:
    node = min(count, machine.num_gpus)
    if count % node:
        raise UserError(f"--scale: {count} GPUs are not whole nodes of {node}", f"name multiples of {node}")
    refusals: list[str] = []
    plans: list[Plan | None] = []
    for total in (rows * count, recipe.train.global_batch_size):
        parallel = recipe.parallel.model_copy(update={"nodes": count // node, "gpus_per_node": node})
        train = recipe.train.model_copy(update={"global_batch_size": total})
        try:
            plans.append(
                make(recipe.model_copy(update={"parallel": parallel, "train": train}), machine=machine)
            )
        except PlanError as error:
            plans.append(None)
            refusals.append(error.message)
    return Scaled(gpus=count, grown=plans[0], same=plans[1], refusal=refusals[0] if plans[0] is None else "")


def parse_counts(text: str) -> list[int]:
    """`8,64,1024`.

    Raises:
        UserError: not whole numbers above 0.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise UserError(f"--scale: {text} is not a list of numbers of GPUs", "e.g. --scale 8,64,1024")
    return [int(word) for word in words]
