"""What is to be typed next when a run has ended before its end."""

from __future__ import annotations

import shlex
from itertools import count
from pathlib import Path

from decompft.launcher.checkpoints import find_problem, is_suspect, newest_valid
from decompft.launcher.outcome import Outcome
from decompft.launcher.plan import Plan
from decompft.launcher.runs import RunDir

_SLOWER = 0.5  # the factor of the learning rate that is proposed after a divergence


def next_command(run: RunDir, plan: Plan, typed: tuple[str, ...], outcome: Outcome) -> str:
    """The command that goes on from here; after a loss that was not finite, a fork with a lower learning rate.

    Args:
        typed: recipe and overrides as the user typed them.
    """
    typed = _without_reached_stop(plan, typed, outcome.step)
    if outcome.cause == "non_finite":
        return _with_lower_rate(run, plan, typed)
    return _launch(*typed, "--resume", "auto", "--run-dir", str(run.path))


def _with_lower_rate(run: RunDir, plan: Plan, typed: tuple[str, ...]) -> str:
    """The same recipe would come to the same loss again: data and random draws are functions of the step."""
    key = "train.learning_rate="
    lower = f"{key}{_SLOWER * plan.recipe.train.learning_rate:g}"
    words = (*(word for word in typed if not word.startswith(key)), lower)
    checkpoint = _before_the_divergence(run)
    resume = () if checkpoint is None else ("--resume", str(checkpoint))
    return _launch(*words, *resume, "--run-dir", str(_free(run.path)))


def _before_the_divergence(run: RunDir) -> Path | None:
    """The newest checkpoint that is not suspect, of the run or that it was forked from; else a suspect one, if any."""
    newest, _ = newest_valid(run.checkpoints_dir)
    if newest is not None and not is_suspect(newest):
        return newest
    origin = run.read_origin()
    return origin if origin is not None and find_problem(origin) is None else newest


def _free(path: Path) -> Path:
    """A folder beside the run's that does not exist."""
    return next(new for n in count(2) if not (new := path.with_name(f"{path.name}-{n}")).exists())


def _without_reached_stop(plan: Plan, typed: tuple[str, ...], step: int) -> tuple[str, ...]:
    """The words to type next; with a stop_after_steps that was reached they would stop at once again."""
    stop_after = plan.recipe.train.stop_after_steps
    if stop_after is None or step < stop_after:
        return typed
    key = "train.stop_after_steps="
    return (*(word for word in typed if not word.startswith(key)), f"{key}null")


def _launch(*words: str) -> str:
    return shlex.join(("decompft", "launch", *words))
