"""What do the jobs of a run leave in its folder, where, and what does it say? Read without trust."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from decompft.launcher.json_lines import read_lines
from decompft.launcher.outcome import write_atomic
from decompft.launcher.runs import RunDir

SCRIPT = "slurm/train.sbatch"  # below the run directory, as the scripts of other steps


@dataclass(frozen=True, kw_only=True)
class JobStart:
    """The Slurm job that an incarnation ran in: its slurm.json."""

    job_id: str  # of an array's task the raw one: 28, not 27_0
    task: str | None  # its number in the array
    restart: int  # Slurm's count of requeues then
    nodes: tuple[str, ...]


def write_start(folder: Path, start: JobStart) -> None:
    """Leave slurm.json in an incarnation's folder."""
    row = {
        "job_id": start.job_id, "restart": start.restart, "task": start.task, "nodes": list(start.nodes),
        "time_s": round(time.time(), 3),
    }  # fmt: skip
    write_atomic(folder / "slurm.json", json.dumps(row, sort_keys=True) + "\n")


def read_start(folder: Path) -> JobStart | None:
    """An incarnation's slurm.json; None without one."""
    try:
        row = json.loads((folder / "slurm.json").read_bytes())
        nodes = tuple(str(name) for name in row["nodes"])
        task = None if row.get("task") is None else str(row["task"])
        return JobStart(job_id=str(row["job_id"]), task=task, restart=int(row["restart"]), nodes=nodes)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def script_path(run: RunDir) -> Path:
    """The job script that was submitted; given to sbatch again it continues the run."""
    return run.path / SCRIPT


def cancelled_path(run: RunDir) -> Path:
    """Written by `decompft cancel`, so that the job script does not requeue; the next launch removes it."""
    return run.path / "slurm/cancelled"


def forget_cancelling(run: RunDir, job: str) -> None:
    """`decompft cancel` meant the jobs of that time, not one that the user submitted since."""
    path = cancelled_path(run)
    try:
        if job not in json.loads(path.read_bytes())["jobs"]:
            path.unlink()
    except (OSError, ValueError, KeyError, TypeError):
        return


def measured_save_s(run: RunDir) -> float:
    """Seconds that the slowest save of the run took; 0 while there was none."""
    told = [
        row.get("save_s")
        for row in read_lines(run.events_path)
        if row is not None and row.get("event") == "save"
    ]
    return float(max((value for value in told if isinstance(value, int | float)), default=0.0))
