"""Does this rank's main thread still move, and if the whole run stands still, for which rank does it wait?

A thread of each rank writes what its main thread does into `pulse-K.json` and, when that has not moved for a while,
the stacks of the rank's threads with it. The lowest rank whose thread is alive reads all pulses once it stands still
too long itself, and says which rank is behind (launcher/hangs.py). No collective and no GPU is involved: both may be
what hangs.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import platform
import re
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Literal, TextIO

from decompft.launcher.hangs import (
    ENDED,
    Hang,
    Reading,
    find_hang,
    hang_path,
    pulse_path,
    read_all,
    read_hang,
    read_stack,
    stack_path,
    to_json,
)
from decompft.launcher.runs import RunDir
from decompft.launcher.worker.emergency import REQUEST
from decompft.launcher.worker.pulse import Beat, Pulse

logger = logging.getLogger(__name__)

_POLL_S = 2.0
_FIRST_STEPS_S = 3600.0  # loading, compiling, the first forward of a large model on a CPU
_STACK_AFTER_S = 60.0  # a run that dies of its collectives' timeout before hang_s leaves stacks behind
_MEASURED_STEPS = 3  # fewer tell nothing: the first compiles
_WRITES_A_SECOND = 50  # over all ranks, on the shared file system
_LONGEST_STACK = 40
_WORKERS = ("data", "save")  # threads that the main thread waits for, by name


class Watchdog:
    """Watches one rank; give every rank one.

    Args:
        folder: the incarnation's.
        hang_s: seconds; "auto" as `patience` says; None never calls a hang, though pulses are written.
        timeout_s: of the collectives, in seconds.
        on_hang: called once, on this thread, in every rank whose watchdog is alive. It should save what can be
            saved and end the process: the main thread never will.
        say: shows a line to a person.
    """

    def __init__(
        self,
        pulse: Pulse,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        hang_s: float | Literal["auto"] | None,
        timeout_s: float,
        on_hang: Callable[[Hang], None],
        say: Callable[[str], None] = logger.error,
    ) -> None:
        self._pulse, self._folder, self._rank, self._world_size = pulse, folder, rank, world_size
        self._hang_s, self._timeout_s, self._on_hang, self._say = hang_s, timeout_s, on_hang, say
        self._poll_s = min(_POLL_S, hang_s / 20) if isinstance(hang_s, float | int) else _POLL_S
        self._write_s = max(self._poll_s, world_size / _WRITES_A_SECOND)
        self._stale_s = 5 * self._write_s + 5 * self._poll_s
        self._me = Reading(rank=rank, node=platform.node(), pid=os.getpid())
        self._steps = StepTimes()
        self._last_seen: dict[int, tuple[int, float]] = {}  # of another rank: count, seconds since it changed
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._main = threading.main_thread()
        self._stack_file: TextIO | None = None

    def start(self) -> None:
        """Begin to watch the main thread."""
        with suppress(OSError):  # a full disk is for the training loop to find
            self._stack_file = stack_path(self._folder, self._rank).open("w", encoding="utf-8")
        # before the thread's first turn, which it may never get
        self._arm_interpreter()
        self._write(self._me)
        self._thread.start()

    def stop(self) -> None:
        """The run ends in order: from here on this rank is waited for by nobody."""
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._write(replace(self._me, what=ENDED, stack=()))
        if self._stack_file is not None:
            self._stack_file.close()
            path = stack_path(self._folder, self._rank)
            if path.is_file() and path.stat().st_size == 0:
                path.unlink()

    def _run(self) -> None:
        beat, still_s, last = self._pulse.beat, 0.0, time.monotonic()
        unwritten_s = 0.0
        while not self._stopped.wait(self._poll_s):
            # when nothing of this process ran (a suspended job), the main thread is not to blame
            now = time.monotonic()
            passed, last = min(now - last, 3 * self._poll_s), now
            self._arm_interpreter()
            self._steps.see(self._pulse.beat, passed)
            has_moved = self._pulse.beat is not beat
            beat, still_s = self._pulse.beat, 0.0 if has_moved else still_s + passed
            limit_s = patience(self._hang_s, self._timeout_s, self._steps.median())
            has_stack = still_s >= min(_STACK_AFTER_S, (limit_s or _STACK_AFTER_S) / 2)
            # every poll while it moves, five times less often while it stands
            is_due = unwritten_s >= self._write_s * (1 if has_moved else 5)
            unwritten_s += passed
            self._me = replace(self._me, what=beat.what, step=beat.step, still_s=still_s)
            if is_due or has_stack != bool(self._me.stack):
                stack, unwritten_s = stack_of(self._main) if has_stack else (), 0.0
                self._me = replace(self._me, stack=stack, count=self._me.count + 1)
                self._write(self._me)
            if limit_s is not None and still_s >= limit_s / 2:
                hang = read_hang(self._folder)
                if hang is None:
                    hang = self._look_around(passed, still_s, limit_s)
                if hang is not None:
                    self._on_hang(hang)
                    return

    def _look_around(self, passed: float, still_s: float, limit_s: float) -> Hang | None:
        """The hang, if it is this rank that should say so."""
        if self._is_ending():
            return None
        readings = [self._judge(reading, passed) for reading in read_all(self._folder, self._world_size)]
        is_another_ones = any(not r.is_stale and r.what != ENDED for r in readings[: self._rank])
        hang = None if still_s < limit_s or is_another_ones else find_hang(readings, limit_s)
        if hang is not None:
            self._announce(hang)
        return hang

    def _is_ending(self) -> bool:
        """Whether a rank has failed, or all are being saved: who waits now waits for that."""
        try:
            names = os.listdir(self._folder)
        except OSError:  # a file system that comes and goes
            return True
        return REQUEST in names or any(re.fullmatch(r"rank-\d+\.json", name) for name in names)

    def _judge(self, reading: Reading, passed: float) -> Reading:
        """Another rank's reading, stale when it has not changed for long while this thread looked."""
        if reading.rank == self._rank:
            return replace(self._me, count=reading.count)
        count, silent_s = self._last_seen.get(reading.rank, (-1, 0.0))
        silent_s = 0.0 if count != reading.count else silent_s + passed
        self._last_seen[reading.rank] = (reading.count, silent_s)
        if silent_s < self._stale_s or reading.what == ENDED:
            return replace(reading, is_stale=False)
        return replace(
            reading, is_stale=True, still_s=reading.still_s + silent_s,
            stack=read_stack(self._folder, reading.rank) or reading.stack,
        )  # fmt: skip

    def _announce(self, hang: Hang) -> None:
        self._say(f"hang: {hang.words}")
        for line in hang.stack:
            self._say(f"    | {line}")
        try:
            _replace(hang_path(self._folder), to_json(hang))
            RunDir(self._folder.parent.parent).append_event("hang", **asdict(hang))
        except OSError as error:
            logger.error("the hang could not be written down: %s", error)

    def _arm_interpreter(self) -> None:
        """Have the interpreter itself write all stacks when this thread does not come back soon."""
        if self._stack_file is not None:
            faulthandler.dump_traceback_later(self._stale_s, file=self._stack_file)

    def _write(self, reading: Reading) -> None:
        threads = all_stacks() if reading.stack else ""
        with suppress(OSError):
            _replace(pulse_path(self._folder, self._rank), to_json(reading, threads=threads))


