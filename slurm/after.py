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
    gave_up: bool = False  # the job ended for what was counted
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
    code = outcome.exit_code
    if outcome.result in ("finished", "user_error"):
        return Decision(act="exit", code=code, why=outcome.result, record=replace(record, failures=0))
    if outcome.result == "checkpointed" or outcome.cause == "preempted":
        return _after_stop(outcome, record, saved_step=saved_step, ends=ends)
    failures = 1 if saved_step > record.step else record.failures + 1
    record = replace(record, failures=failures, step=max(saved_step, record.step))
    if failures > cap:
        return _gives_up(record, cap)
    exclude: tuple[str, ...] = ()
    if outcome.node and outcome.cause in _NODE_CAUSES:
        record, exclude = _blame(record, [outcome.node])
    why = f"failure {failures} of at most {cap} in a row"
    if exclude:
        why += f"; {exclude[0]} was at fault {_SUSPICIONS} times and is left out"
    lost = {outcome.node} if outcome.cause == "node_lost" else set()
    stays = not ends and _can_stay(job, {*lost, *record.excluded})
    return Decision(act="here" if stays else "requeue", code=code, why=why, record=record, exclude=exclude)


def decide_unfit(
    bad: Sequence[str],
    chosen: Sequence[str],
    record: Record,
    job: Job,
    *,
    cap: int,
    unsure: Sequence[str] = (),
) -> Decision:
    """After a node check that failed: leave the bad nodes out, unless it is not the nodes.

    Args:
        bad: nodes that did not pass.
        chosen: nodes that were to train.
        unsure: those of `bad` that may only have been late; it takes a second time to leave them out.
    """
    record = replace(record, failures=record.failures + 1)
    if len(chosen) > 1 and set(bad) == set(chosen):
        why = "no node passed the check: look at its report before blaming them"
        return Decision(act="exit", code=EXIT_FAILED, why=why, record=replace(record, gave_up=True))
    if record.failures > cap:
        return _gives_up(record, cap)
    record, twice = _blame(record, unsure)
    exclude = tuple(node for node in bad if node in twice or node not in unsure)
    record = replace(record, excluded=tuple(sorted({*record.excluded, *exclude})))
    why = f"without {', '.join(exclude)}, which did not pass the node check"
    if not exclude:
        why = f"{', '.join(bad)} did not pass the node check, and may only have been late"
    act: Act = "here" if _can_stay(job, record.excluded) else "requeue"
    return Decision(act=act, code=EXIT_FAILED, why=why, record=record, exclude=exclude)


def begin_again(record: Record) -> Record:
    """Whoever submits a run again that gave up has changed something: it counts from the beginning, with all nodes."""
    return Record(step=record.step) if record.gave_up else record


def count_stop(record: Record, saved_step: int) -> Record:
    """One more stop, in order or without a word; those in a row without a step between them are counted."""
    idle = 0 if saved_step > record.step else record.idle_stops + 1
    return replace(record, step=max(saved_step, record.step), idle_stops=idle)


def too_short(record: Record) -> str:
    """Why the run is not to be started again, when it never came to a step; else ""."""
    if record.idle_stops <= _IDLE_STOPS:
        return ""
    return f"stopped {record.idle_stops} times in a row before it had made a step: its time is too short"


def fit_hosts(hosts: Iterable[str], unfit: Iterable[str]) -> tuple[str, ...]:
    """The nodes of an allocation that ranks can start on; none without the first, which the script runs on."""
    names, out = tuple(hosts), set(unfit)
    if not names or names[0] in out:
        return ()
    return tuple(name for name in names if name not in out)


def _after_stop(outcome: Outcome, record: Record, *, saved_step: int, ends: bool) -> Decision:
    """A stop in order, or one that came before the ranks could hear it: nobody's fault, and no place to stay."""
    record = count_stop(record, saved_step)
    why = "told to end from outside before there was anything to save"
    if outcome.result == "checkpointed":
        record, why = replace(record, failures=0), "state saved, more to do"
    act: Act = "requeue"
    if ends:
        act, why = "exit", "stopped as asked"
    elif idle := too_short(record):
        act, why, record = "exit", idle, replace(record, gave_up=True)
    return Decision(act=act, code=outcome.exit_code, why=why, record=record)


def _gives_up(record: Record, cap: int) -> Decision:
    why = f"{record.failures} failures in a row without progress, slurm.max_failures is {cap}"
    return Decision(act="exit", code=EXIT_FAILED, why=why, record=replace(record, gave_up=True))


def _blame(record: Record, nodes: Iterable[str]) -> tuple[Record, tuple[str, ...]]:
    """Suspect nodes once more; also those of them that are to be left out from now on."""
    suspects = dict(record.suspects)
    for node in nodes:
        suspects[node] = suspects.get(node, 0) + 1
    exclude = tuple(node for node, times in suspects.items() if times >= _SUSPICIONS)
    for node in exclude:
        del suspects[node]
    excluded = tuple(sorted({*record.excluded, *exclude}))
    return replace(record, suspects=suspects, excluded=excluded), exclude


def _can_stay(job: Job, unfit: Iterable[str]) -> bool:
    return not job.is_stopping and len(fit_hosts(job.hosts, {*job.down, *unfit})) >= job.fewest


def read_record(run: RunDir) -> Record:
    try:
        row: dict[str, Any] = json.loads(_path(run).read_bytes())
    except (OSError, ValueError):
        return Record()
    known = {key: row[key] for key in asdict(Record()) if key in row} if isinstance(row, dict) else {}
    return Record(**{**known, "excluded": tuple(known.get("excluded", ()))})


def write_record(run: RunDir, record: Record) -> None:
    _path(run).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**asdict(record), "updated_s": round(time.time(), 3)}, indent=2, sort_keys=True)
    write_atomic(_path(run), text + "\n")


def _path(run: RunDir) -> Path:
    return run.path / "slurm/state.json"
