"""Drill: a run that stops in order in the middle and is resumed ends as one that was never stopped."""

from __future__ import annotations

from decompft.launcher.checkpoints import newest_valid, step_of
from decompft.launcher.drill_setting import Setting, Unbroken
from decompft.launcher.drill_verdicts import Verdict, judge, no_end, not_applicable, same_end
from decompft.launcher.drill_watch import began_at
from decompft.launcher.errors import EXIT_AGAIN

_PART = "stopped in order, resumed"
_STOPS = "it stops at the step asked for, with exit code 75"
_SAVED = "a whole checkpoint of that step is there"
_GOES_ON = "the resume begins with that checkpoint"
_FIRST = "the resume trains again"


def drill(setting: Setting, unbroken: Unbroken) -> list[Verdict]:
    """Run it; a launch after the unbroken one, and another."""
    name, stop = "stopped", setting.steps // 2 + 1  # a step that is not saved anyway
    run = setting.run(name)
    setting.say(f"{name}: stops in order after step {stop}")
    with setting.launch(name, f"train.stop_after_steps={stop}") as launch:
        ended = launch.wait(unbroken.limit_s)
    checkpoint, skipped = newest_valid(run.checkpoints_dir)
    saved = 0 if checkpoint is None else step_of(checkpoint)
    told = "; ".join(skipped) or f"the newest is of step {saved or 'none'}"
    rows = [
        judge(_PART, _STOPS, ended.code == EXIT_AGAIN, ended.text),
        judge(_PART, _SAVED, saved == stop and not skipped, told),
    ]
    if ended.code != EXIT_AGAIN:
        reason = "it did not stop in order"
        return [
            *rows,
            *(not_applicable(_PART, c, reason) for c in (_GOES_ON, _FIRST)),
            *no_end(_PART, reason),
        ]
    with setting.launch(name, resume=True) as launch:
        first_s = launch.seconds if launch.until(lambda now: now.step > stop) else None
        ended = launch.wait(unbroken.limit_s)
    setting.say(f"{name}: resumed, {ended.text}")
    began = began_at(run, 2)
    rows.append(judge(_PART, _GOES_ON, began == saved > 0, f"begins after step {began}, saved was {saved}"))
    if first_s is None:
        rows.append(judge(_PART, _FIRST, False, ended.text))
    else:
        measured = f"first step {first_s:.1f} s after the command; unbroken {unbroken.first_step_s:.1f} s"
        rows.append(
            judge(_PART, _FIRST, True, measured, first_step_s=first_s, unbroken_s=unbroken.first_step_s)
        )
    return [*rows, *same_end(_PART, unbroken.run, run, failure=ended.failure)]
