"""How does a run stand: in the queue, at work, done, or in need of a hand?

Slurm's word about the job and the run's own files are put together; a run that was launched on this machine has only
the files.
"""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from decompft.launcher.errors import EXIT_AGAIN, EXIT_DONE, EXIT_FAILED, SlurmError, UserError
from decompft.launcher.report_data import read_events
from decompft.launcher.report_text import duration, plain
from decompft.launcher.runs import RunDir, find_run
from decompft.slurm.glance import TRAINING, Glance, glance, with_resubmitted
from decompft.slurm.queue import Job, find_job, find_jobs, is_job_id, my_jobs, with_details
from decompft.slurm.reasons import Kind, Standing, explain
from decompft.slurm.run_files import read_start, script_path
from decompft.slurm.submit import Submission, read_submissions

State = Literal[
    "finished", "queued", "running", "stopped", "cancelled", "failed", "needs a hand", "silent", "not started"
]

EXIT_HAND = 4
_CODES: dict[State, int] = {
    "finished": EXIT_DONE,
    "queued": EXIT_AGAIN, "running": EXIT_AGAIN, "stopped": EXIT_AGAIN, "cancelled": EXIT_AGAIN,
    "failed": EXIT_FAILED,
    "needs a hand": EXIT_HAND, "silent": EXIT_HAND, "not started": EXIT_HAND,
}  # fmt: skip
_QUIET_S = 600.0  # a run that nothing holds here is alive if it wrote something within this time
_NEWEST = 20  # submissions that Slurm is asked about: older ones cannot live


@dataclass(frozen=True, kw_only=True)
class Other:
    """Another job of the run: what prepares it, or follows it."""

    kind: str  # prepare, merge, eval
    job_id: str
    job: Job | None  # None: Slurm does not know it (any more)
    standing: Standing | None


@dataclass(frozen=True, kw_only=True)
class Status:
    """How a run stands."""

    seen: Glance
    state: State
    words: str
    next: str  # the command to type
    job: Job | None  # the one that trains it, or did last
    others: tuple[Other, ...] = ()
    note: str = ""  # what could not be found out
    now_s: float = 0.0

    @property
    def code(self) -> int:
        return _CODES[self.state]

    @property
    def is_live(self) -> bool:
        """It waits or runs, and will go on by itself."""
        return self.state in ("queued", "running")


def status_of(path: Path) -> Status:
    """How the run in a folder stands now.

    Raises:
        UserError: there is no run.
    """
    seen, now_s = glance(path), time.time()
    jobs: tuple[Job, ...] = ()
    note = ""
    if seen.is_slurm:
        try:
            seen = with_resubmitted(seen, my_jobs(cluster=seen.cluster))
            ids = [*(s.job_id for s in seen.submissions[-_NEWEST:]), *seen.job_ids[-1:]]
            jobs = find_jobs(ids, cluster=seen.cluster)
            main = main_job(seen, jobs)
            if main is not None:
                told = with_details(main)
                jobs = tuple(told if job is main else job for job in jobs)
        except SlurmError as error:
            note = f"Slurm could not be asked: {error.message}"
    return judge(seen, jobs, now_s, note=note)


def find_named(word: str) -> tuple[Path | None, Job | None]:
    """The run that RUN|JOBID means, or a job of Slurm's that belongs to no run in ./runs.

    Raises:
        UserError: neither is there.
        SlurmError: Slurm cannot be asked for a job that no run here knows.
    """
    path = find_run(word)
    if path.exists() or not is_job_id(word):
        return path, None
    folder = _folder_of(word)
    if folder is not None:
        return folder, None
    job = find_job(word)
    if job is None:
        raise UserError(
            f"{word}: no run in ./runs knows this job, and Slurm has none of that number",
            "name the run's folder; `decompft runs` lists them",
        )
    from_comment = Path(job.comment.removeprefix("decompft:"))
    for place in (from_comment, Path(job.work_dir) / from_comment):
        if job.comment.startswith("decompft:") and (place / "plan.json").is_file():
            return place, None
    return None, job


def _folder_of(job_id: str) -> Path | None:
    """The run, or sweep, below ./runs that names this job; a task's run before its sweep."""
    array_id = job_id.partition("_")[0]
    found: dict[str, Path] = {}
    for pattern in ("*/slurm/jobs.jsonl", "*/*/slurm/jobs.jsonl"):
        for path in sorted(Path("runs").glob(pattern)):
            folder = path.parent.parent
            found |= {submission.job_id: folder for submission in read_submissions(RunDir(folder))}
    if job_id in found or array_id in found:
        return found.get(job_id, found.get(array_id))
    for pattern in (
        "*/incarnations/*",
        "*/*/incarnations/*",
    ):  # submitted by hand, or a task by its raw number
        for path in sorted(Path("runs").glob(pattern)):
            start = read_start(path)
            if start is not None and start.job_id == job_id:
                return path.parent.parent
    return None


