"""What a person sees while data is tokenized: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

_LINE_EVERY_S = 5.0


class Progress:
    """Progress of one source, on stderr.

    Args:
        total: records, when the recipe limits them; a file's own number is not known before its end.
    """

    def __init__(self, name: str, total: int | None, show: bool) -> None:
        self._name = name
        self._console = Console(stderr=True)
        self._show = show
        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("tokenizing {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("records, {task.fields[tokens]:,} tokens"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not (show and self._console.is_terminal),
            transient=True,
        )
        self._task = self._bar.add_task(name, total=total, tokens=0)
        self._records = 0
        self._tokens = 0
        self._start = time.monotonic()
        self._last_line = self._start

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if error is None and self._show:
            self._line("done")

    def advance(self, record: int, tokens: int) -> None:
        """A document of `tokens` tokens, of record number `record`, was written."""
        self._records = record + 1
        self._tokens += tokens
        if not self._show:
            return
        if self._console.is_terminal:
            if self._records % 64 == 0:
                self._bar.update(self._task, completed=self._records, tokens=self._tokens)
        elif time.monotonic() - self._last_line > _LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._line("so far")

    def _line(self, state: str) -> None:
        seconds = max(time.monotonic() - self._start, 1e-9)
        self._console.print(
            f"tokenizing {self._name}: {state}, {self._records:,} records, {self._tokens:,} tokens, "
            f"{self._records / seconds:,.0f} records/s",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
