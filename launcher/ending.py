"""How an incarnation ended: its outcome when the ranks left none, and the words for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from decompft.launcher.failure import find_failure, log_tail
from decompft.launcher.outcome import Outcome, read_outcome, write_outcome
from decompft.launcher.runs import RunDir
from decompft.launcher.say import Say


def conclude(
    run: RunDir,
    incarnation: int,
    returncode: int,
    *,
    was_killed: bool = False,
    log_start: int = 0,
    oom_kills: int = 0,
) -> Outcome:
    """The outcome of an incarnation whose processes are gone; written to outcome.json where ranks left none.

    Args:
        returncode: of torchrun, of the only rank, or of srun.
        was_killed: by us, at the user's second signal.
        log_start: size in bytes of metrics.jsonl when the incarnation began.
        oom_kills: processes of this machine that the kernel killed for memory since then.
    """
    folder = run.incarnation_dir(incarnation)
    told = read_outcome(folder)
    outcome = told or _find_outcome(run, incarnation, returncode, was_killed, log_start, oom_kills)
    try:
        if told is None:
            write_outcome(folder, outcome)
        run.append_event(
            "end", incarnation=incarnation, result=outcome.result, step=outcome.step, rank=outcome.rank
        )
    except OSError:
        pass  # the disk may be what the run died of; the terminal still says so
    return outcome


def report(run: RunDir, incarnation: int, outcome: Outcome, *, again: str, say: Say) -> None:
    """Say how it ended and what to type next (`again`); a failure goes into events.jsonl in the same words."""
    if outcome.result == "finished":
        say(f"finished at step {outcome.step}: {run.path}")
        return
    if outcome.result == "checkpointed":
        if "stopped in order" in outcome.message or not outcome.message:
            say(f"stopped in order at step {outcome.step}, state saved: {run.path}")
        else:  # cut short, or before the first step
            say(f"{outcome.message}: {run.path}")
        say(f"next: {again}")
        return
    if outcome.result == "failed":
        path, lines = log_tail(run, incarnation, outcome.rank)
        if lines:
            say(f"end of {path}:")
            for line in lines:
                say(f"    | {line}")
    for line in words(outcome):
        say(line)
    # what the user has not mended yet will be refused again
    say(f"next, when that is mended: {again}" if outcome.result == "user_error" else f"next: {again}")
    try:
        run.append_event(
            "failure", incarnation=incarnation, result=outcome.result, cause=outcome.cause, meaning=outcome.meaning,
            rank=outcome.rank, node=outcome.node, step=outcome.step, message=outcome.message,
            evidence=outcome.evidence, hint=outcome.hint, next=again,
        )  # fmt: skip
    except OSError:
        pass  # the disk may be what the run died of; the terminal has just said it


def words(outcome: Outcome) -> list[str]:
    """A failure, line by line: what, who, when, why, by what it was recognised, what to do."""
    what = "cannot train" if outcome.result == "user_error" else "run failed"
    is_named = outcome.rank is None or f"rank {outcome.rank}" in outcome.message
    lines = [f"{what}: {outcome.message}" if is_named else f"{what}: rank {outcome.rank}: {outcome.message}"]
    if outcome.result == "failed":
        if outcome.rank is not None:
            lines.append(
                f"  first to fail: rank {outcome.rank}" + (f" on {outcome.node}" if outcome.node else "")
            )
        lines.append(f"  last step: {outcome.step or 'none'}")
        lines.append(f"  cause: {outcome.cause}" + (f" ({outcome.meaning})" if outcome.meaning else ""))
        if outcome.evidence and outcome.evidence not in outcome.message:
            lines.append(f"  evidence: {outcome.evidence}")
    if outcome.hint:
        lines.append(f"  hint: {outcome.hint}")
    return lines


def last_step(metrics_path: Path, start: int = 0) -> int:
    """The last logged optimizer step after byte `start` of metrics.jsonl; 0 if there is none."""
    if not metrics_path.is_file():
        return 0
    with metrics_path.open("rb") as file:
        file.seek(start)
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue  # cut short by the death we are looking into
    return 0


def _find_outcome(
    run: RunDir, incarnation: int, returncode: int, was_killed: bool, log_start: int, oom_kills: int
) -> Outcome:
    if was_killed:
        outcome = Outcome(
            result="failed",
            message="killed by a second signal before a checkpoint was complete",
            hint="resume from the checkpoint before",
            cause="killed",
            meaning="by the second signal to the launcher",
            evidence="the second signal",
        )
    else:
        outcome = find_failure(run, incarnation, returncode, oom_kills=oom_kills)
    # a rank's pulse may be seconds old, and a step's row is written after the step
    return replace(outcome, step=max(outcome.step, last_step(run.metrics_path, log_start)))
