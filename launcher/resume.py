"""What `--run-dir` and `--resume` mean: where a launch begins, and what it refuses to continue."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from decompft.launcher.checkpoints import (
    CUT_SHORT,
    find_problem,
    half_replaced,
    has_saved,
    is_suspect,
    list_checkpoints,
    newest_valid,
)
from decompft.launcher.errors import CheckpointError, UserError
from decompft.launcher.plan import Plan
from decompft.launcher.recipe import AdapterSection, Recipe
from decompft.launcher.runs import RunDir, find_run

# what may differ on resume; every other recipe key must be as it was
_MAY_DIFFER = (
    "parallel", "checkpoint", "logging", "slurm",
    "train.max_steps", "train.stop_after_steps", "train.micro_batch_size", "train.deterministic", "train.recompute",
    "train.recompute_blocks",
    "train.cuda_graph", "quantization.cache", "model.attention",
)  # fmt: skip
# and what a fork may change: a run that diverged is forked before it did
_FORK_MAY_CHANGE = ("train.learning_rate", "train.warmup_steps", "train.max_grad_norm", "train.schedule")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a launch begins."""

    run: RunDir
    is_new: bool  # the folder must be made
    checkpoint: Path | None  # what the ranks load
    notes: tuple[str, ...]  # lines for the terminal


def choose_start(plan: Plan, *, run_dir: Path, resume: str | None) -> Start:
    """Decide from the disk alone what `--run-dir` and `--resume auto|RUN|CHECKPOINT` mean; writes nothing.

    Raises:
        UserError: the run exists, or what it should resume from does not, or differs in a key that matters.
    """
    run = RunDir(run_dir)
    is_new = not run.plan_path.exists()
    if is_new and has_saved(run.checkpoints_dir):
        raise _plan_error(run, "holds checkpoints, but no plan.json that says what was trained")
    if resume == "auto":
        if is_new:
            return Start(run=run, is_new=True, checkpoint=None, notes=())
        return _continue(run, plan)
    if not is_new:
        raise run.exists_error()
    if resume is None:
        return Start(run=run, is_new=True, checkpoint=None, notes=())
    return _fork(run, plan, resume)


def check_resume(old: Plan, new: Plan, *, is_fork: bool = False) -> list[str]:
    """Refuse to continue a run under another recipe.

    Returns:
        A line for each key that only a fork may change, and changes.

    Raises:
        UserError: names every key that differs, with both values.
    """
    return _refuse(_flat(_filled(old.recipe)), _flat(_filled(new.recipe)), is_fork=is_fork)


def _check_bare(checkpoint: Path, plan: Plan) -> None:
    """As far as a checkpoint without its run can tell; the ranks compare the base."""
    try:
        told = json.loads((checkpoint / "adapter.json").read_bytes())
        section, seed = AdapterSection.model_validate(told["adapter"]), told["seed"]
    except (OSError, ValueError, KeyError, TypeError) as error:  # pydantic's errors are ValueErrors
        raise CheckpointError(
            f"{checkpoint}: adapter.json describes no adapter of this version of decompft",
            "give its run instead: --resume RUN",
        ) from error
    recipe = plan.recipe
    before = {"adapter": _filled_adapter(section), "train": {"seed": seed}}
    after = {"adapter": _filled_adapter(recipe.adapter), "train": {"seed": recipe.train.seed}}
    _refuse(_flat(before), _flat(after), is_fork=True)


def _refuse(before: dict[str, Any], after: dict[str, Any], *, is_fork: bool) -> list[str]:
    lines = {
        key: f"{key}: was {_shown(before, key)}, now {_shown(after, key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
        and not any(key == free or key.startswith(free + ".") for free in _MAY_DIFFER)
    }
    by_fork = [line for key, line in lines.items() if key in _FORK_MAY_CHANGE]
    refused = [line for key, line in lines.items() if not (is_fork and key in _FORK_MAY_CHANGE)]
    if refused:
        instead = "start a new run with --run-dir DIR and without --resume"
        if refused == by_fork:
            instead = "fork the run, which may change them: --resume RUN --run-dir NEW"
        raise UserError(
            "cannot resume with another recipe; these keys differ:\n  " + "\n  ".join(refused),
            f"set them back, or {instead}",
        )
    return by_fork


