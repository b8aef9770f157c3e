"""What do a run's files say at this moment? Read in milliseconds, whatever the run's length, and without trust."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from decompft.launcher.checkpoints import list_checkpoints, step_of
from decompft.launcher.errors import UserError
from decompft.launcher.hangs import ENDED, read_all, slowest
from decompft.launcher.outcome import Outcome
from decompft.launcher.plan import Plan
from decompft.launcher.report_data import checked_outcome, is_held, last_written
from decompft.launcher.report_verdict import Total, total_steps
from decompft.launcher.runs import RunDir
from decompft.slurm.queue import Queued
from decompft.slurm.run_files import SCRIPT, JobStart, cancelled_path, read_start, script_path
from decompft.slurm.submit import Submission, read_submissions

_TAIL_BYTES = 64 * 1024
TRAINING = ("train", "sweep")  # kinds of jobs that run ranks


@dataclass(frozen=True, kw_only=True)
class Glance:
    """A run folder at one moment."""

    run: RunDir
    plan: Plan | None  # None: of another version, or damaged
    incarnation: int  # the newest; 0 before the first
    outcome: Outcome | None  # of the newest
    start: JobStart | None  # of the newest; None outside of Slurm
    step: int  # optimizer steps done, as far as it is known
    saved_step: int | None  # of the newest checkpoint
    total: Total
    loss: float | None  # of the last logged step, as the other numbers
    tokens_per_s: float | None
    step_s: float | None  # median of the last logged steps
    doing: str  # what the slowest rank does: loading, forward, saving, ...; "" when it is not known
    is_held: bool  # a living process of this machine holds the run
    written_s: float | None  # when a rank last left any sign of life
    submissions: tuple[Submission, ...]
    is_cancelled: bool  # by `decompft cancel`, and not launched since

    @property
    def job_ids(self) -> tuple[str, ...]:
        """Of the jobs that train or trained it, oldest first; one submitted by hand is only named by its start."""
        started = () if self.start is None else (self.start.job_id,)
        task = None if self.start is None else self.start.task
        if task is not None and any(s.job_id.endswith(f"_{task}") for s in self.submissions):
            started = ()  # the raw id of the last task is the whole array's
        # of an array, this run is one task
        ids = [s.job_id for s in self.submissions if s.kind in TRAINING and not (s.array and started)]
        return tuple(dict.fromkeys((*ids, *started)))

    @property
    def is_slurm(self) -> bool:
        return bool(self.submissions) or self.start is not None

    @property
    def cluster(self) -> str:
        return self.submissions[-1].cluster if self.submissions else ""

    @property
    def eta_s(self) -> float | None:
        """Seconds of training that are left, at the speed of the last steps."""
        if self.total.steps is None or self.step_s is None:
            return None
        return max(self.total.steps - self.step, 0) * self.step_s


def glance(path: Path) -> Glance:
    """Look at a run's folder, which may be written to meanwhile.

    Raises:
        UserError: it is not a run's folder.
    """
    run = RunDir.open(path)
    plan = _plan(run)
    number = run.newest_incarnation()
    folder = run.incarnation_dir(number)
    outcome = checked_outcome(folder)
    rows = _tail_rows(run.metrics_path)
    last = rows[-1] if rows else {}
    saved = _saved_step(run)
    doing, doing_step = _doing(folder, plan) if number and outcome is None else ("", 0)
    step = max(_whole(last.get("step")), saved or 0, doing_step, 0 if outcome is None else outcome.step)
    logged = (_whole(last.get("step")), _number(last.get("epoch")) or 0.0)
    times = [value for row in rows[-50:] if (value := _number(row.get("step_s"))) is not None]
    return Glance(
        run=run, plan=plan, incarnation=number, outcome=outcome, start=read_start(folder), step=step,
        saved_step=saved,
        total=Total(steps=None) if plan is None else total_steps(plan, step, logged, outcome),
        loss=_number(last.get("loss")), tokens_per_s=_number(last.get("tokens_per_s")),
        step_s=statistics.median(times) if times else None, doing=doing,
        is_held=is_held(run.path / "lock"), written_s=last_written(run),
        submissions=tuple(read_submissions(run)), is_cancelled=cancelled_path(run).exists(),
    )  # fmt: skip


def with_resubmitted(seen: Glance, mine: Sequence[Queued]) -> Glance:
    """The run with the jobs that somebody gave its script to sbatch for; nothing has written them down yet."""
    script, known = str(script_path(seen.run).absolute()), {s.job_id for s in seen.submissions}
    found = [
        Submission(job_id=job.names[-1], cluster=seen.cluster, kind="train", script=SCRIPT, sha256="")
        for job in mine
        if job.script == script and not known & set(job.names)
    ]
    return replace(seen, submissions=(*seen.submissions, *found)) if found else seen


def _plan(run: RunDir) -> Plan | None:
    try:
        return run.read_plan()
    except UserError:
        return None


def _saved_step(run: RunDir) -> int | None:
    try:
        steps = [step_of(folder) for folder in list_checkpoints(run.checkpoints_dir)]
    except (OSError, ValueError):
        return None
    return max(steps, default=None)


def _doing(folder: Path, plan: Plan | None) -> tuple[str, int]:
    """What the slowest rank said that it does, and after which step."""
    if plan is None:
        return "", 0
    try:
        told = [reading for reading in read_all(folder, plan.world.size) if not reading.is_stale]
    except (TypeError, KeyError, AttributeError):  # not written by a watchdog of ours
        return "", 0
    if not told:
        return "", 0
    behind = slowest(told)
    return ("" if behind.what == ENDED else behind.what), max(behind.step, 0)


def _tail_rows(path: Path) -> list[dict[str, Any]]:
    """The last rows of metrics.jsonl that are whole, oldest first."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # cut short, by the tail's beginning or by a death
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else 0


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
