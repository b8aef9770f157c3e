"""What does the folder of a sweep hold? sweep.json, the recipe's text, and the run of each task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from decompft.launcher.errors import UserError
from decompft.launcher.outcome import read_outcome, write_atomic
from decompft.launcher.runs import RunDir
from decompft.launcher.sweep import Task

_NAME = "sweep.json"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A task, as sweep.json tells of it."""

    index: int
    parameters: dict[str, Any]
    folder: str

    @classmethod
    def of(cls, task: Task) -> Self:
        return cls(index=task.index, parameters=dict(task.parameters), folder=task.folder)


def is_sweep(path: Path) -> bool:
    return (path / _NAME).is_file()


def read_sweep(path: Path) -> tuple[Row, ...]:
    """The tasks of a sweep.

    Raises:
        UserError: sweep.json is damaged.
    """
    try:
        rows = json.loads((path / _NAME).read_bytes())["tasks"]
        return tuple(
            Row(index=int(row["index"]), parameters=dict(row["parameters"]), folder=Path(row["folder"]).name)
            for row in rows
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path / _NAME}: does not describe a sweep ({error})",
            "each of its folders is a run of its own; start the sweep again with --run-dir DIR",
        ) from error


def make_folder(path: Path, recipe_text: str, tasks: Sequence[Task]) -> None:
    """Write what was asked; the folder becomes a sweep's.

    Raises:
        UserError: it cannot be written.
    """
    rows = [{"index": t.index, "parameters": dict(t.parameters), "folder": t.folder} for t in tasks]
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomic(path / "recipe.yaml", recipe_text)
        write_atomic(path / _NAME, json.dumps({"tasks": rows}, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"{path}: the sweep's folder cannot be written ({error.strerror})",
            "choose another place with --run-dir DIR",
        ) from error


def tasks_to_run(path: Path, tasks: Sequence[Task], *, resume: str | None) -> tuple[Task, ...]:
    """Of a new sweep all tasks; of one that is continued those that have not finished.

    Args:
        resume: None or "auto".

    Raises:
        UserError: the folder holds a run or a sweep already, another sweep, or nothing that is left to do.
    """
    if resume not in (None, "auto"):
        raise UserError(
            f"--resume {resume}: a sweep has many runs, none of which begins at another's checkpoint",
            "continue the sweep with --resume auto",
        )
    if RunDir(path).plan_path.exists() or (is_sweep(path) and resume is None):
        raise RunDir(path).exists_error()
    if not is_sweep(path):
        return tuple(tasks)
    if list(read_sweep(path)) != [Row.of(task) for task in tasks]:
        raise UserError(
            f"{path}: holds a sweep over other values",
            "set them back, or start a new sweep with --run-dir DIR and without --resume",
        )
    left = tuple(task for task in tasks if not has_finished(path / task.folder))
    if not left:
        raise UserError(f"{path}: every task of this sweep has finished", f"look: decompft status {path}")
    return left


def has_finished(run: Path) -> bool:
    """Whether the newest incarnation of a task's run says so."""
    folder = RunDir(run)
    try:
        outcome = read_outcome(folder.incarnation_dir(folder.newest_incarnation()))
    except (OSError, ValueError, KeyError, TypeError):  # damaged
        return False
    return outcome is not None and outcome.result == "finished"
