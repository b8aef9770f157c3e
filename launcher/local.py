"""From a plan to running ranks on this machine, and back to an exit code."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from decompft.launcher.again import next_command
from decompft.launcher.causes import describe_exit
from decompft.launcher.checkpoints import completed_at, put_back, step_of
from decompft.launcher.ending import conclude, report
from decompft.launcher.errors import EXIT_AGAIN, EXIT_FAILED, EXIT_USER, PlanError, RunFailed
from decompft.launcher.job import base_env, free_port, make_job, prepare_argv
from decompft.launcher.machine import detect
from decompft.launcher.outcome import Outcome, write_outcome
from decompft.launcher.plan import Forecast, Plan
from decompft.launcher.processes import process_age_s
from decompft.launcher.refusals import absent_deepspeed
from decompft.launcher.resume import Start, choose_start
from decompft.launcher.runs import RunDir
from decompft.launcher.say import Say
from decompft.launcher.supervise import Interrupts, PortTaken, start, supervise

if TYPE_CHECKING:
    from rich.console import Console

_PORT_TRIES = 5


def launch(
    plan: Plan,
    recipe_text: str,
    *,
    run_dir: Path | None,
    resume: str | None,
    console: Console,
    typed: tuple[str, ...] = ("RECIPE",),
    dry_run: bool = False,
) -> int:
    """Run a plan on this machine.

    Args:
        recipe_text: the recipe file, verbatim.
        run_dir: default runs/NAME under the current folder.
        resume: None, "auto", a run or a checkpoint.
        typed: recipe and overrides as the user typed them, for the next command to type.
        dry_run: say what would happen; start and write nothing.

    Returns:
        The exit code: 0 finished, 2 the input is wrong, 3 failed, 75 stopped in order.

    Raises:
        UserError: nothing was started.
        RunFailed: preparing broke, or no port could be had; a failure of the ranks is reported instead.
    """
    say = _speaker(console)
    if plan.world.nodes > 1:
        raise PlanError(
            f"parallel.nodes: {plan.world.nodes} nodes cannot be started from here",
            "set parallel.nodes=1, or print a job script with `decompft sbatch`",
        )
    _refuse_absent_gpus(plan)
    absent = absent_deepspeed(plan.strategy)
    if absent:
        raise PlanError(absent, "pip install 'decompft[deepspeed]', or use parallel.strategy: fsdp")
    path = run_dir or Path("runs") / plan.name
    looked_at = completed_at(RunDir(path).checkpoints_dir)
    begin = choose_start(plan, run_dir=path, resume=resume)
    lock = None if dry_run else begin.run.lock()
    try:
        if lock is not None and not begin.is_new:
            put_back(begin.run.checkpoints_dir)
            if completed_at(begin.run.checkpoints_dir) != looked_at:
                # again, now that no other launch can write a checkpoint meanwhile; it reads the newest one whole
                begin = choose_start(plan, run_dir=path, resume=resume)
        for line in (*begin.notes, summary_line(plan), forecast_line(plan.forecast)):
            say(line)
        if lock is None:
            _describe(plan, begin, say)
            return 0
        with Interrupts() as interrupts:
            if begin.is_new and begin.checkpoint is not None:
                begin.run.write_origin(begin.checkpoint)
            begin.run.record(recipe_text=recipe_text, plan=plan)
            planned_s, began = process_age_s(), time.monotonic()
            code = prepare(plan, begin.run, interrupts=interrupts, lock=lock, say=say)
            took = {"plan_s": round(planned_s, 3), "prepare_s": round(time.monotonic() - began, 3)}
            if code != 0 and begin.is_new:
                begin.run.forget()
            is_stopped = code == EXIT_AGAIN and not begin.is_new
            if (
                code in (EXIT_USER, EXIT_FAILED, EXIT_AGAIN) and not is_stopped
            ):  # the reason is on the terminal already
                return code
            if code != 0 and not is_stopped:
                message = f"{path}: preparing model and data {describe_exit(code)}"
                raise RunFailed(message, "its output above says why")
            if is_stopped:
                incarnation, outcome = _stopped_before_ranks(plan, begin, took, interrupts.last)
            else:
                incarnation, outcome = _run_ranks(
                    plan, begin, took, interrupts=interrupts, lock=lock, say=say
                )
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "free some space, or choose another place with --run-dir DIR" if is_full else ""
        raise RunFailed(f"{error.filename or path}: {error.strerror or error}", hint) from error
    finally:
        if lock is not None:
            os.close(lock)
    again = next_command(begin.run, plan, typed, outcome)
    report(begin.run, incarnation, outcome, again=again, say=say)
    return outcome.exit_code


def prepare(plan: Plan, run: RunDir, *, interrupts: Interrupts, lock: int, say: Say) -> int:
    """Convert and tokenize in a child; its exit code, or 75 when a signal ended it."""
    child = start(prepare_argv(run.path.absolute()), base_env(plan), lock=lock)
    has_told = False
    while True:
        try:
            code = child.wait(0.2)
            break
        except subprocess.TimeoutExpired:
            if interrupts.count and not has_told:
                has_told = True
                child.terminate()
            elif interrupts.count > 1:
                child.kill()
    if interrupts.count:
        say(f"{interrupts.last}: stopped while preparing; no rank was started")
        return EXIT_AGAIN
    return code


def summary_line(plan: Plan) -> str:
    """What runs where, in a line."""
    ranks = "1 rank" if plan.world.size == 1 else f"{plan.world.size} ranks"
    batch = plan.batch
    rows = f"{batch.micro_size} x {batch.accumulation} x {plan.world.size}"
    where = f"{plan.strategy} on {ranks} ({plan.world.device})"
    return f"{plan.name}: {where}, batch {rows} = {batch.global_size} rows"


def forecast_line(forecast: Forecast) -> str:
    """The memory forecast in a line: the total, and its four largest terms unless they are tiny."""
    terms = sorted(forecast.terms, key=lambda term: -term.num_bytes)[:4]
    shown = [(term.name, _gib(term.num_bytes)) for term in terms]
    parts = ", ".join(f"{name} {size}" for name, size in shown if size != "0.00")
    of = "" if forecast.capacity_bytes is None else f" of {_gib(forecast.capacity_bytes)}"
    return f"forecast: {_gib(forecast.total_bytes)}{of} GiB a rank ({parts})"


def _refuse_absent_gpus(plan: Plan) -> None:
    if plan.world.device == "cpu":
        return
    found, wanted = detect().num_gpus, plan.world.ranks_per_node
    if found >= wanted:
        return
    if found:
        raise PlanError(
            f"parallel.gpus_per_node: {wanted} GPUs are planned for, this machine has {found}",
            f"set parallel.gpus_per_node={found}",
        )
    raise PlanError(
        "parallel.gpu_memory_gib: the plan is for GPUs, and this machine has none",
        "launch it where the GPUs are, print a job script with `decompft sbatch`, "
        "or set DECOMPFT_DEVICE=cpu to run on the CPU",
    )


def _run_ranks(
    plan: Plan, begin: Start, took: dict[str, float], *, interrupts: Interrupts, lock: int, say: Say
) -> tuple[int, Outcome]:
    """
    Args:
        took: seconds of what came before, for the `start` event.
    """
    run = begin.run
    for _ in range(_PORT_TRIES):
        incarnation = _begin_incarnation(plan, begin, took)
        job = make_job(plan, run.path, incarnation=incarnation, resume=begin.checkpoint, port=free_port())
        try:
            outcome = supervise(job, run, incarnation, interrupts=interrupts, say=say, lock=lock)
        except PortTaken:
            continue
        return incarnation, outcome
    raise RunFailed(
        f"{run.path}: the rendezvous port was taken {_PORT_TRIES} times in a row",
        "something on this machine opens ports very fast; try again",
    )


def _stopped_before_ranks(
    plan: Plan, begin: Start, took: dict[str, float], signal_name: str
) -> tuple[int, Outcome]:
    """The incarnation of a resume that a signal ended while it prepared: nothing is lost, nothing is new."""
    run = begin.run
    incarnation = _begin_incarnation(plan, begin, took)
    run.append_event("signal", incarnation=incarnation, signal=signal_name, count=1)
    step = 0 if begin.checkpoint is None else step_of(begin.checkpoint)
    kept = "starts from the beginning" if begin.checkpoint is None else f"goes on from {begin.checkpoint}"
    message = f"stopped while preparing; nothing to save, a resume {kept}"
    write_outcome(
        run.incarnation_dir(incarnation), Outcome(result="checkpointed", step=step, message=message)
    )
    return incarnation, conclude(run, incarnation, 0)


def _begin_incarnation(plan: Plan, begin: Start, took: dict[str, float]) -> int:
    incarnation = begin.run.next_incarnation()
    resumed = None if begin.checkpoint is None else str(begin.checkpoint)
    begin.run.append_event(
        "start", incarnation=incarnation, world_size=plan.world.size, checkpoint=resumed, **took
    )
    return incarnation


def _describe(plan: Plan, begin: Start, say: Say) -> None:
    run = begin.run
    # the free port, and the number of the incarnation, are found at the start
    job = make_job(plan, run.path, incarnation=1, resume=begin.checkpoint, port=0)
    say(f"would {'make' if begin.is_new else 'continue'} {run.path}: recipe.yaml plan.json env.json")
    say(f"would prepare: {shlex.join(prepare_argv(run.path.absolute()))}")
    say(f"would run: {shlex.join(job.argv)}")
    for key, value in sorted(job.env.items()):
        say(f"  {key}={shlex.quote(value)}")


def _speaker(console: Console) -> Say:
    def say(line: str) -> None:
        try:
            # no markup: file names and log lines may hold brackets
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        except (OSError, SystemExit):  # rich would exit at a closed pipe
            pass  # the terminal is gone, or `tee` died of our Ctrl-C; the ranks are not

    return say


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f}"
