"""Which recipes does a sweep stand for? Every combination of its values, checked before the first of them runs."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decompft.launcher import checking, planner
from decompft.launcher.errors import RecipeError, UserError
from decompft.launcher.plan import Plan
from decompft.launcher.recipe import Recipe
from decompft.launcher.source import Chosen, parse, read_text

MOST_TASKS = 1000  # as Slurm's MaxArraySize allows by default; folders have three digits
_MOST_CHARACTERS = 80  # of a folder's name


@dataclass(frozen=True, kw_only=True)
class Task:
    """One combination of a sweep."""

    index: int  # of the job array
    parameters: Mapping[str, Any]  # key of the recipe -> value
    recipe: Recipe  # without the sweep
    folder: str  # its run's, below the sweep's: 003-rank_8-learning_rate_0.001


def tasks_of(path: Path, overrides: Sequence[str]) -> tuple[Task, ...]:
    """Every combination of a recipe with a sweep.

    Args:
        overrides: `section.key=value` each, of all combinations.

    Raises:
        RecipeError: the first combination that is no valid recipe, with the line of the value that is wrong.
    """
    text = read_text(path, hint="`decompft recipes list` shows those that ship")
    where, base_dir = str(path), path.parent
    base = parse(text, where=where, base_dir=base_dir, overrides=overrides)
    assert base.sweep is not None, path
    parameters = base.sweep.parameters
    _refuse_idle(overrides, parameters)
    count = 1
    for values in parameters.values():
        count *= len(values)
    if count > MOST_TASKS:
        raise RecipeError(
            f"{where}: sweep.parameters: {count:,} combinations, at most {MOST_TASKS:,} are run",
            "leave out some values, or write two recipes",
        )
    columns = [
        [Chosen(key=key, value=v, path=("sweep", "parameters", key, i)) for i, v in enumerate(values)]
        for key, values in parameters.items()
    ]
    found = []
    for index, chosen in enumerate(itertools.product(*columns)):
        picked = {one.key: one.value for one in chosen}
        with _in_task(index, picked):
            recipe = parse(text, where=where, base_dir=base_dir, overrides=overrides, chosen=chosen)
        recipe = recipe.model_copy(update={"name": f"{base.name}-{index:03d}", "sweep": None})
        found.append(Task(index=index, parameters=picked, recipe=recipe, folder=_folder(index, chosen)))
    return tuple(found)


def check_tasks(tasks: Sequence[Task], *, strict: bool) -> tuple[str, ...]:
    """Look at model and data of each, as `checking.check`; its warnings, each once."""
    found: dict[str, None] = {}
    for task in tasks:
        with _in_task(task.index, task.parameters):
            found |= dict.fromkeys(checking.check(task.recipe, strict=strict))
    return tuple(found)


def plan_tasks(tasks: Sequence[Task]) -> tuple[Plan, ...]:
    """Plan each.

    Raises:
        UserError: the first that cannot be planned, or needs another number of ranks than the first one.
    """
    plans: list[Plan] = []
    for task in tasks:
        with _in_task(task.index, task.parameters):
            plan = planner.make(task.recipe)
        if plans and plan.world != plans[0].world:
            raise RecipeError(
                f"sweep: task {words_of(task.parameters)} is planned for {plan.world.size} ranks, "
                f"the first for {plans[0].world.size}",
                "fix parallel.gpus_per_node, and sweep what runs on the same machine only",
            )
        plans.append(plan)
    return tuple(plans)


def word_of(value: Any) -> str:
    """A parameter's value, as it is typed."""
    return value if isinstance(value, str) else json.dumps(value)


def words_of(parameters: Mapping[str, Any]) -> str:
    """`adapter.rank=8, train.learning_rate=0.001`"""
    return ", ".join(f"{key}={word_of(value)}" for key, value in parameters.items())


@contextmanager
def _in_task(index: int, parameters: Mapping[str, Any]) -> Iterator[None]:
    """Say of an error which task it is about."""
    try:
        yield
    except UserError as error:
        message = f"{error.message}\n  in task {index} of the sweep: {words_of(parameters)}"
        raise type(error)(message, error.hint) from None


def _refuse_idle(overrides: Sequence[str], parameters: Mapping[str, Any]) -> None:
    for override in overrides:
        key = override.partition("=")[0]
        for swept in parameters:
            if key == swept or key.startswith((f"{swept}.", f"{swept}[")):
                raise RecipeError(
                    f"override {override}: has no effect, sweep.parameters sets {swept}",
                    "leave it out; sweep=null trains the recipe once, without its sweep",
                )


def _folder(index: int, chosen: Sequence[Chosen]) -> str:
    """Readable, and safe in a shell's pattern and in Slurm's file names; the number alone tells them apart."""
    words = [f"{one.key.rpartition('.')[2]}_{word_of(one.value)}" for one in chosen]
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", f"{index:03d}-{'-'.join(words)}")
    return name[:_MOST_CHARACTERS].rstrip("._-")
