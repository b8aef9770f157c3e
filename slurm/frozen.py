"""The recipe of a submitted run as it was when it was submitted; later edits of the file do not reach the queue."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from decompft.launcher.errors import UserError
from decompft.launcher.outcome import write_atomic
from decompft.launcher.recipe import Recipe
from decompft.launcher.runs import RunDir


def freeze(run: RunDir, recipe: Recipe) -> None:
    """Keep the checked recipe, overrides and absolute paths in it."""
    path = frozen_path(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, recipe.model_dump_json(indent=2) + "\n")


def read_frozen(run: RunDir) -> tuple[Recipe, str]:
    """The frozen recipe, and the file's text as the user wrote it.

    Raises:
        UserError: nothing was submitted there, or another version wrote it.
    """
    path = frozen_path(run)
    try:
        recipe = Recipe.model_validate_json(path.read_bytes())
        return recipe, run.recipe_path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename}: no such file", "submit the run with `decompft launch RECIPE --slurm`"
        ) from error
    except ValidationError as error:
        raise UserError(
            f"{path}: not a recipe of this version of decompft ({error.error_count()} problems)",
            "submit the run again with `decompft launch RECIPE --slurm`",
        ) from error


def frozen_path(run: RunDir) -> Path:
    return run.path / "slurm/recipe.json"
