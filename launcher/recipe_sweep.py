"""The recipe's section on a sweep: which keys take which values."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from decompft.launcher.recipe_section import KEY, Section


def _may_be_swept(key: str) -> str:
    if not KEY.fullmatch(key):
        raise ValueError("this is not a key of a recipe; write it in full, e.g. adapter.rank")
    for fixed, why in _NOT_SWEPT.items():
        if key == fixed or key.startswith((f"{fixed}.", f"{fixed}[")):
            raise ValueError(f"{fixed} cannot be swept: {why}")
    return key


def _differ(values: list[Any]) -> list[Any]:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ValueError(f"{value!r} is there twice")
    return values


def _some_keys(parameters: dict[str, list[Any]]) -> dict[str, list[Any]]:
    if not parameters:
        raise ValueError("no key is named; write one with its values, e.g. adapter.rank: [4, 8]")
    return parameters


SweptKey = Annotated[str, AfterValidator(_may_be_swept)]
SweptValues = Annotated[list[Any], Field(min_length=1), AfterValidator(_differ)]

# tasks of an array are jobs of the same size
_NOT_SWEPT = {
    "name": "each task is named after its number", "sweep": "a sweep of sweeps is one with more parameters",
    "slurm": "the tasks are one job array", "parallel.nodes": "the tasks are one job array",
    "parallel.gpus_per_node": "the tasks are one job array",
}  # fmt: skip


class SweepSection(Section):
    """The same recipe with each combination of some values: a run for each (docs/sweep.md)."""

    parameters: Annotated[dict[SweptKey, SweptValues], AfterValidator(_some_keys)] = Field(
        description="section.key: [value, value]; all combinations are run, the last key varies fastest"
    )
    throttle: int | None = Field(
        None,
        ge=1,
        description="with --slurm: tasks that run at the same time; default: as many as Slurm starts",
    )
