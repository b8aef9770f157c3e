"""Which runs are there, and how does each of them stand? Quick for hundreds: files, and one question to Slurm."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decompft.launcher.errors import SlurmError, UserError
from decompft.launcher.report_text import duration, number, plain
from decompft.slurm.glance import Glance, glance, with_resubmitted
from decompft.slurm.queue import Job, find_jobs, my_jobs
from decompft.slurm.watch import Status, judge


@dataclass(frozen=True, kw_only=True)
class Runs:
    """The runs of a folder, the one that was last at work first."""

    folder: Path
    rows: tuple[Status, ...]
    note: str = ""  # why Slurm could not be asked


def list_runs(folder: Path) -> Runs:
    """Look at every run right below a folder, and at the runs of the sweeps there.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder", "name the folder that holds the runs; the default is ./runs"
        )
    found = [*folder.glob("*/plan.json")]
    found += [path for sweep in folder.glob("*/sweep.json") for path in sweep.parent.glob("*/plan.json")]
    seen = [glance(path.parent) for path in sorted(found)]
    jobs: tuple[Job, ...] = ()
    note = ""
    try:
        for cluster in sorted({this.cluster for this in seen if _may_live(this)}):
            mine = my_jobs(cluster=cluster)
            seen = [with_resubmitted(this, mine) if this.cluster == cluster else this for this in seen]
            ids = [
                i for this in seen if this.cluster == cluster and _may_live(this) for i in _newest_ids(this)
            ]
            jobs += find_jobs(ids, cluster=cluster, from_accounting=False)
    except SlurmError as error:
        note = f"Slurm could not be asked: {error.message}"
    now_s = time.time()
    rows = [
        judge(this, [job for job in jobs if _is_of(job, this)], now_s, note=note if this.is_slurm else "")
        for this in seen
    ]
    rows.sort(key=lambda row: -(_touched_s(row.seen) or 0.0))
    return Runs(folder=folder, rows=tuple(rows), note=note)


def to_lines(runs: Runs) -> list[str]:
    """The table."""
    if not runs.rows:
        return [f"no runs in {runs.folder}"]
    table = [["run", "state", "step", "loss", "job", "age"]]
    table += [
        [
            plain(str(row.seen.run.path.relative_to(runs.folder))), row.state,
            _step(row.seen), number(row.seen.loss), _job_id(row) or "-",
            duration(_age_s(row)),
        ]
        for row in runs.rows
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
    return [*lines, f"note: {runs.note}"] if runs.note else lines


def to_json(runs: Runs) -> list[dict[str, Any]]:
    """The same facts."""
    return [
        {
            "run": str(row.seen.run.path), "state": row.state, "code": row.code, "step": row.seen.step,
            "total_steps": row.seen.total.steps, "loss": row.seen.loss, "job_id": _job_id(row) or None,
            "age_s": _age_s(row), "words": row.words, "note": row.note,
        }
        for row in runs.rows
    ]  # fmt: skip


def _may_live(seen: Glance) -> bool:
    """Whether Slurm can have something to say that the files do not."""
    if not seen.is_slurm:
        return False
    is_finished = seen.outcome is not None and seen.outcome.result == "finished"
    return not is_finished or len(seen.submissions) > 1


def _newest_ids(seen: Glance) -> Sequence[str]:
    return (*(s.job_id for s in seen.submissions[-4:]), *seen.job_ids[-1:])


def _is_of(job: Job, seen: Glance) -> bool:
    return any(job.belongs_to(job_id) for job_id in _newest_ids(seen))


def _step(seen: Glance) -> str:
    if seen.total.steps is None:
        return f"{seen.step:,}"
    return f"{seen.step:,}/{'' if seen.total.is_exact else '~'}{seen.total.steps:,}"


def _job_id(row: Status) -> str:
    if row.job is not None:
        return row.job.job_id
    return row.seen.job_ids[-1] if row.seen.job_ids else ""


def _age_s(row: Status) -> float | None:
    """Since a rank last gave a sign of life, or since it was submitted."""
    touched_s = _touched_s(row.seen)
    return None if touched_s is None else max(row.now_s - touched_s, 0.0)


def _touched_s(seen: Glance) -> float | None:
    times = [s.time_s for s in seen.submissions[-1:]]
    times += [seen.written_s] if seen.written_s is not None else []
    return max(times, default=None)
