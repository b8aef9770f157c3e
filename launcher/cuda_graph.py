"""May the passes of a run be recorded as CUDA graphs, and if not, why?"""

from __future__ import annotations

from decompft.launcher.errors import PlanError
from decompft.launcher.plan import Device
from decompft.launcher.recipe import Recipe
from decompft.launcher.strategies import STRATEGIES
from decompft.launcher.workload import Layout


def is_recorded(recipe: Recipe, layout: Layout) -> bool:
    """Whether passes of this layout are recorded; where they are demanded and cannot be, they are not."""
    wanted = recipe.train.cuda_graph
    if wanted is False or _obstacle(recipe, layout)[0]:
        return False
    return wanted is True or not _not_worth_it(recipe)


def decide_cuda_graph(recipe: Recipe, layout: Layout) -> tuple[bool, str]:
    """Whether `train.cuda_graph` is on, and a line for the plan; "" where nobody asked.

    Raises:
        PlanError: it is demanded, and cannot be.
    """
    wanted = recipe.train.cuda_graph
    if wanted is False:
        return False, ""
    why, instead = _obstacle(recipe, layout)
    if wanted is True:
        if why:
            raise PlanError(f"train.cuda_graph: true, but {why}", f"{instead}, or set train.cuda_graph: auto")
        return True, "on: a pass is one launch; its memory stays reserved between steps"
    why = why or _not_worth_it(recipe)
    return not why, f"off: {why}" if why else "on, where a pass can be recorded; its memory stays reserved"


def _obstacle(recipe: Recipe, layout: Layout) -> tuple[str, str]:
    """What cannot be recorded, and what to set instead; "" and "" where all can."""
    device: Device = layout.device
    if device == "cpu":
        return "this run is on a CPU, which has no graphs", "plan for a GPU"
    if not layout.spec.may_record:
        able = " or ".join(s.name for s in STRATEGIES.values() if s.may_record)
        return (
            f"{layout.strategy} gathers or reduces within a pass, which is not recorded",
            f"use parallel.strategy: {able}",
        )
    if recipe.quantization.outlier_threshold:
        return (
            "each layer's outliers are looked for on the host (quantization.outlier_threshold)",
            "set quantization.outlier_threshold: 0",
        )
    if layout.recompute == "offloaded":
        return "offloaded recomputation moves inputs to the host meanwhile", "set train.recompute: full"
    # of what is run again, norms draw nothing
    if layout.recompute not in ("none", "norms") and _drops(recipe):
        return (
            "recomputation under adapter.dropout reads the state of the random numbers on the host",
            "set adapter.dropout: 0 or train.recompute: none",
        )
    return "", ""


def _not_worth_it(recipe: Recipe) -> str:
    """Where passes could be recorded, but rows come in too many shapes."""
    if recipe.model.task != "causal-lm" or not recipe.data.packing:
        return "micro batches of rows that are not packed have many shapes"
    return ""


def _drops(recipe: Recipe) -> bool:
    adapter = recipe.adapter
    return any(
        c.dropout for c in (adapter.config(), *(adapter.config(o) for o in adapter.overrides if not o.skip))
    )