def _continue(run: RunDir, plan: Plan) -> Start:
    """Never from step 0 over anything that was saved: a job that is put back into the queue would not be noticed."""
    origin = run.read_origin()
    if origin is None and not list_checkpoints(run.checkpoints_dir):
        # nothing was trained that another recipe could spoil
        note = f"{run.path} has no checkpoint yet: starting afresh"
        return Start(run=run, is_new=False, checkpoint=None, notes=(note,))
    if origin is not None and not list_checkpoints(run.checkpoints_dir):
        # as if it were forked now: what was wrong with the recipe may have been mended since
        told = _compare(_intact(origin), plan, is_named=True)
        told.append(f"{run.path} has no valid checkpoint of its own: beginning at {origin} again")
        return Start(run=run, is_new=False, checkpoint=origin, notes=tuple(told))
    try:
        old = run.read_plan()
    except UserError as error:
        raise _plan_error(run, "its plan.json cannot be read") from error
    check_resume(old, plan)
    checkpoint, skipped = newest_valid(run.checkpoints_dir)
    notes = [f"skipped checkpoint {line}" for line in skipped]
    foreign = [
        line for line in skipped if "version of decompft" in line or "cannot be read from the disk" in line
    ]
    if checkpoint is None and foreign:
        raise CheckpointError(
            f"{run.path}: nothing to resume from, and not because anything is damaged: {foreign[0]}",
            "use that version or mend the disk; to start again from step 0, take another folder: --run-dir DIR",
        )
    damaged = [line for line in skipped if not line.endswith(CUT_SHORT)]
    # a launch that looks before it holds the run will look again, once such a one is back in its place
    if checkpoint is None and damaged and not half_replaced(run.checkpoints_dir):
        raise CheckpointError(
            f"{run.path}: nothing was started, because all of its checkpoints are damaged:\n  "
            + "\n  ".join(damaged),
            "put back a copy of one if there is any; to start again from step 0 take another folder: "
            "--run-dir NEW, without --resume",
        )
    if checkpoint is not None and is_suspect(checkpoint):
        if origin is not None:
            notes.append(f"{run.path} has only suspect checkpoints of its own: beginning at {origin} again")
            return Start(run=run, is_new=False, checkpoint=_intact(origin), notes=tuple(notes))
        notes.append(
            f"{checkpoint.name} is suspect, the loss after it was not finite; {run.path} has none that is not"
        )
    if checkpoint is not None:
        notes.append(f"resuming from {checkpoint}")
    elif origin is not None:
        checkpoint = _intact(origin)
        notes.append(f"{run.path} has no valid checkpoint of its own: beginning at {origin} again")
    else:
        notes.append(f"{run.path} has no valid checkpoint: starting afresh")
    return Start(run=run, is_new=False, checkpoint=checkpoint, notes=tuple(notes))


def _plan_error(run: RunDir, what: str) -> UserError:
    """For a run whose plan is gone: a copy of it may be there, and a checkpoint can do without."""
    ways = [f"put back its copy: cp {copy} {run.plan_path}" for copy in run.kept_plans()[:1]]
    newest, _ = newest_valid(run.checkpoints_dir)
    if newest is not None:
        ways.append(f"fork it: --resume {newest} --run-dir NEW")
    ways.append("to start again from step 0 take another folder: --run-dir NEW, without --resume")
    return UserError(f"{run.path}: {what}; nothing was started", "; or ".join(ways))


