"""With which nodes, plan and checkpoint does a job make or continue its run?"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
from collections.abc import Sequence
from dataclasses import replace

from decompft.launcher import checking, fetched, machine, planner, shipped, source
from decompft.launcher.checkpoints import list_checkpoints, put_back, step_of
from decompft.launcher.errors import EXIT_FAILED, PlanError, SlurmError, UserError
from decompft.launcher.outcome import read_outcome
from decompft.launcher.plan import Plan
from decompft.launcher.recipe import Recipe
from decompft.launcher.resume import Start, choose_start
from decompft.launcher.runs import RunDir
from decompft.launcher.say import Say
from decompft.slurm.after import (
    Job,
    Record,
    begin_again,
    count_stop,
    decide_unfit,
    fit_hosts,
    read_record,
    too_short,
    write_record,
)
from decompft.slurm.frozen import read_frozen
from decompft.slurm.run_files import (
    JobStart,
    forget_cancelling,
    measured_save_s,
    read_start,
    script_path,
    write_start,
)

# beside the measured save: the slowest step, and ranks that notice the stop a little later
_PATIENCE_S = 60.0
_LEAST_GRACE_S, _LEAVE_S = 5.0, 5.0  # ranks need a little to leave, once they have saved


def begin(args: argparse.Namespace, say: Say) -> tuple[object, ...]:
    """Make or continue the run.

    Returns:
        The words for the script: `start INCARNATION ADDRESS COUNT NODES PATIENCE_S CHECKPOINT|-`, `requeue NODES|-`,
        or `exit CODE`.

    Raises:
        UserError: the run is another job's, or cannot be made or continued so.
        SlurmError: a node's name does not resolve.
    """
    run = RunDir(args.run_dir)
    _refuse_second(run, args)
    recipe, text = _recipe(args, say)
    if args.grace is not None:
        recipe = _within_grace(recipe, args.grace)
    record, given = begin_again(read_record(run)), args.hosts.split()
    hosts = fit_hosts(given, {*args.down.split(), *record.excluded})
    if hosts and args.device == "cuda" and (why := _gpus_missing()):
        return _without_this_node(run, record, recipe, args, f"{hosts[0]} is not fit to train: {why}", say)
    if len(hosts) < recipe.parallel.fewest_nodes:
        why = f"{len(hosts)} of {len(given)} nodes are fit, {recipe.parallel.fewest_nodes} are needed"
        record = count_stop(record, record.step)
        if too_long := too_short(record):
            return _ends_here(run, record, f"{why}; {too_long}", say)
        write_record(run, record)
        # given back a node that was left out before: Slurm must be told again
        came_back = set(given) & set(record.excluded)
        return _back_to_the_queue(run, args, why, record.excluded if came_back else (), say)
    plan = _plan(recipe, len(hosts), args.device, say)
    hosts = hosts[: plan.world.nodes]
    address = address_towards(hosts[1] if len(hosts) > 1 else "")
    put_back(run.checkpoints_dir)
    forget_cancelling(run, args.job)
    start = choose_start(plan, run_dir=args.run_dir, resume="auto")
    if _left_no_word(run):
        record = count_stop(record, _step(start))
        if why := too_short(record):
            return _ends_here(
                run, record, f"{why}, or it is killed without a word; look at {run.path / 'logs'}", say
            )
    run.record(recipe_text=text, plan=plan)
    incarnation = run.next_incarnation()
    saved = list_checkpoints(run.checkpoints_dir)
    if saved and step_of(saved[-1]) > _step(start):
        # a rank that was thought dead has saved until the claim; from now on it cannot
        start = choose_start(plan, run_dir=args.run_dir, resume="auto")
    for note in start.notes:
        say(note)
    write_record(run, replace(record, step=_step(start)))
    _note_job(run, incarnation, args, hosts)
    run.append_event(
        "start", incarnation=incarnation, world_size=plan.world.size, slurm_job=args.job,
        checkpoint=None if start.checkpoint is None else str(start.checkpoint), nodes=list(hosts),
    )  # fmt: skip
    return (
        "start", incarnation, address, len(hosts), ",".join(hosts),
        round(plan.recipe.checkpoint.grace_s + 2 * measured_save_s(run) + _PATIENCE_S),
        _word_for(start),
    )  # fmt: skip


def _word_for(start: Start) -> str:
    """The checkpoint: its name in the run, or the whole path of one of the run that this one was forked from."""
    if start.checkpoint is None:
        return "-"
    is_own = start.checkpoint.parent == start.run.checkpoints_dir
    return start.checkpoint.name if is_own else str(start.checkpoint)


def address_towards(peer: str) -> str:
    """This node's address on the way to another one; its own name may resolve to 127.0.1.1."""
    if not peer:
        return "127.0.0.1"
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
    except socket.gaierror as error:
        raise SlurmError(
            f"{socket.gethostname()}: the name of node {peer} does not resolve here ({error.strerror})",
            "the site's administrator must mend it (DNS or /etc/hosts of the nodes)",
        ) from error
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(where)  # of a datagram socket: chooses a route, sends nothing
        return str(probe.getsockname()[0])


