"""Where do a run's numbers and events go: metrics.jsonl, events.jsonl, the console, the trackers?

Only rank 0 writes; on the other ranks every call returns at once.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from dataclasses import asdict
from logging import getLogger
from pathlib import Path
from typing import Any, Self, TextIO

from decompft.launcher.errors import RunFailed
from decompft.launcher.outcome import write_atomic
from decompft.launcher.recipe import LoggingSection
from decompft.launcher.runs import RunDir
from decompft.launcher.worker.console import Console, StepRow
from decompft.launcher.worker.trackers import Tracker, open_trackers

__all__ = ["Metrics", "StepRow"]

logger = getLogger(__name__)


class Metrics:
    """The numbers of one incarnation; a context manager.

    Args:
        logging: the plan's logging section.
        start_step: the step that was resumed from (0: a new run); rows after it are cut off.
        start_row: of that step, where another rank than rank 0 saved it; rank 0 died, perhaps before it wrote the row.
        stream: rank 0's saved stdout.

    Raises:
        UserError: a tracker's package is missing.
        RunFailed: the run directory cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        incarnation: int,
        logging: LoggingSection,
        start_step: int,
        start_row: dict[str, Any] | None = None,
        total_steps: int,
        stream: TextIO,
    ) -> None:
        self._is_writer = rank == 0
        self._incarnation = incarnation
        self._trackers: list[Tracker] = []
        if not self._is_writer:
            return
        self._run_dir = run_dir
        try:
            self._trackers = open_trackers(logging, run_dir, start_step=start_step)
        except OSError as error:
            raise _not_written(run_dir, error) from error
        run = RunDir(run_dir)
        _cut(run.metrics_path, start_step, start_row)
        self._metrics = _Lines(run.metrics_path)
        self._events = _Lines(run.events_path)
        self._console = Console(stream, total_steps=total_steps, start_step=start_step)

    def step(self, row: StepRow) -> None:
        """Records a step everywhere."""
        if not self._is_writer:
            return
        numbers = asdict(row)
        self._metrics.append(numbers)
        self._console.step(row)
        self._track(
            row.step, {f"train/{name}": value for name, value in numbers.items() if name not in _UNTRACKED}
        )

    def evaluation(self, step: int, loss: float, *, num_tokens: int) -> None:
        """Records an evaluation: events.jsonl, the console, the trackers."""
        if not self._is_writer:
            return
        self.event("eval", step=step, loss=loss, num_tokens=num_tokens)
        self._console.message(f"eval at step {step}: loss {loss:.4f} over {num_tokens:,} tokens")
        self._track(step, {"eval/loss": loss})

    def event(self, name: str, *, step: int, **fields: Any) -> None:  # fields: whatever JSON can hold
        """Adds a row to events.jsonl; names in use: start, resume, save, eval, signal, failure, finish."""
        if self._is_writer:
            row = {"event": name, "step": step, "incarnation": self._incarnation, "time_s": time.time()}
            self._events.append({**row, **fields})

    def message(self, text: str) -> None:
        """Shows a line to the person who watches, and in the log."""
        if self._is_writer:
            self._console.message(text)

    def close(self) -> None:
        """Gives the terminal back and flushes the trackers."""
        if self._is_writer:
            self._console.close()
            while self._trackers:
                try:
                    self._trackers.pop().close()
                except OSError as error:  # a full disk; must not hide the error that ends the run
                    logger.warning("%s: a tracker lost its last numbers: %s", self._run_dir, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _track(self, step: int, values: dict[str, float]) -> None:
        try:
            for tracker in self._trackers:
                tracker.log(step, values)
        except OSError as error:
            raise _not_written(self._run_dir, error) from error


_UNTRACKED = ("step", "samples")  # the axis, and a check sum


class _Lines:
    """A JSONL file that is complete up to the last row at any moment."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("ab+", buffering=0)  # unbuffered: a row is out when append returns
            size = self._file.seek(0, os.SEEK_END)
            if size and os.pread(self._file.fileno(), 1, size - 1) != b"\n":
                self._file.write(b"\n")  # a killed run left half a row
        except OSError as error:
            raise _not_written(path, error) from error

    def append(self, row: dict[str, Any]) -> None:
        line = _line(row).encode()
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise _not_written(self._path, error) from error


def _line(row: dict[str, Any]) -> str:
    return json.dumps({k: _strict(v) for k, v in row.items()}, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    """JSON has no nan and inf: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut(path: Path, last_step: int, last_row: dict[str, Any] | None) -> None:
    """Drops rows after last_step, which an earlier incarnation wrote and this one will write again."""
    if not path.exists():
        return
    rows: dict[int, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            step = json.loads(line)["step"]
        except ValueError:  # half a row, from a killed run
            continue
        if step <= last_step:
            rows[step] = f"{line}\n"
    if last_row is not None:
        rows.setdefault(last_row["step"], _line(last_row))
    try:
        write_atomic(path, "".join(row for _, row in sorted(rows.items())))
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError) -> RunFailed:
    return RunFailed(
        f"{path}: cannot be written: {error.strerror or error}",
        "free some space, then: decompft launch RECIPE --resume auto; checkpoints are untouched",
    )
