"""A run folder with a past, as its ranks, its launcher and its job script leave it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from test_runs import make_checkpoint, make_plan

from decompft.launcher.outcome import Outcome, write_outcome
from decompft.launcher.runs import RunDir


def make_run(path: Path, *, ranks: int = 1, **sections: dict[str, object]) -> RunDir:
    return RunDir.create(path, recipe_text="", plan=make_plan(ranks=ranks, **sections))


def submit(
    run: RunDir, job_id: str, *, kind: str = "train", after: Sequence[str] = (), array: int | None = None
) -> None:
    """What `launch --slurm` leaves."""
    folder = run.path / "slurm"
    folder.mkdir(exist_ok=True)
    (folder / "train.sbatch").write_text("#!/bin/bash\n#SBATCH --signal=B:USR1@180\n")
    row = {
        "time_s": time.time(), "job_id": job_id, "cluster": "", "kind": kind, "script": "slurm/train.sbatch",
        "sha256": "", "after": list(after), "array": array,
    }  # fmt: skip
    with (folder / "jobs.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def start(
    run: RunDir, *, job_id: str = "", nodes: Sequence[str] = (), restart: int = 0, from_step: int = 0
) -> int:
    """What the beginning of an incarnation leaves; its number."""
    number = run.next_incarnation()
    if job_id:
        row = {
            "job_id": job_id,
            "restart": restart,
            "task": None,
            "nodes": list(nodes),
            "time_s": time.time(),
        }
        (run.incarnation_dir(number) / "slurm.json").write_text(json.dumps(row))
    checkpoint = str(run.checkpoints_dir / f"step-{from_step:08d}") if from_step else None
    run.append_event("start", incarnation=number, world_size=1, checkpoint=checkpoint)
    return number


def train(run: RunDir, *steps: int) -> None:
    """Rows of metrics.jsonl, of two seconds each."""
    with run.metrics_path.open("a") as file:
        for step in steps:
            row = {
                "step": step,
                "epoch": step / 100,
                "loss": 3 - step / 100,
                "tokens_per_s": 12345.6,
                "step_s": 2.0,
            }
            file.write(json.dumps(row) + "\n")


def end(run: RunDir, number: int, outcome: Outcome, *, saves: bool = False) -> None:
    """What the end of an incarnation leaves."""
    if saves:
        make_checkpoint(run.path, outcome.step)
    write_outcome(run.incarnation_dir(number), outcome)
    run.append_event("end", incarnation=number, result=outcome.result, step=outcome.step, rank=outcome.rank)


def stopped(step: int) -> Outcome:
    return Outcome(result="checkpointed", step=step, message=f"stopped in order after step {step} of 10")


def failed(step: int, *, rank: int = 1, node: str = "vn-2") -> Outcome:
    return Outcome(
        result="failed", step=step, rank=rank, node=node, message=f"rank {rank} was killed by signal 9 (SIGKILL)",
        cause="killed", meaning="something killed it", evidence="signal 9", hint="look at dmesg",
    )  # fmt: skip


def age(run: RunDir, seconds: float) -> None:
    """Let all that the run has written be that old."""
    then = time.time() - seconds
    for path in run.path.rglob("*"):
        if path.is_file():
            os.utime(path, (then, then))
