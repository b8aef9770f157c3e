"""A run to be killed: real ranks forked from here, a killer that watches the disk, and where a kill fell.

What is known of a save is what lies in the checkpoints folder, so that it does not matter which thread writes it:
`.tmp-step-N-incI` is a save that incarnation I has begun, `step-N` one that is in place, and `.tmp-deleted-step-N` an
old checkpoint on its way out.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Collection, Set
from pathlib import Path
from typing import Any, NamedTuple

from workers import start_ranks

from decompft.launcher.checkpoints import step_of
from decompft.launcher.runs import RunDir

START_LIMIT_S = 60
_POLL_S = 0.0005

# places in the order of a run's life; those of a save are between its first byte and its rename
LOADING = "starting, no step done"
TRAINING = "between saves"
EMPTY = "in a save: folders only"
SLICES = "in a save: slices"
MANIFEST = "in a save: adapter, manifest"
READING = "in a save: sealed, read back"
REPLACING = "in a save: the same step again, between two renames"
REPLACED = "after a save: the one it replaced half deleted"
ROTATION = "in rotation: an old one half deleted"
PLACES = (LOADING, TRAINING, EMPTY, SLICES, MANIFEST, READING, REPLACING, REPLACED, ROTATION)
IN_SAVE = (SLICES, MANIFEST, READING, REPLACING)


class Aim(NamedTuple):
    """When to kill."""

    at: str  # "save", "rotation" or "any time"
    passed: int  # of them that are let pass first
    delay_s: float  # after it is seen; of "any time", after the start


class Victim:
    """One incarnation, running."""

    def __init__(self, run: RunDir, resume: Path | None, *, ignore: Collection[str]) -> None:
        """Args: ignore: names of damaged checkpoints, which promise nothing."""
        self.run = run
        self.newest_seen = 0  # step of the newest checkpoint that was ever seen in place
        self._root = run.checkpoints_dir
        self._before = _names(self._root)  # left by those killed before
        self._ignore = ignore
        self._first_step = 0 if resume is None else step_of(resume)
        self.incarnation, self._ranks = start_ranks(run, resume=resume)
        for process in self._ranks:  # one group, so that one call ends all, as a power cut does
            assert process.pid is not None and self._ranks[0].pid is not None
            os.setpgid(process.pid, self._ranks[0].pid)

    def kill_at(self, aim: Aim) -> str:
        """Wait for the moment, kill every rank, and say where it fell."""
        is_due = {"save": self._saves, "rotation": self._rotations, "any time": self._always}[aim.at](aim)
        try:
            deadline = time.monotonic() + START_LIMIT_S
            while not is_due():
                dead = [k for k, process in enumerate(self._ranks) if process.exitcode is not None]
                assert not dead, f"ranks {dead} ended by themselves:\n{self._logs()}"
                assert time.monotonic() < deadline, f"{aim} never came:\n{self._logs()}"
            _spin(aim.delay_s) if aim.at == "rotation" else time.sleep(aim.delay_s)
        finally:
            self.kill()
        return self._place()

    def kill(self) -> None:
        assert self._ranks[0].pid is not None
        os.killpg(self._ranks[0].pid, signal.SIGKILL)
        for process in self._ranks:
            process.join()

    def _saves(self, aim: Aim) -> Callable[[], bool]:
        begun: set[str] = set()

        def is_due() -> bool:
            begun.update(n for n in self._look() if n.endswith(f"-inc{self.incarnation}"))
            if len(begun) <= aim.passed:
                time.sleep(_POLL_S)
            return len(begun) > aim.passed

        return is_due

    def _rotations(self, aim: Aim) -> Callable[[], bool]:
        gone: set[str] = set()

        def is_due() -> bool:
            names = self._look()
            gone.update(n for n in names - self._before if n.startswith(".tmp-deleted-"))
            # a deletion is over in a fraction of a millisecond: no sleep while a save is being written
            if len(gone) <= aim.passed and not any(n.endswith(f"-inc{self.incarnation}") for n in names):
                time.sleep(_POLL_S)
            return len(gone) > aim.passed

        return is_due

    def _always(self, aim: Aim) -> Callable[[], bool]:
        return lambda: True

    def _look(self) -> Set[str]:
        names = _names(self._root)
        for name in names:
            if name.startswith("step-") and name not in self._ignore:
                self.newest_seen = max(self.newest_seen, int(name[5:]))
        return names

    def _place(self) -> str:
        names = self._look()
        new = names - self._before
        if any(n.startswith(".tmp-deleted-") for n in new):
            return ROTATION
        is_again = any(n.startswith(".old-") for n in new)
        for name in names:
            if not name.endswith(f"-inc{self.incarnation}"):
                continue
            files = {p.relative_to(self._root / name).as_posix() for p in _files(self._root / name)}
            if "COMPLETE" in files:
                return REPLACING if is_again else READING
            if any("/" not in file for file in files):
                return MANIFEST
            return SLICES if files else EMPTY
        if is_again:
            return REPLACED
        return TRAINING if self.is_training() and self.last_step() > self._first_step else LOADING

    def is_training(self) -> bool:
        """Whether this incarnation has built its model; metrics.jsonl then has no rows of lost steps any more."""
        events = rows(self.run.path / "events.jsonl")
        return any(e["event"] == "load" and e["incarnation"] == self.incarnation for e in events)

    def last_step(self) -> int:
        """In metrics.jsonl."""
        return max((row["step"] for row in rows(self.run.metrics_path)), default=0)

    def _logs(self) -> str:
        paths = sorted(self.run.log_dir(self.incarnation).glob("rank-*.log"))
        return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in paths)


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file that a kill may have cut anywhere."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _names(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except FileNotFoundError:
        return frozenset()


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]


def _spin(delay_s: float) -> None:
    end = time.perf_counter() + delay_s
    while time.perf_counter() < end:
        pass
