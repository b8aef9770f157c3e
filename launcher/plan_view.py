"""How a plan looks to a reader: decisions, memory term by term, warnings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from decompft.adapters.formats import FORMAT_SPECS
from decompft.adapters.spec import has_rank
from decompft.launcher.fit import gib
from decompft.launcher.plan import Plan, Term
from decompft.launcher.recipe import Recipe
from decompft.launcher.speed import run_seconds, tokens_per_s_and_gpu

if TYPE_CHECKING:
    from rich.console import Console

BAR_WIDTH = 20


def show(plan: Plan, console: Console | None = None) -> None:
    """Print the plan; without a terminal the same lines come plain and as wide as they need."""
    from rich.console import Console  # 30 ms, and only this verb needs it
    from rich.markup import escape
    from rich.table import Table

    console = console or Console(highlight=False)
    if not console.is_terminal:
        # a log has no width; wrapped tables cannot be read back or grepped
        console.width = max(console.width, 160)
    console.print(f"[bold]plan {plan.name}[/bold]", soft_wrap=True)
    decisions = Table.grid(padding=(0, 2))
    for key, value in _decisions(plan):
        decisions.add_row(f"  {key}", value)
    console.print(decisions)
    memory = plan.forecast
    where = "memory of a rank" if plan.world.device == "cpu" else "device memory of a rank"
    console.print(_table(where, memory.terms, memory.total_bytes, memory.capacity_bytes))
    if memory.host_terms:
        console.print(
            _table(
                "host memory of a rank",
                memory.host_terms,
                memory.host_total_bytes,
                memory.host_capacity_bytes,
            )
        )
    for warning in plan.warnings:
        # as it is: decompft[gpu] is no markup
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True)


def _decisions(plan: Plan) -> list[tuple[str, str]]:
    recipe, world, batch = plan.recipe, plan.world, plan.batch
    q = recipe.quantization
    kind = "CPU process" if world.device == "cpu" else "GPU"
    spec = FORMAT_SPECS[q.format]
    base = q.format if spec.has_blocks else spec.title
    if spec.has_blocks:
        base += f", blocks of {q.block_size}" + (", scales quantized" if q.double_quant else "")
    if q.outlier_threshold:
        base += f", multiplied in int8, outliers beyond {q.outlier_threshold:g} apart"
    config = recipe.model.config or {}
    trained = plan.num_adapter_params + plan.num_module_params
    rows = [
        ("model", f"{recipe.model.id or config['model_type']}, "
                  f"{plan.num_base_params:,} parameters"),
        ("shape from", plan.shape_source),
        ("base", f"{base}, compute {q.compute}" + (f", but not {', '.join(q.fp8_skip)}" if q.fp8_skip else "")),
        ("adapter", f"{_methods(recipe)}, {trained:,} trained "
                    f"({trained / plan.num_base_params:.2%})"),
        ("world", f"{world.size} ranks = {world.nodes} nodes x {world.ranks_per_node}, each a {kind}"),
        ("strategy", plan.strategy_reason),
        ("mesh", _mesh(plan)),
        ("recompute", _recompute(plan)),
        ("CUDA graph", plan.cuda_graph_reason),
        ("batch", f"{batch.global_size} rows = {batch.micro_size} x {batch.accumulation} accumulated x "
                  f"{world.size} ranks, up to {batch.tokens_per_step:,} tokens a step"),
        ("checkpoint", f"{gib(plan.checkpoint_bytes)} each, {recipe.checkpoint.keep} kept"),
        ("epoch", f"{plan.steps_per_epoch:,.1f} steps" if plan.steps_per_epoch
                  else "as many steps as tokenizing will tell"),
        *_times(plan),
    ]  # fmt: skip
    return [(key, value) for key, value in rows if value]


def _times(plan: Plan) -> list[tuple[str, str]]:
    """A step, the run, and where the time goes; an estimate, and it says so."""
    time, speed = plan.time, tokens_per_s_and_gpu(plan)
    if time is None or speed is None:
        return [("time", "unknown: no speed was measured for this device")]
    rows = [
        ("time", f"about {time.seconds:.2f} s a step, {speed:,.0f} tokens/s a GPU: simulated from what "
                 f"{time.device}s were measured to do"),
        ("of it", ", ".join(f"{t.name} {t.seconds / time.seconds:.1%}" for t in time.terms)
                  + f"; the limit: {time.limit}"),
    ]  # fmt: skip
    run = run_seconds(plan)
    if run is not None:
        steps, seconds, saves = run
        rows.append(
            ("run", f"{steps:,} steps in about {_hours(seconds + saves)}, {_hours(saves)} of it for saves; evaluations "
                    "and the start come on top")
        )  # fmt: skip
    return rows


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _methods(recipe: Recipe) -> str:
    """Methods and ranks, the overrides' too."""
    adapter = recipe.adapter
    configs = [adapter.config(), *(adapter.config(o) for o in adapter.overrides if not o.skip)]
    said = dict.fromkeys(f"{c.method}, rank {c.rank}" if has_rank(c) else c.method for c in configs)
    return " and ".join(said)


def _recompute(plan: Plan) -> str:
    some = plan.recompute_blocks
    if some is None:
        return plan.recompute
    return f"{plan.recompute} in the first {some} blocks, norms and activations in the others"


def _mesh(plan: Plan) -> str:
    """How the base is cut and repeated, where it is both."""
    copies = plan.world.size // plan.shard_size
    if plan.shard_size == 1 or copies == 1:
        return ""
    return f"{copies} copies of the base, each cut over {plan.shard_size} ranks"


def _table(title: str, terms: Sequence[Term], total: int, capacity: int | None) -> object:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2))
    for name, justify in (("term", "left"), ("size", "right"), ("part", "right"), ("", "left"), ("", "left")):
        table.add_column(name, justify="right" if justify == "right" else "left", no_wrap=name != "")
    for term in terms:
        part = term.num_bytes / total
        bar = "#" * round(part * BAR_WIDTH)
        table.add_row(term.name, gib(term.num_bytes), f"{part:.1%}", bar, escape(term.note))
    of = f"of {gib(capacity)}, {total / capacity:.0%}" if capacity else "of an unknown capacity"
    table.add_row("total", gib(total), "", "", of, style="bold")
    return table
