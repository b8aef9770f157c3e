"""`decompft launch` of a recipe with a sweep: one job array, or its tasks one after the other on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from decompft.launcher.errors import EXIT_AGAIN, EXIT_DONE, EXIT_FAILED, EXIT_USER, RunFailed
from decompft.launcher.plan import Plan
from decompft.launcher.recipe import Recipe
from decompft.launcher.say import to_stderr, warn
from decompft.launcher.sweep import Task, check_tasks, plan_tasks, tasks_of, words_of
from decompft.launcher.sweep_folder import is_sweep, make_folder, tasks_to_run

if TYPE_CHECKING:
    from decompft.slurm.profile import Profile


def launch_sweep(
    args: argparse.Namespace, path: Path, recipe: Recipe, profile_of: Callable[[Plan], Profile]
) -> int:
    """Run or submit every combination.

    Args:
        args: of `launch`.
        path, recipe: the recipe's file and what it says; its model and data were looked at.
        profile_of: the site that is meant, with --slurm.

    Returns:
        The exit code; of a sweep on this machine 3 where a task failed, 75 where it was stopped.

    Raises:
        UserError: nothing was started.
    """
    assert recipe.name is not None and recipe.sweep is not None
    tasks = tasks_of(path, args.overrides)
    for warning in check_tasks(tasks, strict=not args.dry_run):
        warn(warning)
    plans = plan_tasks(tasks)
    for warning in dict.fromkeys(warning for plan in plans for warning in plan.warnings):
        warn(warning)
    run_dir = args.run_dir or Path("runs") / recipe.name
    text = path.read_text(encoding="utf-8-sig")
    if args.slurm is not None:
        return _submit(args, recipe, tasks, plans, text, run_dir, profile_of(plans[0]))
    return _run(args, tasks, plans, text, run_dir)


def _submit(
    args: argparse.Namespace,
    recipe: Recipe,
    tasks: Sequence[Task],
    plans: Sequence[Plan],
    text: str,
    run_dir: Path,
    profile: Profile,
) -> int:
    from decompft.slurm.chain import read_chain
    from decompft.slurm.header import WARNING_S
    from decompft.slurm.sweep import submit_sweep, sweep_script

    assert recipe.name is not None and recipe.sweep is not None
    throttle = recipe.sweep.throttle
    chain = read_chain(args.chain, profile, merge_into=args.chain_merge, eval_tasks=args.chain_eval)
    if args.dry_run:
        print(
            sweep_script(
                recipe.name, tasks, plans, profile, run_dir=run_dir, throttle=throttle, warning_s=WARNING_S
            ),
            end="",
        )
        return EXIT_DONE
    jobs = submit_sweep(
        recipe.name, tasks, plans, text, profile, chain,
        run_dir=run_dir, resume=args.resume, throttle=throttle, say=to_stderr,
    )  # fmt: skip
    for job in jobs:
        after = f", after job {job.after[0]}" if job.after else ""
        at_once = f", {throttle} at a time" if throttle else ""
        what = f"{job.array} tasks of {recipe.name}{at_once}, in {run_dir}" if job.array else job.kind
        print(f"job {job.job_id}: {what}{after}")
    print(f"follow: decompft status {run_dir} | decompft cancel {run_dir}")
    return EXIT_DONE


def _run(
    args: argparse.Namespace, tasks: Sequence[Task], plans: Sequence[Plan], text: str, run_dir: Path
) -> int:
    """One after the other; a task that fails does not keep the others from running."""
    from rich.console import Console

    from decompft.launcher import local

    left = tasks_to_run(run_dir, tasks, resume=args.resume)
    if not args.dry_run:
        make_folder(run_dir, text, tasks)
    codes = [EXIT_DONE]
    for task in left:
        print(f"\ntask {task.index + 1} of {len(tasks)}: {words_of(task.parameters)}", flush=True)
        try:
            code = local.launch(
                plans[task.index],
                text,
                run_dir=run_dir / task.folder,
                resume=args.resume,
                console=Console(),
                typed=(args.recipe, *args.overrides),
                dry_run=args.dry_run,
            )
        except RunFailed as error:
            to_stderr(f"error: {error}")
            code = EXIT_FAILED
        codes.append(code)
        if code in (EXIT_USER, EXIT_AGAIN):  # the next one would be wrong too; or Ctrl-C means all
            break
    if is_sweep(run_dir) and not args.dry_run:
        from decompft.slurm.sweep_table import read_table, to_lines

        print("", *to_lines(read_table(run_dir)), sep="\n")
    return next((code for code in (EXIT_USER, EXIT_AGAIN, EXIT_FAILED) if code in codes), EXIT_DONE)