def script_log(seen: Glance, job: Job | None) -> Path | None:
    """What the newest job's script printed itself, before, between and after its ranks; None when it is not here."""
    if job is not None and job.log and Path(job.log).is_file():
        return Path(job.log)
    ids = [job.raw_id or job.job_id] if job is not None else list(seen.job_ids[-1:])
    found = [path for job_id in ids for path in sorted(seen.run.path.glob(f"logs/*-{job_id}.out"))]
    return found[-1] if found else None


def code_of(job: Job, now_s: float) -> int:
    """The exit code of `status` for a job that is no run's."""
    codes: dict[Kind, int] = {
        "waits": EXIT_AGAIN, "runs": EXIT_AGAIN, "stuck": EXIT_HAND, "unknown": EXIT_HAND, "done": EXIT_DONE,
        "cancelled": EXIT_FAILED, "failed": EXIT_FAILED,
    }  # fmt: skip
    return codes[explain(job, now_s).kind]


def main_job(seen: Glance, jobs: Sequence[Job]) -> Job | None:
    """The job that trains the run: one that runs, else one that waits, else the newest."""
    order = {job_id: place for place, job_id in enumerate(seen.job_ids)}
    mine = [(place, job) for job in jobs for job_id, place in order.items() if job.belongs_to(job_id)]
    if not mine:
        return None
    return max(mine, key=lambda pair: (pair[1].is_live and not pair[1].waits, pair[1].is_live, pair[0]))[1]


def judge(seen: Glance, jobs: Sequence[Job], now_s: float, *, note: str = "") -> Status:
    """Put Slurm's word and the files together.

    Args:
        jobs: what Slurm knows of the run's jobs.
        note: why it could not be asked.
    """
    main = main_job(seen, jobs)
    others = tuple(_others(seen, jobs, now_s))
    state, words, todo = _training(seen, main, now_s, can_ask=not note)
    failed = next((o for o in others if o.standing and o.standing.kind in ("failed", "stuck")), None)
    live = next((o for o in others if o.job and o.job.is_live), None)
    if failed is not None and failed.standing is not None and state not in ("running", "queued"):
        its = f"its {failed.kind} job {failed.job_id}: {failed.standing.words}"
        if state != "failed":
            state = "needs a hand" if failed.standing.kind == "stuck" else "failed"
            words, todo = f"{words}; {its}" if words else its, failed.standing.todo
    elif live is not None and live.standing is not None and state == "finished":
        state = "queued" if live.standing.kind == "waits" else "running"
        words = f"trained; its {live.kind} job {live.job_id}: {live.standing.words}"
    return Status(
        seen=seen, state=state, words=words, next=todo or _next(seen, state), job=main, others=others,
        note=note, now_s=now_s,
    )  # fmt: skip


def _training(seen: Glance, job: Job | None, now_s: float, *, can_ask: bool) -> tuple[State, str, str]:
    """State, words, and a command that Slurm's word calls for."""
    if job is None or not job.is_live or seen.is_held:
        state, words = _from_files(seen, job, now_s, can_ask=can_ask)
        todo = explain(job, now_s).todo if job is not None and state == "needs a hand" else ""
        return state, words, todo
    standing = explain(job, now_s)
    if standing.kind == "stuck":
        return "needs a hand", standing.words, standing.todo
    saved = f"; saved at step {seen.saved_step:,}" if seen.saved_step else ""
    if standing.kind == "waits":
        return "queued", standing.words + saved, ""
    return "running", f"{standing.words}; {_progress(seen, job, now_s)}", ""


def _progress(seen: Glance, job: Job, now_s: float) -> str:
    if seen.start is None or not job.belongs_to(seen.start.job_id):
        return "its script is starting, no rank yet"
    if seen.outcome is not None:
        how = {"checkpointed": "state saved", "finished": "finished"}.get(seen.outcome.result, "failed")
        return f"incarnation {seen.incarnation} has ended ({how}), and its script goes on"
    return _doing(seen, now_s)


