"""What the job script asks Python for, on its first node: a run directory to start, an exit code to end with.

python -m decompft.slurm.batch begin RUN_DIR --device cuda|cpu [--peer HOST] RECIPE [KEY=VALUE ...]
python -m decompft.slurm.batch end RUN_DIR INCARNATION SRUN_CODE
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from decompft.launcher import checking, planner, shipped, source
from decompft.launcher.ending import conclude, report
from decompft.launcher.errors import DecompftError, PlanError
from decompft.launcher.resume import choose_start
from decompft.launcher.runs import RunDir


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="decompft.slurm.batch")
    verbs = parser.add_subparsers(required=True)
    begin = verbs.add_parser("begin")
    begin.add_argument("run_dir", type=Path)
    begin.add_argument("--peer", default="", help="another node of the job, if there is one")
    begin.add_argument("--device", required=True, help="what the script asked Slurm for")
    begin.add_argument("recipe")
    begin.add_argument("overrides", nargs="*", default=[])
    begin.set_defaults(run=_begin)
    end = verbs.add_parser("end")
    end.add_argument("run_dir", type=Path)
    end.add_argument("incarnation", type=int)
    end.add_argument("code", type=int)
    end.set_defaults(run=_end)
    args = parser.parse_args(argv)
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
    family, kind, protocol, _, where = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(where)  # of a datagram socket: chooses a route, sends nothing
        return str(probe.getsockname()[0])


def _begin(args: argparse.Namespace) -> int:
    """Make or continue the run; print `INCARNATION ADDRESS PORT [CHECKPOINT NAME]` for the script to read."""
    recipe_path = shipped.find(args.recipe)
    recipe = source.load(recipe_path, args.overrides)
    for warning in checking.check(recipe, strict=True):
        _say(f"warning: {warning}")
    plan = planner.make(recipe)
    if plan.world.device != args.device:
        raise PlanError(
            f"{socket.gethostname()}: the job was planned for {args.device}, here it is {plan.world.device}",
            "ask for GPUs in the script (gpus-per-node), or print it again where the GPUs are known",
        )
    start = choose_start(plan, run_dir=args.run_dir, resume="auto")
    for note in start.notes:
        _say(note)
    start.run.record(recipe_text=recipe_path.read_text(encoding="utf-8-sig"), plan=plan)
    incarnation = start.run.next_incarnation()
    job_id = os.environ.get("SLURM_JOB_ID", "")
    checkpoint = "" if start.checkpoint is None else start.checkpoint.name
    start.run.append_event(
        "start", incarnation=incarnation, world_size=plan.world.size, slurm_job=job_id, checkpoint=checkpoint
    )
    print(incarnation, address_towards(args.peer), _free_port(), checkpoint)
    return 0


def _end(args: argparse.Namespace) -> int:
    run = RunDir.open(args.run_dir)
    outcome = conclude(run, args.incarnation, args.code)
    report(run, args.incarnation, outcome, again="sbatch the same script; it resumes", say=_say)
    return outcome.exit_code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))  # on every address: the other nodes come from outside
        return int(probe.getsockname()[1])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
