"""What came out of a sweep: a row for each task, the best first."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decompft.launcher.errors import EXIT_AGAIN, EXIT_DONE, EXIT_FAILED
from decompft.launcher.report_data import read_events
from decompft.launcher.report_text import number, plain
from decompft.launcher.runs import RunDir
from decompft.launcher.sweep import word_of
from decompft.launcher.sweep_folder import Row, read_sweep
from decompft.slurm.run_list import list_runs
from decompft.slurm.watch import EXIT_HAND, Status


@dataclass(frozen=True, kw_only=True)
class Result:
    """One task."""

    row: Row
    status: Status | None  # None: nothing was written of it yet
    eval_loss: float | None  # of the newest evaluation

    @property
    def state(self) -> str:
        return "not started" if self.status is None else self.status.state

    @property
    def code(self) -> int:
        return EXIT_HAND if self.status is None else self.status.code


@dataclass(frozen=True, kw_only=True)
class Table:
    """The tasks of a sweep: those with the lowest evaluation loss first, then by the training loss."""

    folder: Path
    results: tuple[Result, ...]
    note: str  # why Slurm could not be asked

    @property
    def code(self) -> int:
        """As of `decompft status`: 75 while a task waits or runs, then the worst of them."""
        codes = {result.code for result in self.results}
        if any(result.status is not None and result.status.is_live for result in self.results):
            return EXIT_AGAIN
        return next((code for code in (EXIT_HAND, EXIT_FAILED, EXIT_AGAIN) if code in codes), EXIT_DONE)


def read_table(folder: Path) -> Table:
    """Look at every task.

    Raises:
        UserError: sweep.json is damaged.
    """
    runs = list_runs(folder)
    by_name = {status.seen.run.path.name: status for status in runs.rows}
    results = [
        Result(row=row, status=by_name.get(row.folder), eval_loss=_eval_loss(RunDir(folder / row.folder)))
        for row in read_sweep(folder)
    ]
    results.sort(key=lambda result: (_last(result.eval_loss), _last(_loss(result)), result.row.index))
    return Table(folder=folder, results=tuple(results), note=runs.note)


def to_lines(table: Table) -> list[str]:
    """For people; the last line is the next command to type."""
    keys = list(dict.fromkeys(key for result in table.results for key in result.row.parameters))
    lines = [["task", *keys, "state", "step", "loss", "eval loss", "tokens/s"]]
    lines += [_cells(result, keys) for result in table.results]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    shown = ["  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    counts: dict[str, int] = {}
    for result in table.results:
        counts[result.state] = counts.get(result.state, 0) + 1
    states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    note = [f"note: {table.note}"] if table.note else []
    return [f"{table.folder}: {states}", *shown, *note, f"next: {_next(table)}"]


def to_json(table: Table) -> dict[str, Any]:
    """The same facts, in the same order."""
    return {
        "sweep": str(table.folder),
        "code": table.code,
        "note": table.note,
        "tasks": [
            {
                "task": result.row.index, "parameters": result.row.parameters,
                "run": str(table.folder / result.row.folder), "state": result.state, "code": result.code,
                "words": result.status.words if result.status else "", "eval_loss": result.eval_loss,
                "loss": _loss(result), "step": result.status.seen.step if result.status else 0,
                "total_steps": result.status.seen.total.steps if result.status else None,
                "tokens_per_s": result.status.seen.tokens_per_s if result.status else None,
                "job_id": result.status.job.job_id if result.status and result.status.job else None,
            }
            for result in table.results
        ],
    }  # fmt: skip


def _cells(result: Result, keys: list[str]) -> list[str]:
    values = [plain(word_of(result.row.parameters.get(key))) for key in keys]
    status = result.status
    if status is None:
        return [str(result.row.index), *values, result.state, "-", "-", "-", "-"]
    seen = status.seen
    speed = "-" if seen.tokens_per_s is None else f"{seen.tokens_per_s:,.0f}"
    step = seen.total.beside(seen.step).removeprefix("step ")
    losses = (number(seen.loss), number(result.eval_loss))
    return [str(result.row.index), *values, result.state, step, *losses, speed]


def _next(table: Table) -> str:
    """Where to look first: at a failure, at what is at work, else at the best."""
    failed = next((r for r in table.results if r.code in (EXIT_FAILED, EXIT_HAND) and r.status), None)
    if failed is not None:
        return shlex.join(("decompft", "status", str(table.folder / failed.row.folder)))
    if table.code == EXIT_DONE:
        return shlex.join(
            ("decompft", "report", *(str(table.folder / r.row.folder) for r in table.results[:4]))
        )
    live = any(result.status is not None and result.status.is_live for result in table.results)
    if live:
        return shlex.join(("decompft", "cancel", str(table.folder))) + " ends it; or wait"
    return shlex.join(("decompft", "launch", "RECIPE", "--resume", "auto", "--run-dir", str(table.folder)))


def _eval_loss(run: RunDir) -> float | None:
    events = read_events(run.events_path)
    losses = [event.details.get("loss") for event in events if event.name == "eval"]
    known = [float(x) for x in losses if isinstance(x, int | float) and math.isfinite(x)]
    return known[-1] if known else None


def _loss(result: Result) -> float | None:
    return None if result.status is None else result.status.seen.loss


def _last(value: float | None) -> float:
    return math.inf if value is None else value
