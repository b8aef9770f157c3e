"""A real `decompft launch` as a drill's child: watched, held still at a wanted moment, signalled, killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from decompft.launcher.drill_processes import all_pids, hold, rank_pids, release, send
from decompft.launcher.drill_watch import Look, look
from decompft.launcher.errors import EXIT_DONE
from decompft.launcher.runs import RunDir

_POLL_S = 0.004
_HEARD_S = 5.0  # the launcher looks for signals five times a second
_GONE_S = 30.0
_TELLING = ("error:", "cannot train:", "run failed:", "stopped in order")


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a launch ended."""

    code: int | None  # its exit code; None: it was still running at the limit, and was killed
    seconds: float  # from the command, or from the signal that was to end it
    words: str  # the last that it said

    @property
    def failure(self) -> str:
        """Why it did not finish; "" when it did."""
        return "" if self.code == EXIT_DONE else self.text

    @property
    def text(self) -> str:
        if self.code is None:
            return f"still running after {self.seconds:.0f} s: {self.words}"
        return f"exit code {self.code} after {self.seconds:.1f} s: {self.words}"


class Launch:
    """One launch; a context manager, which leaves no process behind.

    Args:
        words: recipe and overrides.
        log: takes what it prints.
        world_size: ranks it will start.
    """

    def __init__(self, words: Sequence[str], run: RunDir, log: Path, *, world_size: int) -> None:
        self.run = run
        self.log = log
        self._world_size = world_size
        self._before = run.newest_incarnation()
        self._ranks: dict[int, int] = {}
        self._since = time.monotonic()
        argv = [sys.executable, "-m", "decompft.launcher.cli", "launch", *words, "--run-dir", str(run.path)]
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONSAFEPATH": "1"},
                start_new_session=True,  # Ctrl-C reaches the drill alone, which then ends this
            )

    @property
    def seconds(self) -> float:
        """Since the command was given, or since the signal."""
        return time.monotonic() - self._since

    def until(self, is_wanted: Callable[[Look], bool]) -> Look | None:
        """Wait for a moment of this launch's own ranks (or before any); None when it ends without it."""
        while True:
            now = self._look()
            if now is not None and is_wanted(now):
                return now
            if self._process.poll() is not None:
                return None
            time.sleep(_POLL_S)

    def catch(self, is_wanted: Callable[[Look], bool]) -> Look | None:
        """As `until`, and the ranks are held still there, so that the moment lasts; `release` lets them go."""
        while self.until(lambda now: len(self._ranks) == self._world_size and is_wanted(now)) is not None:
            hold(self._ranks.values())
            now = look(self.run)  # a fast run has gone on meanwhile
            if self._process.poll() is None and is_wanted(now):
                return now
            self.release()
        return None

    def release(self) -> None:
        release(self._ranks.values())

    def ask_to_stop(self) -> None:
        """SIGTERM to the launcher, as a batch script passes it on; returns when it was heard."""
        self._since = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        deadline = self._since + _HEARD_S
        while self.run.newest_incarnation() > self._before and time.monotonic() < deadline:
            if self._process.poll() is not None or look(self.run).has_event("signal"):
                return
            time.sleep(_POLL_S)

    def kill_rank(self, rank: int) -> None:
        self._since = time.monotonic()
        send([self._ranks[rank]], signal.SIGKILL)

    def kill_all(self) -> None:
        """The launcher, torchrun and every rank, as a node that loses power; returns when they are gone."""
        self._since = time.monotonic()
        self._process.kill()
        send(self._ranks.values(), signal.SIGKILL)
        self._process.wait()
        self._sweep()

    def wait(self, limit_s: float | None = None) -> Ended:
        """Wait for the end; at the limit (seconds) everything is killed."""
        try:
            code: int | None = self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        seconds = self.seconds
        if code is None:
            self.kill_all()
        return Ended(code=code, seconds=seconds, words=last_words(self.log))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        for pause_s in (1.5, _HEARD_S):  # the second signal kills; a child that prepares goes only with these
            if self._process.poll() is None:
                self._process.terminate()
                try:
                    self._process.wait(pause_s)
                except subprocess.TimeoutExpired:
                    continue
        if self._process.poll() is None:
            self.kill_all()
        self._sweep()

    def _look(self) -> Look | None:
        now = look(self.run)
        if now.incarnation == self._before:
            # what there is to see is of the launch before
            return None if now.incarnation else now
        if len(self._ranks) < self._world_size:
            self._ranks = rank_pids(self.run, now.incarnation)
        return now

    def _sweep(self) -> None:
        """Kill what outlived the launcher; a survivor would hold the run's lock against the next launch."""
        deadline = time.monotonic() + _GONE_S
        while (left := all_pids(self.run)) and time.monotonic() < deadline:
            send(left, signal.SIGKILL)
            time.sleep(0.05)


def last_words(log: Path) -> str:
    """How a launch explained its end, in a line: its `error:` or `run failed:` with the hint, else its last line."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    for index, line in enumerate(lines):
        if line.startswith(_TELLING):
            told = [line, *(more for more in lines[index + 1 :] if more.startswith("  hint:"))]
            return "; ".join(part.strip() for part in told)
    return lines[-1] if lines else "it said nothing"
