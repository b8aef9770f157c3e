"""What the job script asks Python for, on the first node of its job. It answers in words for `read`.

begin    makes or continues the run: `start INCARNATION ADDRESS COUNT NODES PATIENCE_S CHECKPOINT|-`, else as `end`
checked  what the nodes said of themselves: `fit`, else as `end`
end      what to do now that the ranks are gone: `exit CODE`, `here`, or `requeue NODES|-`
succeed  another job takes this one's place: the ids of the jobs that waited for this one

Nothing here calls a program of Slurm's: inside a container there is none. The script passes on what Slurm knows.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from decompft.launcher import node_report
from decompft.launcher.again import next_command
from decompft.launcher.checkpoints import is_suspect, list_checkpoints, step_of
from decompft.launcher.ending import conclude, report
from decompft.launcher.errors import EXIT_AGAIN, DecompftError
from decompft.launcher.node_file import nodes_dir
from decompft.launcher.outcome import Outcome, write_outcome
from decompft.launcher.plan import Plan
from decompft.launcher.runs import RunDir
from decompft.launcher.say import to_stderr
from decompft.slurm.after import Decision, Job, decide, decide_unfit, read_record, write_record
from decompft.slurm.begin import begin
from decompft.slurm.run_files import cancelled_path, read_start
from decompft.slurm.successor import hand_over


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
        return code
    except DecompftError as error:
        to_stderr(f"error: {error}")
        return error.exit_code


def _begin(args: argparse.Namespace) -> int:
    print(*begin(args, to_stderr))
    return 0


def _checked(args: argparse.Namespace) -> int:
    from rich.console import Console

    run = RunDir.open(args.run_dir)
    if _is_stale(run, args.incarnation):
        return 0
    chosen = args.nodes.split(",")
    said = node_report.read(nodes_dir(run.incarnation_dir(args.incarnation)), chosen)
    said.show(Console(stderr=True))
    if said.user_error is not None:
        raise said.user_error
    if not said.bad:
        print("fit -")
        return 0
    node, why = said.bad[0]
    outcome = Outcome(
        result="failed", message=f"{node} is not fit to train: {why}", node=node, cause="node_lost",
        meaning="a node did not pass the check before training", evidence=why,
        hint="leave it out; `decompft doctor --slurm PROFILE` and the site's administrators may know more",
    )  # fmt: skip
    write_outcome(run.incarnation_dir(args.incarnation), outcome)
    plan = run.read_plan()
    decision = decide_unfit(
        [name for name, _ in said.bad], chosen, read_record(run), _job(args, plan),
        cap=plan.recipe.slurm.max_failures, unsure=said.unsure,
    )  # fmt: skip
    return _act(run, args, outcome, decision)


def _end(args: argparse.Namespace) -> int:
    run = RunDir.open(args.run_dir)
    if _is_stale(run, args.incarnation):
        return 0
    outcome = _at_slurms_node(run, args.incarnation, conclude(run, args.incarnation, args.code))
    plan = run.read_plan()
    stop_after = plan.recipe.train.stop_after_steps
    ends = cancelled_path(run).exists() or (stop_after is not None and outcome.step >= stop_after)
    # a resume goes on before a suspect one: it is no progress
    saved = [step_of(path) for path in list_checkpoints(run.checkpoints_dir) if not is_suspect(path)]
    decision = decide(
        outcome, read_record(run), _job(args, plan), saved_step=max(saved, default=0), ends=ends,
        cap=plan.recipe.slurm.max_failures,
    )  # fmt: skip
    return _act(run, args, outcome, decision)


def _is_stale(run: RunDir, incarnation: int) -> bool:
    """A node that was cut off and comes back must not speak for a run that goes on elsewhere."""
    newest = run.newest_incarnation()
    if newest > incarnation:
        to_stderr(f"incarnation {newest} of the run has started elsewhere; this one, {incarnation}, is over")
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
        "exit": f"{_after_exit(run, outcome)} ({decision.why})",
        "here": f"starting again in this job ({decision.why})",
        "requeue": f"back into the queue ({decision.why})",
    }[decision.act]
    report(run, args.incarnation, outcome, again=again, say=to_stderr)
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


def _after_exit(run: RunDir, outcome: Outcome) -> str:
    if outcome.cause == "non_finite":
        return f"{next_command(run, run.read_plan(), ('RECIPE',), outcome)} --slurm"
    return "sbatch the same script; it resumes"


def _at_slurms_node(run: RunDir, incarnation: int, outcome: Outcome) -> Outcome:
    """The node by Slurm's name for it: ranks and torchrun know it by others (localhost, a full domain name)."""
    start = read_start(run.incarnation_dir(incarnation))
    nodes = () if start is None else start.nodes
    if not outcome.node or outcome.node in nodes:
        return outcome
    short = [node for node in nodes if node.split(".")[0] == outcome.node.split(".")[0]]
    if not short and outcome.rank is not None and nodes:
        # torchrun's agents have the numbers of Slurm's nodes, but under c10d
        short = [nodes[min(outcome.rank // run.read_plan().world.ranks_per_node, len(nodes) - 1)]]
    return replace(outcome, node=short[0] if short else outcome.node)


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
