"""What does a job do when its ranks are gone: end, start them again here, or go back into the queue?

Exit codes cannot say it (torchrun and srun mask them), so it is decided from the incarnation's outcome, the progress
since it began, and what this run has counted before: failures in a row and the nodes that were at fault.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from decompft.launcher.causes import Kind
from decompft.launcher.errors import EXIT_FAILED
from decompft.launcher.outcome import Outcome, write_atomic
from decompft.launcher.runs import RunDir

Act = Literal["exit", "here", "requeue"]

# causes that speak against the node of the first rank to fail; the others would follow the run anywhere
_NODE_CAUSES: tuple[Kind, ...] = (
    "gpu", "node_lost", "network", "hang", "killed", "crash", "out_of_memory_host", "package", "unknown",
)  # fmt: skip
_SUSPICIONS = 2  # until a node is left out
_IDLE_STOPS = 25  # stops in a row without a step, of a job that is never given the time to load its model


@dataclass(frozen=True, kw_only=True)
class Record:
    """What the job counts over its incarnations: slurm/state.json of the run."""

    failures: int = 0  # in a row, without progress between them
    step: int = 0  # of the checkpoint that the newest incarnation began with
    idle_stops: int = 0  # stops in a row without a step between them
    suspects: dict[str, int] = field(default_factory=dict)  # failures that a node was blamed for
    excluded: tuple[str, ...] = ()  # nodes that were left out for it


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the job script does next."""

    act: Act
    code: int  # to exit with, where it does
    why: str  # in words, for the log and events.jsonl
    record: Record
    exclude: tuple[str, ...] = ()  # nodes to leave out from now on


@dataclass(frozen=True, kw_only=True)
class Job:
    """The allocation when the ranks were gone."""

    hosts: tuple[str, ...]  # in Slurm's order; the script runs on the first
    down: tuple[str, ...]  # those that Slurm has given up
    fewest: int  # nodes that the run needs
    is_stopping: bool  # the script was told that the time is up


def decide(outcome: Outcome, record: Record, job: Job, *, saved_step: int, ends: bool, cap: int) -> Decision:
    """The table of docs/slurm.md.

    Args:
        saved_step: of the newest checkpoint.
        ends: a stop was asked for that is not to be continued: `decompft cancel`, train.stop_after_steps.
        cap: failures in a row without progress, after which the job gives up.
    """
    code, has_gained = outcome.exit_code, saved_step > record.step
    if outcome.result in ("finished", "user_error"):
        return Decision(act="exit", code=code, why=outcome.result, record=replace(record, failures=0))
    if outcome.result == "checkpointed":
        idle = 0 if has_gained else record.idle_stops + 1
        kept = replace(record, failures=0, step=saved_step, idle_stops=idle)
        if ends:
            return Decision(act="exit", code=code, why="stopped as asked", record=kept)
        if idle > _IDLE_STOPS:
            why = f"stopped {idle} times in a row before it had made a step: its time is too short"
            return Decision(act="exit", code=code, why=why, record=kept)
        return Decision(act="requeue", code=code, why="state saved, more to do", record=kept)
    if (
        outcome.cause == "preempted"
    ):  # before the ranks could catch the signal: nobody's fault, and no place to stay
        why = "told to end from outside before there was anything to save"
        idle = 0 if has_gained else record.idle_stops + 1
        kept = replace(record, step=max(saved_step, record.step), idle_stops=idle)
        act: Act = "exit" if ends or idle > _IDLE_STOPS else "requeue"
        return Decision(act=act, code=code, why=why, record=kept)
    failures = 1 if has_gained else record.failures + 1
    counted = replace(record, failures=failures, step=max(saved_step, record.step))
    if failures > cap:
        why = f"{failures} failures in a row without progress, slurm.max_failures is {cap}"
        return Decision(act="exit", code=code, why=why, record=counted)
    exclude: tuple[str, ...] = ()
    if outcome.node and outcome.cause in _NODE_CAUSES:
        suspects = counted.suspects | {outcome.node: counted.suspects.get(outcome.node, 0) + 1}
        if suspects[outcome.node] >= _SUSPICIONS:
            exclude = (outcome.node,)
            del suspects[outcome.node]
        excluded = tuple(sorted({*counted.excluded, *exclude}))
        counted = replace(counted, suspects=suspects, excluded=excluded)
    why = f"failure {failures} of at most {cap} in a row"
    if exclude:
        why += f"; {exclude[0]} was at fault {_SUSPICIONS} times and is left out"
    lost = {outcome.node} if outcome.cause == "node_lost" else set()
    left = fit_hosts(job.hosts, {*job.down, *lost, *counted.excluded})
    can_stay = not job.is_stopping and not ends and len(left) >= job.fewest
    return Decision(
        act="here" if can_stay else "requeue", code=code, why=why, record=counted, exclude=exclude
    )


def decide_unfit(
    bad: Sequence[str], chosen: Sequence[str], record: Record, job: Job, *, cap: int
) -> Decision:
    """After a node check that failed: leave the bad nodes out, unless it is not the nodes.

    Args:
        bad: nodes that did not pass.
        chosen: nodes that were to train.
    """
    counted = replace(record, failures=record.failures + 1)
    if len(chosen) > 1 and set(bad) == set(chosen):
        why = "no node passed the check: look at its report before blaming them"
        return Decision(act="exit", code=EXIT_FAILED, why=why, record=counted)
    if counted.failures > cap:
        why = f"{counted.failures} failures in a row without progress, slurm.max_failures is {cap}"
        return Decision(act="exit", code=EXIT_FAILED, why=why, record=counted)
    excluded = tuple(sorted({*record.excluded, *bad}))
    can_stay = not job.is_stopping and len(fit_hosts(job.hosts, {*job.down, *excluded})) >= job.fewest
    return Decision(
        act="here" if can_stay else "requeue",
        code=EXIT_FAILED,
        why=f"without {', '.join(bad)}, which did not pass the node check",
        record=replace(counted, excluded=excluded),
        exclude=tuple(bad),
    )


def fit_hosts(hosts: Iterable[str], unfit: Iterable[str]) -> tuple[str, ...]:
    """The nodes of an allocation that ranks can start on; none without the first, which the script runs on."""
    names, out = tuple(hosts), set(unfit)
    if not names or names[0] in out:
        return ()
    return tuple(name for name in names if name not in out)


def read_record(run: RunDir) -> Record:
    try:
        row: dict[str, Any] = json.loads(_path(run).read_bytes())
    except (OSError, ValueError):
        return Record()
    return Record(
        failures=row["failures"],
        step=row["step"],
        suspects=row["suspects"],
        excluded=tuple(row["excluded"]),
        idle_stops=row.get("idle_stops", 0),
    )


def write_record(run: RunDir, record: Record) -> None:
    _path(run).parent.mkdir(exist_ok=True)
    text = json.dumps({**asdict(record), "updated_s": round(time.time(), 3)}, indent=2, sort_keys=True)
    write_atomic(_path(run), text + "\n")


def _path(run: RunDir) -> Path:
    return run.path / "slurm/state.json"
