"""What a person sees while a tool works: a bar on a terminal, a line now and then in a log; on stderr."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_LINE_EVERY_S = 5.0


class Progress:
    """Called with (done, total) of whatever is counted; the first call fixes nothing."""

    def __init__(self, text: str) -> None:
        self._text = text
        console = Console(stderr=True)
        self._on_terminal = console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        self._bar = Bar(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(),
            console=console, disable=not self._on_terminal, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task(text, total=None)
        self._console = console
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        if self._on_terminal:
            self._bar.update(self._task, completed=done, total=total)
        elif time.monotonic() - self._last_line > _LINE_EVERY_S:
            self._last_line = time.monotonic()
            line = f"{self._text}: {100 * done // max(total, 1)} %"
            self._console.print(line, soft_wrap=True, highlight=False, markup=False)


def say(line: str) -> None:
    """A line for the user that is not the answer."""
    Console(stderr=True).print(line, soft_wrap=True, highlight=False, markup=False)