def _from_files(seen: Glance, job: Job | None, now_s: float, *, can_ask: bool) -> tuple[State, str]:
    """Of a run whose job is gone, or that is or was run on this machine."""
    outcome = seen.outcome
    if seen.is_held:
        if seen.incarnation == 0:
            return "running", "it is being prepared; no rank was started yet"
        return "running", "it is being launched again" if outcome is not None else _doing(seen, now_s)
    if outcome is not None and outcome.result == "finished":
        return "finished", ""
    standing = explain(job, now_s) if job is not None else None
    is_its_own = job is None or (seen.start is not None and job.belongs_to(seen.start.job_id))
    if outcome is not None and is_its_own:
        if outcome.result == "checkpointed":
            words = plain(outcome.message) or "stopped in order"
            return ("cancelled" if seen.is_cancelled else "stopped"), f"{words}; {_saved(seen)}"
        words = f"{_cause(seen)}{plain(outcome.message, 300)}"
        return "failed", f"it cannot train: {words}" if outcome.result == "user_error" else words
    if standing is not None and standing.kind == "stuck":
        return "needs a hand", standing.words
    if seen.is_cancelled or (standing is not None and standing.kind == "cancelled"):
        words = "the job was cancelled" if standing is None else standing.words
        return "cancelled", f"{words}; {_saved(seen)}"
    if standing is not None:
        left = "no rank left an outcome" if is_its_own and seen.start else "no rank was started"
        return "failed", f"{standing.words}; {left}, {_saved(seen)}"
    if seen.is_slurm and can_ask:
        return "failed", f"Slurm does not know its job any more, and no outcome was left; {_saved(seen)}"
    if seen.incarnation == 0:
        return "not started", "no rank was ever started"
    quiet_s = None if seen.written_s is None else max(now_s - seen.written_s, 0.0)
    if quiet_s is not None and quiet_s < max(_QUIET_S, 20 * (seen.step_s or 0.0)):
        return "running", _doing(seen, now_s)
    why = "it was cut off, hangs, or runs on another machine"
    return "silent", f"no outcome was left, {_last_sign(seen, now_s)}: {why}; {_saved(seen)}"


def _others(seen: Glance, jobs: Sequence[Job], now_s: float) -> Iterator[Other]:
    """Jobs that belong to the newest training job: those it waited for, and those that follow."""
    training = [s for s in seen.submissions if s.kind in TRAINING][-1:]
    if not training:
        return
    before, after = set(training[0].after), {training[0].job_id}
    # one that was handed over to a successor is written down again
    rows = list({s.job_id: s for s in seen.submissions if s.kind not in TRAINING}.values())
    for row in reversed(rows):
        before |= set(row.after) if row.job_id in before else set()
    mine: list[Submission] = []
    for row in rows:
        if row.job_id in before or after & set(row.after):
            mine.append(row)
            after |= {row.job_id} if row.job_id not in before else set()
    for row in mine:
        job = next((job for job in jobs if job.belongs_to(row.job_id)), None)
        standing = None if job is None else explain(job, now_s)
        yield Other(kind=row.kind, job_id=row.job_id, job=job, standing=standing)


def _next(seen: Glance, state: State) -> str:
    run = str(seen.run.path)
    if state in ("queued", "running"):
        return shlex.join(("decompft", "logs", run, "--follow"))
    if state == "finished":
        return shlex.join(("decompft", "report", run))
    return again(seen)


def again(seen: Glance) -> str:
    """The command that continues a run."""
    if script_path(seen.run).is_file() and seen.is_slurm:
        python = seen.submissions[-1].python if seen.submissions else ""
        given = [] if python in ("", shutil.which("python3")) else [f"DECOMPFT_PYTHON={python}"]
        return shlex.join((*given, "sbatch", str(script_path(seen.run))))
    for event in reversed(read_events(seen.run.events_path)):
        told = event.details.get("next")
        if event.name == "failure" and isinstance(told, str) and told.startswith("decompft "):
            return plain(told)
    return shlex.join(("decompft", "launch", "RECIPE", "--resume", "auto", "--run-dir", str(seen.run.path)))


def _doing(seen: Glance, now_s: float) -> str:
    doing = f"{plain(seen.doing)}, " if seen.doing else ""
    return f"{doing}{_last_sign(seen, now_s)}"


def _last_sign(seen: Glance, now_s: float) -> str:
    if seen.written_s is None:
        return "nothing was written yet"
    quiet_s = max(now_s - seen.written_s, 0.0)
    return f"last sign of life {duration(quiet_s) if quiet_s >= 1 else 'less than 1 s'} ago"


def _saved(seen: Glance) -> str:
    return "nothing is saved" if seen.saved_step is None else f"saved at step {seen.saved_step:,}"


def _cause(seen: Glance) -> str:
    outcome = seen.outcome
    if outcome is None or outcome.rank is None or f"rank {outcome.rank}" in outcome.message:
        return ""
    return f"rank {outcome.rank}: "