def _refuse_second(run: RunDir, args: argparse.Namespace) -> None:
    """Two jobs in one run directory would fence each other off for ever."""
    before = read_start(run.incarnation_dir(run.newest_incarnation()))
    if before is not None and before.job_id != args.job and before.job_id in args.live.split():
        raise UserError(
            f"{run.path}: job {before.job_id} is running in this directory",
            "wait for it, end it with `decompft cancel`, or choose another place with --run-dir DIR",
        )


def _recipe(args: argparse.Namespace, say: Say) -> tuple[Recipe, str]:
    """The recipe that the job runs, and the text that it was written in."""
    if args.recipe is None:
        return read_frozen(RunDir(args.run_dir))
    path = shipped.find(args.recipe)
    recipe = fetched.pinned(source.load(path, args.override), args.run_dir)
    for warning in checking.check(recipe, strict=True):
        say(f"warning: {warning}")
    return recipe, path.read_text(encoding="utf-8-sig")


def _within_grace(recipe: Recipe, grace_s: float) -> Recipe:
    """Ranks that do not come to the end of a step must have saved before a preemption's kill."""
    longest = max(_LEAST_GRACE_S, grace_s - _LEAVE_S)
    if recipe.checkpoint.grace_s <= longest:
        return recipe
    checkpoint = recipe.checkpoint.model_copy(update={"grace_s": longest})
    return recipe.model_copy(update={"checkpoint": checkpoint})


def _gpus_missing() -> str:
    """Whether this node has fewer GPUs than Slurm gave the job on it, in words; else ""."""
    told = os.environ.get("SLURM_GPUS_ON_NODE", "")
    given, found = int(told) if told.isdecimal() else 0, machine.detect().num_gpus
    return f"Slurm gave {given} GPUs on it, {found} can be seen" if found < given else ""


def _without_this_node(
    run: RunDir, record: Record, recipe: Recipe, args: argparse.Namespace, why: str, say: Say
) -> tuple[object, ...]:
    """The script runs on the node that is at fault, so the job has to go elsewhere."""
    job = Job(
        hosts=tuple(args.hosts.split()), down=tuple(args.down.split()),
        fewest=recipe.parallel.fewest_nodes, is_stopping=False,
    )  # fmt: skip
    decision = decide_unfit(job.hosts[:1], job.hosts, record, job, cap=recipe.slurm.max_failures)
    write_record(run, decision.record)
    if decision.act == "exit":
        say(f"{why}; {decision.why}")
        return "exit", decision.code
    return _back_to_the_queue(run, args, why, decision.record.excluded, say)


def _ends_here(run: RunDir, record: Record, why: str, say: Say) -> tuple[object, ...]:
    say(why)
    write_record(run, replace(record, gave_up=True))
    return "exit", EXIT_FAILED


def _back_to_the_queue(
    run: RunDir, args: argparse.Namespace, why: str, without: Sequence[str], say: Say
) -> tuple[object, ...]:
    say(why)
    run.path.mkdir(parents=True, exist_ok=True)  # of a script that was submitted by hand there is none yet
    run.append_event("requeue", reason=why, job_id=args.job, exclude=list(without))
    return "requeue", ",".join(without) or "-"


def _plan(recipe: Recipe, num_hosts: int, device: str, say: Say) -> Plan:
    """For as many of the nodes as the batch can be spread over, within what the recipe allows."""
    problem: PlanError | None = None
    for count in range(min(num_hosts, recipe.parallel.most_nodes), recipe.parallel.fewest_nodes - 1, -1):
        parallel = recipe.parallel.model_copy(update={"nodes": count})
        try:
            plan = planner.make(recipe.model_copy(update={"parallel": parallel}))
        except PlanError as error:
            problem = problem or error
            continue
        if plan.world.device != device:
            raise PlanError(
                f"{socket.gethostname()}: the job was planned for {device}, here it is {plan.world.device}",
                "ask for GPUs in the script (gpus-per-node), or print it again where the GPUs are known",
            )
        if count < num_hosts:
            say(f"{num_hosts} nodes are there, {count} are used")
        # what the recipe allows stays in the plan: the next incarnation may get other nodes
        asked = plan.recipe.parallel.model_copy(update={"nodes": recipe.parallel.nodes})
        return plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"parallel": asked})})
    assert problem is not None
    raise problem


def _step(start: Start) -> int:
    return 0 if start.checkpoint is None else step_of(start.checkpoint)


def _left_no_word(run: RunDir) -> bool:
    """Whether the job that was here last was killed before it could say how its ranks ended."""
    before = run.incarnation_dir(run.newest_incarnation())
    return read_start(before) is not None and read_outcome(before) is None


def _note_job(run: RunDir, incarnation: int, args: argparse.Namespace, hosts: tuple[str, ...]) -> None:
    start = JobStart(job_id=args.job, task=args.task or None, restart=args.restart, nodes=hosts)
    write_start(run.incarnation_dir(incarnation), start)
    script = script_path(run)
    if args.script is not None and not script.exists() and args.script.is_file():
        shutil.copyfile(args.script, script)  # a successor job is made from it
