"""A sweep as one job array: a run directory for each task, frozen when it is submitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from decompft.launcher.errors import PlanError, SlurmError, UserError
from decompft.launcher.job import PREPARE
from decompft.launcher.plan import Plan
from decompft.launcher.resume import choose_start
from decompft.launcher.runs import RunDir
from decompft.launcher.say import Say
from decompft.launcher.sweep import Task, words_of
from decompft.launcher.sweep_folder import make_folder, tasks_to_run
from decompft.slurm.chain import Chain, step_path
from decompft.slurm.commands import call
from decompft.slurm.header import train_options, wanted
from decompft.slurm.profile import Profile
from decompft.slurm.render import step_script, train_script
from decompft.slurm.run_files import SCRIPT, script_path
from decompft.slurm.submit import (
    Submission,
    append,
    check_script,
    record,
    refuse_living,
    submit_script,
    warning_s,
)


def sweep_script(
    name: str,
    tasks: Sequence[Task],
    plans: Sequence[Plan],
    profile: Profile,
    *,
    run_dir: Path,
    throttle: int | None,
    warning_s: int,
) -> str:
    """The script of the array.

    Args:
        name: of the job.
        tasks: that are to run; their indices are the array's.
        plans: of the tasks.
        throttle: tasks that run at the same time.

    Raises:
        PlanError: the tasks do not fit into jobs of one size.
    """
    headers = [_header(plan, profile) for plan in plans]
    for task, header in zip(tasks, headers, strict=True):
        other = sorted(set(header) ^ set(headers[0]))
        if other:
            raise PlanError(
                f"sweep: task {task.index} ({words_of(task.parameters)}) needs another job than the first: "
                f"{' '.join(other)}",
                "the tasks of a job array are alike; write two recipes",
            )
    array = _ranges([task.index for task in tasks]) + (f"%{throttle}" if throttle else "")
    plan = plans[0].model_copy(update={"name": name})
    return train_script(plan, profile, run_dir=str(run_dir), warning_s=warning_s, array=array)


def submit_sweep(
    name: str,
    tasks: Sequence[Task],
    plans: Sequence[Plan],
    recipe_text: str,
    profile: Profile,
    chain: Chain,
    *,
    run_dir: Path,
    resume: str | None,
    throttle: int | None,
    say: Say,
) -> tuple[Submission, ...]:
    """Submit a sweep's tasks that have not finished.

    Args:
        tasks, plans: all of the sweep.
        chain: prepare may come before the tasks; what follows a training needs one adapter, not many.
        resume: None or "auto".

    Raises:
        UserError: a task is queued or running already, or the folder holds something else.
        SlurmError: Slurm is not here, or refuses the script; its words are in the message.
    """
    late = [step for step in chain.steps if step in ("merge", "eval")]
    if late:
        raise UserError(
            f"--chain: {late[0]} needs one adapter, a sweep makes {len(tasks)}",
            f"look which is best with `decompft status {run_dir}`, then {late[0]} that one",
        )
    sweep = RunDir(run_dir)
    left = tasks_to_run(run_dir, tasks, resume=resume)
    its_plans = [plans[task.index] for task in left]
    runs = [RunDir(run_dir / task.folder) for task in left]
    refuse_living(sweep, *runs)
    starts = [choose_start(p, run_dir=r.path, resume=resume) for p, r in zip(its_plans, runs, strict=True)]
    before_s = warning_s(runs)
    text = sweep_script(
        name, left, its_plans, profile, run_dir=run_dir, throttle=throttle, warning_s=before_s
    )
    check_script(text)
    prepare = ""
    if "prepare" in chain.steps:
        commands = [(str(run.path), (PREPARE, str(run.path))) for run in _with_own_data(runs, its_plans)]
        plan = its_plans[0].model_copy(update={"name": name})
        prepare = step_script(plan, profile, kind="prepare", commands=commands)
        check_script(prepare)
    make_folder(run_dir, recipe_text, tasks)
    for plan, run, start in zip(its_plans, runs, starts, strict=True):
        record(start, plan, recipe_text)
        # of its own, so that a task can be continued alone
        script = train_script(plan, profile, run_dir=str(run.path), warning_s=before_s)
        script_path(run).write_text(script, encoding="utf-8")
    done: list[Submission] = []
    if prepare:
        done.append(submit_script(sweep, prepare, name=step_path("prepare"), kind="prepare", profile=profile))
    after = [submission.job_id for submission in done]
    try:
        array = submit_script(
            sweep, text, name=SCRIPT, kind="sweep", after=after, profile=profile, array=len(left)
        )
    except SlurmError:
        for submission in done:
            call(["scancel", submission.job_id], cluster=submission.cluster)
        raise
    for task, run in zip(left, runs, strict=True):
        row = replace(array, job_id=f"{array.job_id}_{task.index}", array=None, script=f"../{SCRIPT}")
        append(run, row)
    return (*done, array)


def _with_own_data(runs: Sequence[RunDir], plans: Sequence[Plan]) -> list[RunDir]:
    """One run for each model and data: the others find the same in the cache."""
    kinds = [
        (p.recipe.model, p.recipe.data, p.recipe.adapter.train_tokens, p.recipe.train.seed) for p in plans
    ]
    return [run for i, run in enumerate(runs) if kinds[i] not in kinds[:i]]


def _header(plan: Plan, profile: Profile) -> list[str]:
    """What a task's job asks for; the name says nothing of it."""
    options = train_options(plan, wanted(profile, plan.recipe.slurm))
    return [option for option in options if not option.startswith("--job-name=")]


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3,5` of 0, 1, 2, 3, 5."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)
