"""What the job script asks Python for, on the first node of its job. It answers in words for `read`.

begin    makes or continues the run: `start INCARNATION ADDRESS PORT COUNT NODES PATIENCE_S CHECKPOINT|-` or `requeue`
checked  what the nodes said of themselves: `fit`, else as `end`
end      what to do now that the ranks are gone: `exit CODE`, `here`, or `requeue NODES|-`
succeed  another job takes this one's place: the ids of the jobs that waited for this one

Nothing here calls a program of Slurm's: inside a container there is none. The script passes on what Slurm knows.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from decompft.launcher import checking, fetched, node_report, planner, shipped, source
from decompft.launcher.checkpoints import list_checkpoints, put_back, step_of
from decompft.launcher.ending import conclude, report
from decompft.launcher.errors import EXIT_AGAIN, DecompftError, PlanError, SlurmError, UserError
from decompft.launcher.outcome import Outcome, write_atomic, write_outcome
from decompft.launcher.plan import Plan
from decompft.launcher.recipe import Recipe
from decompft.launcher.resume import choose_start
from decompft.launcher.runs import RunDir
from decompft.slurm.after import (
    Decision,
    Job,
    Record,
    decide,
    decide_unfit,
    fit_hosts,
    read_record,
    write_record,
)
from decompft.slurm.frozen import read_frozen
from decompft.slurm.successor import hand_over

# beside the measured save: the slowest step, and ranks that notice the stop a little later
_PATIENCE_S = 60.0
_LEAST_GRACE_S, _LEAVE_S = 5.0, 5.0  # ranks need a little to leave, once they have saved


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
        return code
    except DecompftError as error:
        _say(f"error: {error}")
        return error.exit_code


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


def _begin(args: argparse.Namespace) -> int:
    run = RunDir(args.run_dir)
    _refuse_second(run, args)
    recipe, text = _recipe(args)
    if args.grace is not None:
        recipe = _within_grace(recipe, args.grace)
    record = read_record(run)
    hosts = fit_hosts(args.hosts.split(), {*args.down.split(), *record.excluded})
    if len(hosts) < recipe.parallel.fewest_nodes:
        _say(
            f"{len(hosts)} of {len(args.hosts.split())} nodes are fit, {recipe.parallel.fewest_nodes} are needed"
        )
        run.append_event("requeue", reason="too few fit nodes", job_id=args.job, exclude=[])
        # given back a node that was left out before: Slurm must be told again
        came_back = set(args.hosts.split()) & set(record.excluded)
        print("requeue", ",".join(record.excluded) if came_back else "-")
        return 0
    plan = _plan(recipe, len(hosts), args.device)
    hosts = hosts[: plan.world.nodes]
    put_back(run.checkpoints_dir)
    _forget_cancelling(run, args.job)
    start = choose_start(plan, run_dir=args.run_dir, resume="auto")
    for note in start.notes:
        _say(note)
    run.record(recipe_text=text, plan=plan)
    incarnation = run.next_incarnation()
    step = 0 if start.checkpoint is None else step_of(start.checkpoint)
    write_record(run, _at_step(record, step))
    _note_job(run, incarnation, args, hosts)
    checkpoint = "-" if start.checkpoint is None else start.checkpoint.name
    run.append_event(
        "start", incarnation=incarnation, world_size=plan.world.size, slurm_job=args.job,
        checkpoint=None if start.checkpoint is None else str(start.checkpoint), nodes=list(hosts),
    )  # fmt: skip
    patience = plan.recipe.checkpoint.grace_s + 2 * measured_save_s(run) + _PATIENCE_S
    address = address_towards(hosts[1] if len(hosts) > 1 else "")
    print(
        "start", incarnation, address, _free_port(), len(hosts), ",".join(hosts), round(patience), checkpoint
    )
    return 0


def _checked(args: argparse.Namespace) -> int:
    from rich.console import Console

    run = RunDir.open(args.run_dir)
    if _is_stale(run, args.incarnation):
        return 0
    chosen = args.nodes.split(",")
    report = node_report.read(run.incarnation_dir(args.incarnation) / "nodes", chosen)
    report.show(Console(stderr=True))
    if report.user_error is not None:
        raise report.user_error
    if not report.bad:
        print("fit -")
        return 0
    node, why = report.bad[0]
    outcome = Outcome(
        result="failed", message=f"{node} is not fit to train: {why}", node=node, cause="node_lost",
        meaning="a node did not pass the check before training", evidence=why,
        hint="leave it out; `decompft doctor --slurm PROFILE` and the site's administrators may know more",
    )  # fmt: skip
    write_outcome(run.incarnation_dir(args.incarnation), outcome)
    plan = run.read_plan()
    decision = decide_unfit(
        [name for name, _ in report.bad], chosen, read_record(run), _job(args, plan),
        cap=plan.recipe.slurm.max_failures,
    )  # fmt: skip
    return _act(run, args, outcome, decision)


def _end(args: argparse.Namespace) -> int:
    run = RunDir.open(args.run_dir)
    if _is_stale(run, args.incarnation):
        return 0
    outcome = _at_slurms_node(run, args.incarnation, conclude(run, args.incarnation, args.code))
    plan = run.read_plan()
    stop_after = plan.recipe.train.stop_after_steps
    ends = is_cancelled(run) or (stop_after is not None and outcome.step >= stop_after)
    saved = [step_of(path) for path in list_checkpoints(run.checkpoints_dir)]
    decision = decide(
        outcome, read_record(run), _job(args, plan), saved_step=max(saved, default=0), ends=ends,
        cap=plan.recipe.slurm.max_failures,
    )  # fmt: skip
    return _act(run, args, outcome, decision)


def _is_stale(run: RunDir, incarnation: int) -> bool:
    """A node that was cut off and comes back must not speak for a run that goes on elsewhere."""
    newest = run.newest_incarnation()
    if newest > incarnation:
        _say(f"incarnation {newest} of the run has started elsewhere; this one, {incarnation}, is over")
        print("exit", EXIT_AGAIN)
    return newest > incarnation


def _succeed(args: argparse.Namespace) -> int:
    print(*hand_over(RunDir.open(args.run_dir), args.job, args.next))
    return 0


def _job(args: argparse.Namespace, plan: Plan) -> Job:
    return Job(
        hosts=tuple(args.hosts.split()), down=tuple(args.down.split()),
        fewest=plan.recipe.parallel.fewest_nodes, is_stopping=bool(args.signal),
    )  # fmt: skip


def _act(run: RunDir, args: argparse.Namespace, outcome: Outcome, decision: Decision) -> int:
    """Say and write down how the incarnation ended and what comes next, and tell the script."""
    write_record(run, decision.record)
    again = {
        "exit": f"sbatch the same script; it resumes ({decision.why})",
        "here": f"starting again in this job ({decision.why})",
        "requeue": f"back into the queue ({decision.why})",
    }[decision.act]
    report(run, args.incarnation, outcome, again=again, say=_say)
    if decision.act == "exit":
        print("exit", decision.code)
        return 0
    run.append_event(
        "requeue" if decision.act == "requeue" else "restart",
        incarnation=args.incarnation, reason=decision.why, job_id=args.job, exclude=list(decision.exclude),
    )  # fmt: skip
    # Slurm replaces a job's list of excluded nodes: it is told all of them
    print(decision.act, ",".join(decision.record.excluded if decision.exclude else ()) or "-")
    return 0


def _at_slurms_node(run: RunDir, incarnation: int, outcome: Outcome) -> Outcome:
    """The node by Slurm's name for it: ranks and torchrun know it by others (localhost, a full domain name)."""
    nodes: list[str] = _start_of(run, incarnation).get("nodes", [])
    if not outcome.node or outcome.node in nodes:
        return outcome
    short = [node for node in nodes if node.split(".")[0] == outcome.node.split(".")[0]]
    if not short and outcome.rank is not None and nodes:
        # torchrun's agents have the numbers of Slurm's nodes, but under c10d
        short = [nodes[min(outcome.rank // run.read_plan().world.ranks_per_node, len(nodes) - 1)]]
    return replace(outcome, node=short[0] if short else outcome.node)


def _forget_cancelling(run: RunDir, job: str) -> None:
    """`decompft cancel` meant the jobs of that time, not one that the user submitted since."""
    path = run.path / "slurm/cancelled"
    try:
        if job not in json.loads(path.read_bytes())["jobs"]:
            path.unlink()
    except (OSError, ValueError, KeyError, TypeError):
        return


def _start_of(run: RunDir, incarnation: int) -> dict[str, Any]:
    """Job and nodes of an incarnation; empty when it was not a job's."""
    try:
        row: dict[str, Any] = json.loads((run.incarnation_dir(incarnation) / "slurm.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return row


def is_cancelled(run: RunDir) -> bool:
    """Whether `decompft cancel` asked this run to end; a later submission forgets it."""
    return (run.path / "slurm/cancelled").exists()


def measured_save_s(run: RunDir) -> float:
    """Seconds that the slowest save of the run took; 0 while there was none."""
    longest = 0.0
    try:
        lines = (run.path / "events.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return longest
    for line in lines:
        if '"save"' in line:
            try:
                longest = max(longest, float(json.loads(line)["save_s"]))
            except (ValueError, KeyError, TypeError):
                continue  # a line that a crash cut short
    return longest


def _recipe(args: argparse.Namespace) -> tuple[Recipe, str]:
    """The recipe that the job runs, and the text that it was written in."""
    if args.recipe is None:
        return read_frozen(RunDir(args.run_dir))
    path = shipped.find(args.recipe)
    recipe = fetched.pinned(source.load(path, args.override), args.run_dir)
    for warning in checking.check(recipe, strict=True):
        _say(f"warning: {warning}")
    return recipe, path.read_text(encoding="utf-8-sig")


def _plan(recipe: Recipe, num_hosts: int, device: str) -> Plan:
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
            _say(f"{num_hosts} nodes are there, {count} are used")
        # what the recipe allows stays in the plan: the next incarnation may get other nodes
        asked = plan.recipe.parallel.model_copy(update={"nodes": recipe.parallel.nodes})
        return plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"parallel": asked})})
    assert problem is not None
    raise problem


def _within_grace(recipe: Recipe, grace_s: float) -> Recipe:
    """Ranks that do not come to the end of a step must have saved before a preemption's kill."""
    longest = max(_LEAST_GRACE_S, grace_s - _LEAVE_S)
    if recipe.checkpoint.grace_s <= longest:
        return recipe
    checkpoint = recipe.checkpoint.model_copy(update={"grace_s": longest})
    return recipe.model_copy(update={"checkpoint": checkpoint})


def _refuse_second(run: RunDir, args: argparse.Namespace) -> None:
    """Two jobs in one run directory would fence each other off for ever."""
    row = _start_of(run, run.newest_incarnation())
    if row and row["job_id"] != args.job and row["job_id"] in args.live.split():
        raise UserError(
            f"{run.path}: job {row['job_id']} is running in this directory",
            "wait for it, end it with `decompft cancel`, or choose another place with --run-dir DIR",
        )


def _note_job(run: RunDir, incarnation: int, args: argparse.Namespace, hosts: Sequence[str]) -> None:
    row = {
        "job_id": args.job, "restart": args.restart, "task": args.task or None, "nodes": list(hosts),
        "time_s": round(time.time(), 3),
    }  # fmt: skip
    write_atomic(run.incarnation_dir(incarnation) / "slurm.json", json.dumps(row, sort_keys=True) + "\n")
    script = run.path / "slurm/train.sbatch"
    if args.script is not None and not script.exists() and args.script.is_file():
        shutil.copyfile(args.script, script)  # a successor job is made from it


def _at_step(record: Record, step: int) -> Record:
    return replace(record, step=step)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))  # on every address: the other nodes come from outside
        return int(probe.getsockname()[1])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="decompft.slurm.batch")
    verbs = parser.add_subparsers(required=True)

    def verb(name: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name)
        sub.add_argument("run_dir", type=Path)
        sub.add_argument("--job", default=os.environ.get("SLURM_JOB_ID", ""))
        if name == "succeed":
            return sub
        sub.add_argument("--hosts", required=True, help="nodes of the job, in Slurm's order, by blanks")
        sub.add_argument("--down", default="", help="those that Slurm has given up")
        return sub

    begin = verb("begin")
    begin.add_argument("--device", required=True, help="what the script asked Slurm for")
    begin.add_argument("--grace", type=float, help="seconds from a preemption's notice to the kill")
    begin.add_argument("--live", default="", help="job ids of this user that run")
    begin.add_argument("--restart", type=int, default=int(os.environ.get("SLURM_RESTART_COUNT") or 0))
    begin.add_argument("--task", default=os.environ.get("SLURM_ARRAY_TASK_ID", ""))
    begin.add_argument("--script", type=Path, help="the job script, as Slurm keeps it")
    begin.add_argument("--recipe", help="default: the one frozen in the run directory")
    begin.add_argument("--override", action="append", default=[], metavar="KEY=VALUE")
    begin.set_defaults(run=_begin)
    checked = verb("checked")
    checked.add_argument("incarnation", type=int)
    checked.add_argument("--nodes", required=True, help="those that were to train, by commas")
    checked.add_argument("--signal", default="")
    checked.set_defaults(run=_checked)
    end = verb("end")
    end.add_argument("incarnation", type=int)
    end.add_argument("code", type=int)
    end.add_argument("--signal", default="", help="what told the script that the time is up")
    end.set_defaults(run=_end)
    succeed = verb("succeed")
    succeed.add_argument("--next", required=True, help="the job that goes on with the run")
    succeed.set_defaults(run=_succeed)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
