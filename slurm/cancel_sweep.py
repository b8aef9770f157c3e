"""How is a sweep ended? Each task as a run of its own, those that wait first, so that none starts meanwhile."""

from __future__ import annotations

from pathlib import Path

from decompft.launcher.errors import EXIT_DONE
from decompft.launcher.runs import RunDir
from decompft.launcher.say import Say
from decompft.slurm.cancel import cancel
from decompft.slurm.commands import call
from decompft.slurm.run_list import list_runs
from decompft.slurm.submit import read_submissions


def cancel_sweep(path: Path, *, now: bool, say: Say) -> int:
    """End what waits or runs of a sweep; by default all ranks save first.

    Returns:
        The worst exit code of `cancel` of the tasks.

    Raises:
        UserError, SlurmError: as `cancel`.
    """
    statuses = [status for status in list_runs(path).rows if status.is_live]
    statuses.sort(key=lambda status: status.state != "queued")
    codes = [cancel(status.seen.run.path, now=now, say=say) for status in statuses]
    # the array waited for it; one that has ended is cancelled without a word
    for submission in read_submissions(RunDir(path)):
        if submission.kind == "prepare":
            call(["scancel", submission.job_id], cluster=submission.cluster)
    if not statuses:
        say(f"{path}: nothing of it is queued or running")
    return max(codes, default=EXIT_DONE)