def _fork(run: RunDir, plan: Plan, resume: str) -> Start:
    source = find_run(resume)
    skipped: list[str] = []
    checkpoint: Path | None
    if source.parent.name == "checkpoints" and not source.is_dir():
        there = ", ".join(folder.name for folder in list_checkpoints(source.parent)) or "none"
        raise UserError(f"--resume {resume}: no such checkpoint", f"{source.parent} has: {there}")
    if (source / "manifest.json").is_file() or source.parent.name == "checkpoints":
        checkpoint, origin = _intact(source), source.parent.parent
        if not (origin / "plan.json").is_file():
            origin = source.parent
    elif (source / "plan.json").is_file():
        origin = source
        checkpoint, skipped = newest_valid(source / "checkpoints")
        if checkpoint is None:
            why = "".join(f"\n  {line}" for line in skipped)
            raise CheckpointError(
                f"{source}: no checkpoint that can be resumed from{why}", "start without --resume"
            )
    elif has_saved(source / "checkpoints"):
        raise _plan_error(RunDir(source), "holds checkpoints, but no plan.json that says what was trained")
    else:
        raise UserError(
            f"--resume {resume}: neither auto, nor a run (a path, or a name under ./runs), nor a checkpoint",
            "use --resume auto to continue the run directory itself",
        )
    notes = [f"skipped checkpoint {line}" for line in skipped]
    changed = _compare(checkpoint, plan, is_named=source == checkpoint)
    if is_suspect(checkpoint):
        notes.append(f"{checkpoint.name} is suspect: the loss after it was not finite")
    notes.append(f"forking {origin} at {checkpoint.name} into {run.path}")
    return Start(run=run, is_new=True, checkpoint=checkpoint, notes=(*notes, *changed))


def _compare(checkpoint: Path, plan: Plan, *, is_named: bool) -> list[str]:
    """Refuse a fork of a run whose recipe was another one; lines on what the fork changes, or could not compare.

    Args:
        is_named: the user named this checkpoint, not the run.
    """
    old = _plan_of(RunDir(checkpoint.parent.parent), is_named=is_named)
    if old is None:
        _check_bare(checkpoint, plan)
        return ["without its run's plan.json only the adapter and the seed could be compared"]
    return [f"changed by this fork: {line}" for line in check_resume(old, plan, is_fork=True)]


def _plan_of(run: RunDir, *, is_named: bool) -> Plan | None:
    """The plan of the run that a fork begins in; None where only a checkpoint is left of it.

    Args:
        is_named: the user named a checkpoint, not the run.
    """
    if not run.plan_path.is_file():
        return None
    try:
        return run.read_plan()
    except UserError as error:
        if is_named:
            return None
        raise _plan_error(run, "its plan.json cannot be read") from error


def _intact(checkpoint: Path) -> Path:
    problem = find_problem(checkpoint)
    if problem is not None:
        raise CheckpointError(f"{checkpoint}: {problem}", "choose another checkpoint of the run")
    return checkpoint


def _filled(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every option of its methods: one that is written at its default changes nothing."""
    return {**recipe.model_dump(mode="json"), "adapter": _filled_adapter(recipe.adapter)}


def _filled_adapter(section: AdapterSection) -> dict[str, Any]:
    dumped = section.model_dump(mode="json")
    dumped["options"] = asdict(section.typed_options())
    for kept, override in zip(dumped["overrides"], section.overrides, strict=True):
        if not override.skip:
            kept["options"] = asdict(section.config(override).options)
    return dumped


_ABSENT = object()


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested sections as {dotted path: value}; an empty section or list is a value of its own."""
    if isinstance(value, dict) and value:
        pairs = [(f"{prefix}.{key}" if prefix else str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and value:
        pairs = [(f"{prefix}[{index}]", item) for index, item in enumerate(value)]
    else:
        return {prefix: value}
    return {key: leaf for path, item in pairs for key, leaf in _flat(item, path).items()}


def _shown(flat: dict[str, Any], key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "absent"
