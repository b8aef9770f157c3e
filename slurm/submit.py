"""From a plan to a job in the queue: freeze what was asked, let Slurm check the script, submit, write down the id."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from decompft.launcher.errors import SlurmError, UserError
from decompft.launcher.json_lines import read_lines
from decompft.launcher.outcome import write_atomic
from decompft.launcher.plan import Plan
from decompft.launcher.resume import Start, choose_start
from decompft.launcher.runs import RunDir
from decompft.launcher.say import Say
from decompft.slurm.after import Record, read_record, write_record
from decompft.slurm.commands import call
from decompft.slurm.frozen import freeze
from decompft.slurm.header import WARNING_S
from decompft.slurm.profile import Profile
from decompft.slurm.queue import my_jobs
from decompft.slurm.render import train_script
from decompft.slurm.run_files import cancelled_path, measured_save_s, script_path

_MARGIN_S = 120.0  # Slurm's own granularity of 60 s, a long step, and ranks that notice a little later


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One job of a run: a line of slurm/jobs.jsonl."""

    job_id: str
    cluster: str  # "" where there is only one
    kind: str  # train, prepare, merge, eval, sweep
    script: str  # below the run directory
    sha256: str  # of the script
    python: str = ""  # that was handed to the job; "": the profile says where the nodes' one is
    after: tuple[str, ...] = ()  # jobs that it waits for
    array: int | None = None  # tasks
    time_s: float = 0.0


def make_ready(
    plan: Plan,
    recipe_text: str,
    profile: Profile,
    *,
    run_dir: Path,
    resume: str | None,
    say: Say,
) -> str:
    """Check and write down all that a run's training job needs; the script that is to be submitted.

    Args:
        recipe_text: the recipe file, verbatim.
        run_dir: on a file system that the nodes share; relative to the current folder, which the job starts in.
        resume: as `decompft launch` takes it.

    Raises:
        UserError: the run is queued or running already, or cannot be continued so.
        SlurmError: Slurm is not here, or would refuse the script; its words are in the message.
    """
    run = RunDir(run_dir)
    refuse_living(run)
    start = choose_start(plan, run_dir=run_dir, resume=resume)
    for note in start.notes:
        say(note)
    text = train_script(plan, profile, run_dir=str(run_dir), warning_s=warning_s([run]))
    check_script(text)
    record(start, plan, recipe_text)
    return text


def warning_s(runs: Sequence[RunDir]) -> int:
    """How long before the time limit a job is told to save, by the saves of these runs so far."""
    longest_save = max(map(measured_save_s, runs))
    return max(WARNING_S, round(_MARGIN_S + 2 * longest_save))


def record(start: Start, plan: Plan, recipe_text: str) -> None:
    """Write what a job finds in its run directory."""
    run = start.run
    if start.is_new and start.checkpoint is not None:
        run.write_origin(start.checkpoint)
    run.record(recipe_text=recipe_text, plan=plan)
    freeze(run, plan.recipe)
    cancelled_path(run).unlink(missing_ok=True)
    # a node that was left out may be mended by now
    write_record(run, Record(step=read_record(run).step))


def submit_script(
    run: RunDir,
    text: str,
    *,
    name: str,
    kind: str,
    after: Sequence[str] = (),
    profile: Profile,
    array: int | None = None,
) -> Submission:
    """Write a script into the run directory, submit it, and write that down.

    Args:
        name: of the script, below the run directory.
        profile: of the site; may name another folder for the script's own log than logs/ of the run directory.
        array: tasks that the script's header asks for.

    Raises:
        SlurmError: sbatch refuses; its words are in the message.
    """
    script = run.path / name
    folder = Path(profile.logs) if profile.logs else run.path / "logs"
    # a missing folder fails the job without a log anywhere
    folder.mkdir(parents=True, exist_ok=True)
    script.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(script, text)
    number = "%A-%a" if array else "%j"
    argv = [
        "sbatch", "--parsable", f"--output={str(folder).replace('%', '%%')}/{kind}-{number}.out",
        f"--comment=decompft:{run.path}",
        *([f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []),
        str(script),
    ]  # fmt: skip
    python = _own_python(profile)
    done = call(argv, env={"DECOMPFT_PYTHON": python} if python else {})
    if done.code != 0 or not done.lines:
        raise SlurmError(f"sbatch refused {script}: {done.words}", f"try it: {shlex.join(argv)}")
    job_id, _, cluster = done.lines[-1].strip().partition(";")
    submission = Submission(
        job_id=job_id, cluster=cluster, kind=kind, script=name, after=tuple(after), array=array, python=python,
        sha256=hashlib.sha256(text.encode()).hexdigest(), time_s=round(time.time(), 3),
    )  # fmt: skip
    append(run, submission)
    run.append_event("submit", job_id=job_id, kind=kind, after=list(after))
    return submission


def append(run: RunDir, submission: Submission) -> None:
    """Add a line to slurm/jobs.jsonl."""
    with _jobs_path(run).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(submission), sort_keys=True) + "\n")


def check_script(text: str) -> str:
    """Let Slurm itself look at a script; what it says of start and nodes.

    Raises:
        SlurmError: it would refuse the script.
    """
    done = call(["sbatch", "--test-only"], stdin=text)
    if done.code != 0:
        raise SlurmError(
            f"Slurm would refuse this job: {done.words}",
            "change the recipe's slurm section or the profile; `decompft doctor --slurm PROFILE` compares it with "
            "the cluster",
        )
    return done.words


def read_submissions(run: RunDir) -> list[Submission]:
    """The jobs of a run, oldest first."""
    found = []
    for row in read_lines(_jobs_path(run)):
        try:
            found.append(Submission(**{**(row or {}), "after": tuple((row or {})["after"])}))
        except (TypeError, KeyError):
            continue  # cut short by a full disk
    return found


def refuse_living(*runs: RunDir) -> None:
    """Two jobs in one run directory would fence each other off.

    Raises:
        UserError: a job of one of the runs is queued or running.
    """
    ids = [(run, s.job_id) for run in runs for s in read_submissions(run) if s.kind in ("train", "sweep")]
    jobs = my_jobs()
    known = {name for job in jobs for name in job.names}
    living = [
        (run, job.names[-1]) for run in runs for job in jobs if job.script == str(script_path(run).absolute())
    ]
    living += [(run, job_id) for run, job_id in ids if job_id in known]
    if living:
        run, job = living[-1]
        raise UserError(
            f"{run.path}: job {job} of this run is queued or running",
            f"look with `decompft status {run.path}`, end it with `decompft cancel {run.path}`, "
            "or choose another place with --run-dir DIR",
        )


def _own_python(profile: Profile) -> str:
    """Where a profile says nothing of the environment, the job's Python is the one that submits; else ""."""
    if profile.environment.kind != "none":
        return ""
    return os.environ.get("DECOMPFT_PYTHON", sys.executable)


def _jobs_path(run: RunDir) -> Path:
    return run.path / "slurm/jobs.jsonl"
