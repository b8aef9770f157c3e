"""What does a person see while a run trains: one bar on a terminal, aligned lines elsewhere?"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

logger = logging.getLogger(__name__)
_REDRAW_S = 0.2  # between redraws of the bar, so that fast steps do not pay for it


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRow:
    """The numbers of one optimizer step: a row of metrics.jsonl."""

    step: int  # counted from 1
    epoch: float
    loss: float  # per trained token, over all ranks
    learning_rate: float
    grad_norm: float  # before clipping
    tokens_per_s: float  # all tokens, over all ranks
    trained_tokens: int  # tokens that carried loss in this step, over all ranks
    peak_mem_bytes: int  # of the rank that writes, 0
    step_s: float
    samples: int = 0  # CRC-32 of the ids of the rows trained on, in order: equal where the data is


class Console:
    """Progress of a run on rank 0's saved stdout; every line also goes to the rank's log.

    Args:
        stream: where a person looks; a bar if it is a terminal, lines if not.
        total_steps: the step at which the run ends.
        start_step: the step that was resumed from, 0 for a new run.
    """

    def __init__(self, stream: TextIO, *, total_steps: int, start_step: int) -> None:
        self._stream: TextIO | None = stream
        self._total = total_steps
        self._mean_step_s: float | None = None
        self._drawn_at = 0.0
        self._bar: tuple[Progress, TaskID] | None = None
        if stream.isatty() and os.environ.get("TERM") != "dumb":
            self._bar = _start_bar(stream, total_steps, start_step)

    def step(self, row: StepRow) -> None:
        """Shows a step."""
        mean = self._mean_step_s
        self._mean_step_s = row.step_s if mean is None else 0.9 * mean + 0.1 * row.step_s
        line = format_step(row, self._total, eta_s=(self._total - row.step) * self._mean_step_s)
        logger.info("%s", line)
        if self._bar is None:
            self._write(line)
        elif time.monotonic() - self._drawn_at > _REDRAW_S or row.step >= self._total:
            progress, task = self._bar
            progress.update(task, completed=row.step, numbers=line.split("  ", 1)[1])
            self._draw(progress.refresh)
            self._drawn_at = time.monotonic()

    def message(self, text: str) -> None:
        """Shows a line, above the bar if there is one."""
        logger.info("%s", text)
        if self._bar is None:
            self._write(text)
        else:
            console = self._bar[0].console
            self._draw(partial(console.print, text, markup=False, highlight=False, soft_wrap=True))

    def close(self) -> None:
        """Leaves the bar as it is and gives the terminal back."""
        if self._bar is not None:
            bar, _ = self._bar
            self._draw(bar.stop)
            self._bar = None

    def _write(self, line: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _draw(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            self._bar = None
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """A closed pipe or terminal is no reason to stop training."""
        self._stream = None
        logger.warning("no more lines on the terminal: %s", error.strerror)


def format_step(row: StepRow, total_steps: int, *, eta_s: float) -> str:
    """One step as one line; the columns stay in place over a run."""
    width = len(str(total_steps))
    columns = (
        f"step {row.step:>{width}}/{total_steps}",
        f"loss {row.loss:8.4f}",
        f"lr {row.learning_rate:8.2e}",
        f"grad {row.grad_norm:9.3g}",
        f"{row.tokens_per_s:>9,.0f} tok/s",
        f"{row.peak_mem_bytes / 2**30:6.2f} GiB",
        f"left {_duration(eta_s):>8}",
    )
    return "  ".join(columns)


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}"


def _start_bar(stream: TextIO, total_steps: int, start_step: int) -> tuple[Progress, TaskID]:
    # rich costs 50 ms to import, and is needed on a terminal only
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, Progress, TextColumn

    progress = Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[numbers]}"),
        console=RichConsole(file=stream),
        auto_refresh=False,  # no thread: drawn by step()
        redirect_stdout=False,  # those are the rank's log
        redirect_stderr=False,
    )
    task = progress.add_task("train", total=total_steps, completed=start_step, numbers="")
    progress.start()
    return progress, task
