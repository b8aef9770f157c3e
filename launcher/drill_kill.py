"""Drill: SIGKILL to one rank in a step, then to every process in a save; each run is resumed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from decompft.launcher.checkpoint_survey import size_of
from decompft.launcher.checkpoints import newest_valid, step_of
from decompft.launcher.drill_launch import Ended, Launch
from decompft.launcher.drill_setting import Setting, Unbroken, resume_to_end
from decompft.launcher.drill_verdicts import Verdict, judge, no_end, not_applicable, same_end
from decompft.launcher.drill_watch import HALF_WRITTEN, Look, began_at
from decompft.launcher.errors import EXIT_DONE, EXIT_FAILED
from decompft.launcher.outcome import read_outcome

_TRIES = 3  # a fast run may be over before it is caught
_NAMED = "the failure is named: which rank, and that it was killed"
_ENDS = "the launch ends by itself when a rank is gone"
_NEWEST = "the resume takes the newest whole checkpoint"
_LOST = "no step is lost but those since that checkpoint"
_SURVIVES = "the ranks that are left save the last completed step"
_SKIPPED = "a half-written save is passed over, and cleared away"
_KILLED = r"(?i)SIGKILL|signal 9|killed"


@dataclass(frozen=True, kw_only=True)
class _Kill:
    """A run that was killed, at the moment before."""

    name: str  # of its run directory
    at: Look
    ended: Ended | None  # the launcher's own end, when it was left alive


def drill(setting: Setting, unbroken: Unbroken) -> list[Verdict]:
    """Run it: two launches that are killed, two that resume."""
    rank = setting.plan.world.size - 1  # the last one: rank 0 is the easiest to notice
    limit_s = setting.plan.recipe.parallel.timeout_s + unbroken.limit_s
    part = f"SIGKILL to rank {rank} in a step"

    def in_a_step(now: Look) -> bool:
        return bool(now.saved) and now.saved[-1] < now.step < setting.steps

    def kill_one(launch: Launch) -> Ended:
        launch.kill_rank(rank)
        launch.release()
        return launch.wait(limit_s)

    kill = _catch(setting, "rank-killed", in_a_step, kill_one)
    rows = _after(setting, unbroken, part, kill, rank) if isinstance(kill, _Kill) else _missed(part, kill)
    part = "SIGKILL to every process in a save"

    def in_a_save(now: Look) -> bool:
        return bool(now.saved) and now.step < setting.steps and any(size_of(path)[0] for path in now.saving)

    kill = _catch(setting, "job-killed", in_a_save, lambda launch: launch.kill_all())
    return rows + (
        _after(setting, unbroken, part, kill, None) if isinstance(kill, _Kill) else _missed(part, kill)
    )


def _catch(
    setting: Setting, name: str, is_wanted: Callable[[Look], bool], kill: Callable[[Launch], Ended | None]
) -> _Kill | Ended:
    """Start a run, wait for the moment, kill; or how the last of several runs ended before it came to that."""
    for attempt in range(1, _TRIES + 1):
        run_name = name if attempt == 1 else f"{name}-{attempt}"
        setting.say(f"{run_name}: a run that will be killed")
        with setting.launch(run_name) as launch:
            at = launch.catch(is_wanted)
            if at is not None:
                saving = f", {at.saving[0].name} half written" if at.saving else ""
                setting.say(f"{run_name}: killed after step {at.step}, saved {at.saved[-1]}{saving}")
                return _Kill(name=run_name, at=at, ended=kill(launch))
            ended = launch.wait()
        setting.say(f"{run_name}: it ended before it could be caught: {ended.text}")
        if ended.code != EXIT_DONE:
            break
    return ended


def _missed(part: str, ended: Ended) -> list[Verdict]:
    claims = (_NAMED, _ENDS, _NEWEST, _LOST, _SURVIVES, _SKIPPED)
    reason, first = f"{_TRIES} runs were over before they could be caught there; use more --steps", []
    if ended.failure:
        reason, first = (
            "there was no kill",
            [judge(part, "the run gets as far as the kill", False, ended.text)],
        )
    return [*first, *(not_applicable(part, claim, reason) for claim in claims), *no_end(part, reason)]


def _after(setting: Setting, unbroken: Unbroken, part: str, kill: _Kill, rank: int | None) -> list[Verdict]:
    """The verdicts on a killed run, which is resumed for them."""
    run, at = setting.run(kill.name), kill.at
    rows = _naming(part, setting, kill, rank)
    newest, skipped = newest_valid(run.checkpoints_dir)
    saved = 0 if newest is None else step_of(newest)
    half = {path.name: size_of(path)[0] for path in run.checkpoints_dir.glob(HALF_WRITTEN)}
    ended = resume_to_end(setting, kill.name, unbroken)
    began = began_at(run, at.incarnation + 1)
    whole = f"whole on disk: step {saved}; the resume began after step {began}"
    rows.append(judge(part, _NEWEST, began == saved >= at.saved[-1], "; ".join((whole, *skipped))))
    lost = at.step - began
    # an interval, and another one while the save at its end was still being written
    most = 2 * setting.every
    measured = f"{lost} of {at.step} steps, with a save every {setting.every}"
    rows.append(judge(part, _LOST, lost <= most, measured, lost_steps=lost, every_steps=setting.every))
    rows.append(_surviving(part, setting, kill, began))
    left = sorted(path.name for path in run.checkpoints_dir.glob(HALF_WRITTEN))
    if half:
        sizes = ", ".join(f"{name} ({size:,} bytes)" for name, size in sorted(half.items()))
        measured = f"{sizes}: began after step {began}; left at the end: {', '.join(left) or 'nothing'}"
        rows.append(judge(part, _SKIPPED, began == saved and not left, measured))
    else:
        rows.append(not_applicable(part, _SKIPPED, "no save was under way"))
    return [*rows, *same_end(part, unbroken.run, run, failure=ended.failure)]


def _surviving(part: str, setting: Setting, kill: _Kill, began: int) -> Verdict:
    """Only under ddp does each rank hold all that a checkpoint needs."""
    plan = setting.plan
    if kill.ended is None or plan.world.size == 1:
        return not_applicable(part, _SURVIVES, "no rank was left")
    if plan.strategy != "ddp":
        return not_applicable(part, _SURVIVES, f"under {plan.strategy} the killed rank alone held its part")
    # the survivors may not have heard any more that the step they worked on was agreed upon
    lost = max(0, kill.at.step - began)
    measured = f"the last row is of step {kill.at.step}, the resume began after step {began}"
    return judge(part, _SURVIVES, lost <= 1, measured, survivors_lost_steps=lost)


def _naming(part: str, setting: Setting, kill: _Kill, rank: int | None) -> list[Verdict]:
    if kill.ended is None:
        reason = "the launcher was killed too: nobody was left to say it"
        return [not_applicable(part, claim, reason) for claim in (_NAMED, _ENDS)]
    outcome = read_outcome(setting.run(kill.name).incarnation_dir(kill.at.incarnation))
    words = () if outcome is None else (outcome.message, outcome.cause, outcome.meaning)
    told = "; ".join(filter(None, words))
    is_named = outcome is not None and outcome.rank == rank and re.search(_KILLED, told) is not None
    is_ended = kill.ended.code == EXIT_FAILED
    seconds = kill.ended.seconds
    measured = f"{seconds:.1f} s after the kill, with exit code {kill.ended.code}"
    return [
        judge(part, _NAMED, is_named, told or "there is no outcome.json"),
        judge(
            part, _ENDS, is_ended, measured if kill.ended.code is not None else kill.ended.text, end_s=seconds
        ),
    ]
