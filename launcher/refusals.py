"""Which well-formed recipes cannot be planned, and what is nearest to them that can?"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from decompft.adapters.formats import FORMAT_SPECS
from decompft.adapters.spec import has_rank, spec_of
from decompft.launcher.errors import PlanError
from decompft.launcher.layers import forbidden_engines
from decompft.launcher.machine import Machine
from decompft.launcher.models import LAYER, ModelShape
from decompft.launcher.plan import World
from decompft.launcher.recipe import Recipe
from decompft.launcher.strategies import STRATEGIES, Strategy
from decompft.launcher.tensor_names import find_key
from decompft.launcher.workload import Workload, quantized_linears

# families whose positions are rows of a weight: there is none beyond the last
LEARNED_POSITIONS = ("gpt2", "bert")


def refuse_format(recipe: Recipe, machine: Machine, world: World) -> None:
    """A format that the GPUs found cannot compute with; of GPUs elsewhere nothing is known.

    Raises:
        PlanError: with the GPU's name, and formats that it can.
    """
    spec, found = FORMAT_SPECS[recipe.quantization.format], machine.compute_capability
    if spec.min_capability is None or found is None or world.device == "cpu" or found >= spec.min_capability:
        return
    name, (major, minor) = machine.gpu_name or "this GPU", spec.min_capability
    able = [s.name for s in FORMAT_SPECS.values() if s.is_quantized and (s.min_capability or (0, 0)) <= found]
    raise PlanError(
        f"quantization.format: {spec.name} needs a GPU of compute capability {major}.{minor} or higher, "
        f"{name} has {found[0]}.{found[1]}",
        f"use quantization.format: {_either(able)}",
    )


def refuse_strategy(recipe: Recipe, strategy: Strategy) -> None:
    """A strategy that the adapter or the optimizer cannot work under.

    Raises:
        PlanError: with strategies that do.
    """
    forbidden = forbidden_engines(recipe.adapter)
    if strategy in forbidden:
        raise PlanError(
            f"adapter.method: {forbidden[strategy]} does not run under {strategy}",
            f"use parallel.strategy: {_either(allowed_strategies(recipe, strategy))}",
        )
    if recipe.train.optimizer == "adamw8bit" and STRATEGIES[strategy].is_deepspeed:
        raise PlanError(
            f"train.optimizer: adamw8bit does not run under {strategy}: DeepSpeed cuts optimizer state at "
            "any number of a flat buffer, 8-bit moments only at whole blocks of a tensor",
            "use train.optimizer: adamw, or parallel.strategy: fsdp, which shards the state as well",
        )


def allowed_strategies(recipe: Recipe, near: Strategy) -> list[str]:
    """What the adapter runs under, those that shard what `near` shards first."""
    forbidden = forbidden_engines(recipe.adapter)
    able = [s for s in STRATEGIES.values() if s.name not in forbidden and s.name != "single"]
    able.sort(key=lambda s: (s.shards_base != STRATEGIES[near].shards_base, s.is_deepspeed))
    return [s.name for s in able[:2]] or ["single"]


def refuse_world(recipe: Recipe, world: World) -> None:
    """A number of ranks that the named strategy cannot be spread over.

    Raises:
        PlanError: with numbers that work.
    """
    parallel = recipe.parallel
    if parallel.strategy == "single" and world.size > 1:
        raise PlanError(
            f"parallel.strategy: single is one rank, but the world has {world.size} "
            f"({world.nodes} nodes x {world.ranks_per_node})",
            "use strategy auto, ddp or fsdp, or nodes: 1 with gpus_per_node: 1",
        )
    if parallel.strategy != "hsdp":
        return
    size = group_size(recipe, world)
    sizes = [n for n in range(2, world.size // 2 + 1) if world.size % n == 0]
    instead = f"use parallel.shard_size: {_either(sizes)}, or " if sizes else "use "
    if size == 1:
        raise PlanError(
            f"parallel.strategy: hsdp with groups of one rank ({world.size} ranks) cuts nothing",
            instead + "strategy ddp, which is that",
        )
    if world.size % size:
        raise PlanError(
            f"parallel.shard_size: {world.size} ranks do not divide into groups of {size}",
            instead + "strategy fsdp",
        )
    if world.size == size:
        raise PlanError(
            f"parallel.strategy: hsdp needs two groups or more, but {world.size} ranks are one group of {size}",
            instead + "strategy fsdp, which is that",
        )


def group_size(recipe: Recipe, world: World) -> int:
    """Ranks that share one copy of the model under hsdp."""
    size = recipe.parallel.shard_size
    return world.ranks_per_node if size == "auto" else size


def refuse_shape(work: Workload) -> None:
    """A rank, block or sequence that the model's layers cannot take.

    Raises:
        PlanError: with the layer, and what it can take.
    """
    recipe = work.recipe
    ranked = [x for x in work.adapted if has_rank(x[3])] or list(work.adapted)
    name, out, in_, config = min(ranked, key=lambda x: min(x[1], x[2]) - x[3].rank)
    rank, last = config.rank, name.rpartition(".")[2]
    if has_rank(config) and rank > min(out, in_):
        raise PlanError(
            f"adapter.rank: {rank} is larger than the smallest target ({min(out, in_)}, {name})",
            f"use rank <= {min(out, in_)}, or leave {last} out of adapter.targets",
        )
    _refuse_blocks(work.shape, recipe)
    _refuse_options(work)
    shape, length = work.shape, recipe.data.sequence_length
    if length > shape.max_positions and shape.model_type in LEARNED_POSITIONS:
        raise PlanError(
            f"data.sequence_length {length} is longer than the {shape.max_positions} positions that "
            f"this {shape.model_type} has weights for",
            f"use data.sequence_length <= {shape.max_positions}",
        )


def fits_blocks(shape: ModelShape, recipe: Recipe) -> bool:
    """The format's blocks divide every quantized width."""
    size = recipe.quantization.block_size
    has_blocks = FORMAT_SPECS[recipe.quantization.format].has_blocks
    return not has_blocks or all(x.in_ % size == 0 for x in quantized_linears(shape, recipe))


