"""What is written down when another job takes the place of one that saved, on a site that does not requeue?"""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace

from decompft.launcher.runs import RunDir
from decompft.slurm.run_files import SCRIPT, script_path
from decompft.slurm.submit import Submission, append, read_submissions


def hand_over(run: RunDir, old: str, new: str) -> tuple[str, ...]:
    """Add the successor to slurm/jobs.jsonl, and once more each job that waits for `old`, now for `new`.

    Returns:
        Ids of those jobs, which Slurm must be told too: they wait for a job that did not end well.
    """
    newest = {submission.job_id: submission for submission in read_submissions(run)}
    before = newest.get(old)
    if before is None:  # of a job that was submitted by hand nothing is written down
        text = script_path(run).read_bytes()
        before = Submission(
            job_id=old, cluster="", kind="train", script=SCRIPT, sha256=hashlib.sha256(text).hexdigest()
        )
    now_s = round(time.time(), 3)
    append(run, replace(before, job_id=new, time_s=now_s))
    waiting = [submission for submission in newest.values() if old in submission.after]
    for submission in waiting:
        after = tuple(new if job_id == old else job_id for job_id in submission.after)
        append(run, replace(submission, after=after, time_s=now_s))
    return tuple(submission.job_id for submission in waiting)
