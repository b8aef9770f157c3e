"""How is a run ended: its state saved first, or at once?"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from decompft.launcher.errors import EXIT_DONE, EXIT_FAILED, SlurmError, UserError
from decompft.launcher.lock_holders import lock_holders
from decompft.launcher.outcome import write_atomic
from decompft.launcher.report_text import duration
from decompft.launcher.runs import RunDir
from decompft.launcher.say import Say
from decompft.slurm.commands import call
from decompft.slurm.glance import Glance, glance, with_resubmitted
from decompft.slurm.queue import Job, find_jobs, my_jobs
from decompft.slurm.run_files import cancelled_path, script_path
from decompft.slurm.watch import again, main_job

_MARGIN_S = (
    60.0  # beside checkpoint.grace_s: a long step, and a rank that looks for the stop file a little later
)
_DEFAULT_GRACE_S = 120.0  # where the plan cannot be read
_POLL_S = 0.2
_ASK_S = 2.0
_WORD_S = 10.0  # between two lines that say that it still waits
_LEAVE_S = 20.0  # for the script to end by itself once the outcome is written
_TWICE_S = 1.5  # a launch takes signals that are less than a second apart for one


def cancel(path: Path, *, now: bool, say: Say) -> int:
    """End a run; by default all ranks save first.

    Returns:
        The exit code: 0 it has ended as asked (or nothing was running), 3 it could not be seen to save.

    Raises:
        UserError: there is no run, or it can only be ended elsewhere.
        SlurmError: Slurm cannot be asked or refuses.
    """
    seen = glance(path)
    if seen.is_slurm:
        seen = with_resubmitted(seen, my_jobs(cluster=seen.cluster))
    jobs = _living(seen)
    if jobs:
        return _cancel_jobs(seen, jobs, now=now, say=say)
    if seen.is_held:
        return _cancel_here(seen, now=now, say=say)
    _refuse_elsewhere(seen)
    say(f"{path}: nothing of it is queued or running")
    say(f"next: {again(seen)}" if not _has_finished(seen) else f"next: decompft report {path}")
    return EXIT_DONE


def cancel_job(job: Job, say: Say) -> int:
    """End a job that is no run's: there is no telling how it saves."""
    _scancel(job)
    say(f"job {job.job_id}: cancelled")
    return EXIT_DONE


def _cancel_jobs(seen: Glance, jobs: Sequence[Job], *, now: bool, say: Say) -> int:
    """Of the jobs of a run: the ones that train are drained, the others have nothing to save."""
    main = main_job(seen, jobs)
    training = main if main is not None and not main.waits and not now else None
    ids = [job.job_id for job in jobs]
    row = {"time_s": round(time.time(), 3), "jobs": sorted({*ids, *(job.raw_id for job in jobs)}), "now": now}
    cancelled_path(seen.run).parent.mkdir(exist_ok=True)
    # first: from here on the job script does not requeue, whatever it is told
    write_atomic(cancelled_path(seen.run), json.dumps(row, sort_keys=True) + "\n")
    for job in jobs:
        if job is not training:
            _scancel(job)
            was = "was waiting in the queue" if job.waits else "was running"
            say(f"job {job.job_id} {was}: cancelled")
    saved = training is None or _drain(seen, training, say)
    if training is not None:
        _scancel(training)
    _await_end(ids, seen.cluster)
    return _conclude(seen, saved=saved, say=say)


def _drain(seen: Glance, job: Job, say: Say) -> bool:
    """Ask the ranks to save and stop; whether they were seen to."""
    run, bound_s = seen.run, _bound_s(seen)
    _touch_stop(seen)
    sent = call(["scancel", "--batch", f"--signal={_signal_of(run)}", job.job_id], cluster=job.cluster)
    if sent.code != 0:
        say(f"scancel: {sent.words}; the stop file will do")
    say(
        f"job {job.job_id}: asked every rank to save and stop, waiting up to {duration(bound_s)} "
        "(Ctrl-C ends the waiting, not the request)"
    )

    def is_gone() -> bool:
        found = find_jobs([job.job_id], cluster=job.cluster, from_accounting=False)
        return not any(one.is_live and not one.waits for one in found)

    return _await_outcome(seen, bound_s, is_gone, say)


def _cancel_here(seen: Glance, *, now: bool, say: Say) -> int:
    """A run that was launched on this machine: what Ctrl-C does in its terminal, once or twice."""
    run = seen.run
    launcher = _launcher(run)
    is_preparing = seen.incarnation == 0 or seen.outcome is not None
    if not is_preparing:
        _touch_stop(seen)
    if (now or is_preparing) and launcher is None:
        raise UserError(
            f"{run.path}: the process that launched it is gone or another user's, and cannot be told",
            "its processes: `decompft launch` on the same folder names those that hold it; end them with kill",
        )
    if launcher is not None and (now or is_preparing):
        os.kill(launcher, signal.SIGTERM)
    if now and launcher is not None:
        time.sleep(_TWICE_S)
        try:
            os.kill(launcher, signal.SIGTERM)
        except ProcessLookupError:
            pass  # the first one was enough
        say(f"told its launcher (pid {launcher}) twice: it kills every rank; what is not saved is lost")
    elif is_preparing:
        say(f"told its launcher (pid {launcher}); no rank was started yet")
    else:
        say(f"asked every rank to save and stop, waiting up to {duration(_bound_s(seen))}")

    def is_gone() -> bool:
        return not glance(run.path).is_held

    if now or is_preparing:
        return _conclude(seen, saved=_await(is_gone, _bound_s(seen)), say=say)
    return _conclude(seen, saved=_await_outcome(seen, _bound_s(seen), is_gone, say), say=say)