class StepTimes:
    """Seconds an optimizer step, as seen from outside."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=101)
        self._step: int | None = None
        self._since_s = 0.0

    def see(self, beat: Beat, passed: float) -> None:
        """`passed` seconds after the last look."""
        self._since_s += passed
        if self._step is not None and beat.step > self._step:
            self._seconds.append(self._since_s / (beat.step - self._step))
        if beat.step != self._step:
            self._step, self._since_s = beat.step, 0.0

    def median(self) -> float | None:
        """None until enough steps were taken."""
        return statistics.median(self._seconds) if len(self._seconds) >= _MEASURED_STEPS else None


def patience(hang_s: float | Literal["auto"] | None, timeout_s: float, step_s: float | None) -> float | None:
    """Seconds without a sign of progress that are too many; None: none are.

    "auto" is four fifths of timeout_s, so that the culprit is named before the collectives of those that wait for it
    give up, but at least 20 median steps; an hour until steps are measured.
    """
    if hang_s != "auto":
        return hang_s
    if step_s is None:
        return max(_FIRST_STEPS_S, timeout_s)
    return max(0.8 * timeout_s, 20 * step_s)


def stack_of(thread: threading.Thread) -> tuple[str, ...]:
    """Where a thread stands, innermost last; behind it the worker's that it waits for, if it does."""
    frames = sys._current_frames()
    rows = _rows(frames.get(thread.ident or 0))
    if rows and any(name in rows[-1] for name in ("concurrent/futures", "threading.py")):
        for other in threading.enumerate():
            if other.name.startswith(_WORKERS) and other.ident in frames:
                rows = [*rows, f"-- which waits for the thread {other.name}", *_rows(frames[other.ident])]
    return tuple(rows[-_LONGEST_STACK:])


def all_stacks() -> str:
    """Every thread's stack, for people to read."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [
        "\n".join([f"thread {names.get(ident, ident)}:", *(f"  {row}" for row in _rows(frame))])
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    ]
    return "\n".join(parts)


def _rows(frame: FrameType | None) -> list[str]:
    summary: Sequence[traceback.FrameSummary] = traceback.extract_stack(frame) if frame else ()
    return [f"{f.filename}:{f.lineno} in {f.name}: {f.line}" for f in summary]


def _replace(path: Path, text: str) -> None:
    """Replace a file at once; not synced: what matters is what others see now, not after a power cut."""
    temp = path.with_name(f".{path.name}.{os.getpid()}")
    temp.write_text(text, encoding="utf-8")
    temp.replace(path)
