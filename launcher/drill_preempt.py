"""Drill: SIGTERM to the launcher while it prepares, loads, trains and evaluates, and a resume after each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from decompft.launcher.checkpoints import newest_valid, step_of
from decompft.launcher.drill_launch import Ended, Launch
from decompft.launcher.drill_setting import Setting, Unbroken, resume_to_end
from decompft.launcher.drill_verdicts import Verdict, judge, not_applicable, same_end
from decompft.launcher.drill_watch import Look, began_at
from decompft.launcher.errors import EXIT_AGAIN
from decompft.launcher.outcome import read_outcome
from decompft.launcher.runs import RunDir

_NAME = "preempted"
_ORDER = "it stops in order: exit code 75"
_TIME = "it is gone within checkpoint.grace_s, before a scheduler kills"
_SAVED = "the state at the stop is saved"
_NEXT = "the next launch goes on at the step after"
_CLEAR = "nothing was trained, and nothing is in the way of the same command"
_RESUMED = "resumed after every stop"


@dataclass(frozen=True, kw_only=True)
class _Stop:
    """A launch that was told to stop, and what it left."""

    ended: Ended
    at: Look  # at the signal
    began: int  # step that this launch went on from
    saved: int  # newest whole checkpoint afterwards; 0: none
    stopped: int  # step that outcome.json names; 0: none


def drill(setting: Setting, unbroken: Unbroken) -> list[Verdict]:
    """Run it: four launches that are told to stop, each continuing the one before, and one that finishes."""
    rows: list[Verdict] = []
    stops: list[_Stop] = []
    for what, run_phase, judge_phase in (
        ("preparing", _while_preparing, _judge_preparing),
        ("training", _while_training, _judge_saved),
        ("loading", _while_loading, _judge_loading),
        ("evaluating", _while_evaluating, _judge_saved),
    ):
        part = f"SIGTERM while {what}"
        if what == "evaluating" and setting.eval_every is None:
            rows += _none(part, "nothing is held out (data.eval, data.eval_fraction)")
            continue
        stop = run_phase(setting, unbroken)
        if isinstance(stop, Ended):
            setting.say(f"{_NAME}: it ended before it could be caught {what}: {stop.text}")
            if stop.failure:
                rows.append(judge(part, f"the run gets as far as {what}", False, stop.text))
                rows += _none(part, "there was no signal")
                break
            rows += _none(part, "the run was over before it could be caught there; use more --steps")
            continue
        setting.say(f"{_NAME}: SIGTERM while {what}: {stop.ended.text}")
        rows += [_in_order(part, stop), _in_time(part, setting, stop), *judge_phase(part, setting, stop)]
        if what != "preparing":
            stops.append(stop)
    ended = resume_to_end(setting, _NAME, unbroken)
    if stops:
        rows.append(_goes_on(setting, stops))
    return [*rows, *same_end(_RESUMED, unbroken.run, setting.run(_NAME), failure=ended.failure)]


def _while_preparing(setting: Setting, unbroken: Unbroken) -> _Stop | Ended:
    return _stop(
        setting, unbroken, lambda launch: launch.until(lambda now: now.has_plan and not now.incarnation)
    )


def _while_training(setting: Setting, unbroken: Unbroken) -> _Stop | Ended:
    # in the first half, so that an evaluation is still to come
    last = setting.steps // 2 - 2
    return _stop(setting, unbroken, lambda launch: launch.catch(lambda now: 1 <= now.step <= last))


def _while_loading(setting: Setting, unbroken: Unbroken) -> _Stop | Ended:
    run, size = setting.run(_NAME), setting.plan.world.size

    def is_loading(now: Look) -> bool:
        # the log exists: the rank's own process runs, past the interpreter's start
        logs = [run.rank_log(now.incarnation, rank) for rank in range(size)]
        return now.incarnation > 0 and all(log.exists() for log in logs) and not now.has_event("load")

    return _stop(setting, unbroken, lambda launch: launch.until(is_loading))


def _while_evaluating(setting: Setting, unbroken: Unbroken) -> _Stop | Ended:
    def is_evaluating(now: Look) -> bool:
        is_due = (
            now.has_event("load")
            and 0 < now.step < setting.steps
            and now.step % (setting.eval_every or 1) == 0
        )
        return is_due and not now.has_event("eval", now.step)

    return _stop(setting, unbroken, lambda launch: launch.catch(is_evaluating))


def _stop(setting: Setting, unbroken: Unbroken, find: Callable[[Launch], Look | None]) -> _Stop | Ended:
    """Launch or continue, send the signal at the moment that `find` waits for; or how it ended before."""
    run = setting.run(_NAME)
    with setting.launch(_NAME, resume=run.plan_path.exists()) as launch:
        at = find(launch)
        if at is None:
            return launch.wait(unbroken.limit_s)
        launch.ask_to_stop()
        launch.release()
        ended = launch.wait(unbroken.limit_s)
    outcome = read_outcome(run.incarnation_dir(at.incarnation)) if at.incarnation else None
    return _Stop(
        ended=ended, at=at, began=began_at(run, at.incarnation), saved=_newest(run),
        stopped=0 if outcome is None or outcome.result != "checkpointed" else outcome.step,
    )  # fmt: skip


def _in_order(part: str, stop: _Stop) -> Verdict:
    where = f"signal after step {stop.at.step}: " if stop.at.step else ""
    return judge(part, _ORDER, stop.ended.code == EXIT_AGAIN, where + stop.ended.text)


def _in_time(part: str, setting: Setting, stop: _Stop) -> Verdict:
    seconds, grace_s = stop.ended.seconds, setting.plan.recipe.checkpoint.grace_s
    is_ended = stop.ended.code is not None and seconds <= grace_s
    measured = f"{seconds:.1f} s from signal to exit, of {grace_s:.0f} s"
    return judge(part, _TIME, is_ended, measured, signal_to_exit_s=seconds, grace_s=grace_s)


def _judge_preparing(part: str, setting: Setting, stop: _Stop) -> list[Verdict]:
    has_run = setting.run(_NAME).plan_path.exists()
    return [judge(part, _CLEAR, not has_run, f"{'a' if has_run else 'no'} plan.json is left in its folder")]


def _judge_loading(part: str, setting: Setting, stop: _Stop) -> list[Verdict]:
    measured = f"began from step {stop.began}; newest checkpoint: step {stop.saved or 'none'}"
    if not stop.began:
        return [not_applicable(part, _SAVED, "nothing was trained yet")]
    return [judge(part, _SAVED, stop.saved >= stop.began, measured)]


def _judge_saved(part: str, setting: Setting, stop: _Stop) -> list[Verdict]:
    measured = f"stopped after step {stop.stopped or 'none'}; newest checkpoint: step {stop.saved or 'none'}"
    return [judge(part, _SAVED, stop.saved == stop.stopped >= stop.at.step > 0, measured)]


def _goes_on(setting: Setting, stops: list[_Stop]) -> Verdict:
    """Each launch that followed a stop began with what the stop had saved."""
    run = setting.run(_NAME)
    pairs = [(stop.saved, began_at(run, stop.at.incarnation + 1)) for stop in stops]
    measured = ", ".join(f"saved {saved}, next began after {began}" for saved, began in pairs)
    return judge(_RESUMED, _NEXT, all(saved == began for saved, began in pairs), measured)


def _none(part: str, reason: str) -> list[Verdict]:
    return [not_applicable(part, claim, reason) for claim in (_ORDER, _TIME, _SAVED)]


def _newest(run: RunDir) -> int:
    checkpoint, _ = newest_valid(run.checkpoints_dir)
    return 0 if checkpoint is None else step_of(checkpoint)