def _refuse_blocks(shape: ModelShape, recipe: Recipe) -> None:
    if fits_blocks(shape, recipe):
        return
    size = recipe.quantization.block_size
    widths = {x.in_ for x in quantized_linears(shape, recipe)}
    x = next(x for x in quantized_linears(shape, recipe) if x.in_ % size)
    other = next((s for s in (64, 128) if all(w % s == 0 for w in widths)), None)
    raise PlanError(
        f"quantization.block_size: {x.name.replace(LAYER, '*')} is {x.in_} wide, not a multiple of {size}",
        (f"use quantization.block_size: {other}" if other else "use quantization.format: int8 or none")
        + "; all linear layers are quantized, whatever adapter.targets names",
    )


def _refuse_options(work: Workload) -> None:
    form = FORMAT_SPECS[work.recipe.quantization.format]
    for name, out, in_, config in work.adapted:
        _tell(name, spec_of(config).refusal(out, in_, config, form.is_quantized))


def refuse_over_codes(work: Workload, packed: Iterable[str]) -> None:
    """A method that would take something out of a weight that the checkpoint has as codes only.

    Args:
        packed: the checkpoint's names of such weights.

    Raises:
        PlanError: with the layer, and what can be done instead.
    """
    prefix = work.shape.linears[0].name.partition(".")[0]
    names = set(packed)
    for name, out, in_, config in work.adapted:
        if names and find_key(f"{name}.weight", names, prefix) is not None:
            _tell(name, spec_of(config).refusal(out, in_, config, False))
            if getattr(config.options, "base", None) == "residual":
                _tell(name, over_codes(config.method))


def over_codes(method: str) -> str:
    """What is wrong with a method that stores another base than a quantized checkpoint's; what to do."""
    return (
        f"{method} stores another base than the checkpoint's, and this checkpoint is quantized already; set "
        "adapter.options.base: exact, which keeps the base and adds a frozen correction, or name an unquantized "
        "checkpoint"
    )


def _tell(layer: str, refusal: str) -> None:
    what, _, instead = refusal.partition("; ")
    if what:
        raise PlanError(f"{what} ({layer})", instead)


def absent_deepspeed(strategy: Strategy) -> str | None:
    """What to say where a strategy needs DeepSpeed and this Python has none."""
    if not STRATEGIES[strategy].is_deepspeed or importlib.util.find_spec("deepspeed"):
        return None
    return f"parallel.strategy: {strategy} needs DeepSpeed, which is not installed here"


def _either(names: list[str] | list[int]) -> str:
    words = [str(name) for name in names]
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