def _conclude(seen: Glance, *, saved: bool, say: Say) -> int:
    """Say what is on disk now, and how to go on."""
    after = glance(seen.run.path)
    if _has_finished(after):
        say(f"{seen.run.path}: it finished at step {after.step:,}")
        say(f"next: decompft report {seen.run.path}")
        return EXIT_DONE
    lost = max(after.step - (after.saved_step or 0), 0)
    if not saved:
        say("no rank was seen to save" if lost else "it ended before there was anything new to save")
    if after.saved_step is None:
        say(f"{seen.run.path}: nothing is saved; it would begin at step 0")
    else:
        unsaved = f"; {lost:,} steps after it are lost" if lost else ""
        say(f"{seen.run.path}: saved at step {after.saved_step:,}{unsaved}")
    say(f"next: {again(after)}")
    return EXIT_DONE if saved or not lost else EXIT_FAILED


def _await_outcome(seen: Glance, bound_s: float, is_gone: Callable[[], bool], say: Say) -> bool:
    """Wait until an incarnation leaves its outcome; whether one did before all was gone and the time was up."""
    began_s = asked_s = told_s = time.monotonic()
    has_left_s: float | None = None
    while True:
        now_s = time.monotonic()
        current = glance(seen.run.path)
        if current.incarnation > seen.incarnation:
            _touch_stop(current)  # it was started as we asked
        if current.outcome is None:
            has_left_s = None  # the script had just started its ranks again
        elif current.incarnation:
            if has_left_s is None:
                has_left_s = now_s
                say(f"after {duration(now_s - began_s)}: {current.outcome.message or current.outcome.result}")
            if now_s - has_left_s > _LEAVE_S:
                return current.outcome.result != "failed"
        if now_s - asked_s > _ASK_S:
            asked_s = now_s
            if is_gone():
                last = glance(seen.run.path).outcome
                return last is not None and last.result != "failed"
        if has_left_s is None and now_s - began_s > bound_s:
            return False
        if has_left_s is None and now_s - told_s > _WORD_S:
            told_s = now_s
            doing = f", {current.doing}" if current.doing else ""
            say(f"still waiting after {duration(now_s - began_s)}: step {current.step:,}{doing}")
        time.sleep(_POLL_S)


def _await(is_true: Callable[[], bool], bound_s: float) -> bool:
    end_s = time.monotonic() + bound_s
    while time.monotonic() < end_s:
        if is_true():
            return True
        time.sleep(_POLL_S)
    return False


def _await_end(ids: Sequence[str], cluster: str) -> None:
    """Until Slurm has ended them, so that what is said next is the last word."""

    def are_gone() -> bool:
        return not any(job.is_live for job in find_jobs(ids, cluster=cluster, from_accounting=False))

    end_s = time.monotonic() + _LEAVE_S
    while not are_gone() and time.monotonic() < end_s:
        time.sleep(1.0)


def _living(seen: Glance) -> list[Job]:
    """The run's jobs that wait or run, the ones that follow first: else one would start as its forerunner ends."""
    if not seen.is_slurm:
        return []
    ids = [*(s.job_id for s in seen.submissions), *seen.job_ids[-1:]]
    found = find_jobs(ids, cluster=seen.cluster, from_accounting=False)
    return sorted((job for job in found if job.is_live), key=lambda job: not job.waits)


def _touch_stop(seen: Glance) -> None:
    if seen.incarnation and seen.outcome is None:
        try:
            seen.run.stop_file(seen.incarnation).touch()
        except OSError as error:
            raise UserError(
                f"{seen.run.path}: cannot be written ({error.strerror})",
                "only the run's owner can end it in order; `--now` asks Slurm alone",
            ) from error


def _refuse_elsewhere(seen: Glance) -> None:
    """A local run of another machine looks like a dead one, but for its fresh files."""
    if seen.incarnation == 0 or seen.outcome is not None or seen.is_slurm:
        return
    if seen.written_s is None or time.time() - seen.written_s > _MARGIN_S:
        return
    try:
        node = json.loads((seen.run.incarnation_dir(seen.incarnation) / "pulse-0.json").read_bytes())["node"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if node != platform.node():
        raise UserError(f"{seen.run.path}: its ranks are on {node}", "type this there")


def _launcher(run: RunDir) -> int | None:
    """The process that took the run's lock and still has it open; None when it is not there, or not ours."""
    lock = run.path / "lock"
    return next((pid for pid in lock_holders(lock) if _has_open(pid, lock)), None)


def _has_open(pid: int, path: Path) -> bool:
    """False of a process that has ended (its ranks hold the lock for it), or is another user's."""
    try:
        links = [*Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return False
    for link in links:
        try:
            if link.samefile(path):
                return True
        except OSError:
            continue  # closed meanwhile
    return False


def _signal_of(run: RunDir) -> str:
    """The signal that the job script takes as a request to save; it is the site's choice."""
    try:
        text = script_path(run).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "USR1"
    match = re.search(r"^#SBATCH --signal=B:(\w+)@", text, re.MULTILINE)
    return match.group(1) if match else "USR1"


def _bound_s(seen: Glance) -> float:
    grace_s = _DEFAULT_GRACE_S if seen.plan is None else seen.plan.recipe.checkpoint.grace_s
    return grace_s + max(_MARGIN_S, 2 * (seen.step_s or 0.0))


def _scancel(job: Job) -> None:
    answer = call(["scancel", job.job_id], cluster=job.cluster)
    if answer.code != 0:
        raise SlurmError(
            f"scancel {job.job_id}: {answer.words}",
            "only its owner and administrators can cancel a job",
        )


def _has_finished(seen: Glance) -> bool:
    return seen.outcome is not None and seen.outcome.result == "finished"
