"""How does a run stand, and why did it fail? In words, from what its folder says."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from decompft.launcher.failure import log_tail
from decompft.launcher.outcome import Outcome
from decompft.launcher.plan import Plan
from decompft.launcher.report_data import Event, Seen
from decompft.launcher.report_text import LIMIT, duration

Word = Literal["finished", "checkpointed", "failed", "running", "silent", "not started"]

_QUIET_S = 600.0  # without a word for so long, a run that holds no lock here is called silent
_MAX_TRACEBACKS = 8


@dataclass(frozen=True, kw_only=True)
class Total:
    """How many steps the run is to have."""

    steps: int | None
    is_exact: bool = True

    def beside(self, step: int) -> str:
        """`step 12 of 20`."""
        if self.steps is None:
            return f"step {step:,}"
        return f"step {step:,} of {'' if self.is_exact else 'about '}{self.steps:,}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A run's state in a word and in a line."""

    word: Word
    line: str
    total: Total


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A death in words."""

    facts: tuple[tuple[str, str], ...]  # (what, in words), the first rank to fail first
    texts: tuple[tuple[str, str], ...]  # (title, lines): the end of its log, stacks, tracebacks


def judge(seen: Seen) -> Verdict:
    """Finished, checkpointed, failed, running, silent or not started; with the step it got to."""
    total = _total(seen)
    where = total.beside(seen.step)
    newest = seen.incarnations[-1] if seen.incarnations else None
    if newest is not None and newest.outcome is not None:
        outcome = newest.outcome
        if seen.is_held:
            return Verdict(word="running", line=f"at {where}: it is being launched again", total=total)
        if outcome.result == "finished":
            return Verdict(word="finished", line=f"at {where}", total=total)
        if outcome.result == "checkpointed":
            line = (
                f"at {where}: {outcome.message or 'stopped in order'}; its state is saved, it can be resumed"
            )
            return Verdict(word="checkpointed", line=line, total=total)
        what = "it cannot train: " if outcome.result == "user_error" else ""
        return Verdict(word="failed", line=f"at {where}: {what}{outcome.message}", total=total)
    if newest is None:
        line = "it is being prepared; no rank was started yet" if seen.is_held else "no rank was ever started"
        return Verdict(word="running" if seen.is_held else "not started", line=line, total=total)
    quiet = None if seen.written_s is None else max(seen.now_s - seen.written_s, 0.0)
    if quiet is None:
        said = "nothing was written yet"
    else:
        said = f"its last word came {duration(quiet) if quiet >= 1 else 'less than 1 s'} before this page"
    if seen.is_held or (quiet is not None and quiet < max(_QUIET_S, 20 * _step_s(seen))):
        return Verdict(word="running", line=f"at {where}; {said}", total=total)
    line = f"at {where}: no outcome was left, and {said}; it was cut off, hangs, or runs on another machine"
    return Verdict(word="silent", line=line, total=total)


def total_steps(plan: Plan, step: int, logged: tuple[int, float], newest: Outcome | None) -> Total:
    """How many steps the run is to have, as far as it can be known.

    Args:
        step: optimizer steps done.
        logged: step and epoch of the last row of metrics.jsonl; (0, 0.0) without one.
        newest: outcome of the newest incarnation.
    """
    train = plan.recipe.train
    if newest is not None and newest.result == "finished":
        return Total(steps=step)
    if train.max_steps is not None:
        return Total(steps=train.max_steps)
    if train.epochs is None:
        return Total(steps=None)
    if plan.steps_per_epoch is not None:
        return _about(train.epochs * plan.steps_per_epoch, step)
    return _about(train.epochs * logged[0] / logged[1], step) if logged[1] > 0 else Total(steps=None)


def explain_failure(seen: Seen) -> Failure | None:
    """Who failed first, when, of what, what shows it, and what to type next; None when the last start did not."""
    newest = seen.incarnations[-1] if seen.incarnations else None
    if newest is None or newest.outcome is None or newest.outcome.result not in ("failed", "user_error"):
        return None
    outcome = newest.outcome
    events = [event for event in seen.events if event.incarnation == newest.number]
    told = next((event for event in reversed(events) if event.name == "failure"), None)
    path, lines = log_tail(seen.run, newest.number, outcome.rank)
    shown = [(f"end of {path.relative_to(seen.run.path)}", "\n".join(line[:500] for line in lines))]
    for event in events:
        stack = event.details.get("stack")
        if event.name == "hang" and isinstance(stack, list):
            shown.append((f"where rank {event.details.get('rank')} stood still", "\n".join(map(str, stack))))
    # the end of a traceback says what happened
    ranks = list(newest.ranks.items())[:_MAX_TRACEBACKS]
    shown += [(f"traceback of rank {rank}", str(said.traceback)[-LIMIT:]) for rank, said in ranks]
    return Failure(
        facts=tuple((what, words) for what, words in _facts(seen, outcome, told) if words),
        texts=tuple((title, content) for title, content in shown if content),
    )


def _facts(seen: Seen, outcome: Outcome, event: Event | None) -> Iterator[tuple[str, str]]:
    who = "not known" if outcome.rank is None else f"rank {outcome.rank}"
    yield "first to fail", f"{who} on {outcome.node}" if outcome.node else who
    yield "last step", f"{outcome.step:,}" if outcome.step else "none was done"
    yield "what happened", str(outcome.message)
    yield "cause", f"{outcome.meaning} ({outcome.cause})" if outcome.meaning else str(outcome.cause)
    yield "evidence", "" if str(outcome.evidence) in str(outcome.message) else str(outcome.evidence)
    yield "what to do", str(outcome.hint)
    others = (f"rank {k}" for k in seen.incarnations[-1].ranks if k != outcome.rank)
    yield "others that failed", ", ".join(others)
    # what the launcher said last; without it, the recipe's name is not known
    again = shlex.join(("decompft", "launch", "RECIPE", "--resume", "auto", "--run-dir", str(seen.run.path)))
    yield "next command", again if event is None else str(event.details.get("next") or again)


def _total(seen: Seen) -> Total:
    newest = seen.incarnations[-1].outcome if seen.incarnations else None
    rows = seen.rows
    logged = (rows.steps[-1], rows.columns["epoch"][-1]) if rows.steps else (0, 0.0)
    return total_steps(seen.plan, seen.step, logged, newest)


def _about(steps: float, step: int) -> Total:
    return Total(steps=max(round(steps), step) if math.isfinite(steps) else None, is_exact=False)


def _step_s(seen: Seen) -> float:
    times = [value for value in seen.rows.columns["step_s"][-50:] if value == value]
    return statistics.median(times) if times else 0.0
