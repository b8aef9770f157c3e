"""How an incarnation ended: its outcome when the ranks left none, and the words for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from decompft.launcher.failure import find_failure, log_tail
from decompft.launcher.outcome import Outcome, read_outcome, write_outcome
from decompft.launcher.runs import RunDir

Say = Callable[[str], None]


def conclude(
    run: RunDir, incarnation: int, returncode: int, *, was_killed: bool = False, log_start: int = 0
) -> Outcome:
    """The outcome of an incarnation whose processes are gone; written to outcome.json where ranks left none.

    Args:
        returncode: of torchrun, of the only rank, or of srun.
        was_killed: by us, at the user's second signal.
        log_start: size in bytes of metrics.jsonl when the incarnation began.
    """
    folder = run.incarnation_dir(incarnation)
    told = read_outcome(folder)
    outcome = told or _find_outcome(run, incarnation, returncode, was_killed, log_start)
    try:
        if told is None:
            write_outcome(folder, outcome)
        run.append_event(
            "end", incarnation=incarnation, result=outcome.result, step=outcome.step, rank=outcome.rank
        )
    except OSError:
        pass  # the disk may be what the run died of; the terminal still says so
    return outcome


def report(
    run: RunDir, incarnation: int, outcome: Outcome, *, again: str, say: Callable[[str], None]
) -> None:
    """Say how it ended and what to type next (`again`)."""
    if outcome.result == "finished":
        say(f"finished at step {outcome.step}: {run.path}")
        return
    if outcome.result == "checkpointed":
        say(f"stopped in order at step {outcome.step}, state saved: {run.path}")
        say(f"next: {again}")
        return
    what = "cannot train" if outcome.result == "user_error" else "run failed"
    is_named = outcome.rank is None or f"rank {outcome.rank}" in outcome.message
    say(f"{what}: {outcome.message}" if is_named else f"{what}: rank {outcome.rank}: {outcome.message}")
    if outcome.hint:
        say(f"  hint: {outcome.hint}")
    if outcome.result == "failed":
        say(f"  last step: {outcome.step or 'none'}")
        path, lines = log_tail(run, incarnation, outcome.rank)
        if lines:
            say(f"  end of {path}:")
            for line in lines:
                say(f"    | {line}")
    say(f"next: {again}")


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
    run: RunDir, incarnation: int, returncode: int, was_killed: bool, log_start: int
) -> Outcome:
    if was_killed:
        outcome = Outcome(
            result="failed",
            message="killed by a second signal before a checkpoint was complete",
            hint="resume from the checkpoint before",
        )
    else:
        outcome = find_failure(run, incarnation, returncode)
    return outcome if outcome.step else replace(outcome, step=last_step(run.metrics_path, log_start))
