"""Which processes belong to a run, and how are its ranks held still? Linux only: it reads /proc."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from decompft.launcher.job import WORKER, job_mark
from decompft.launcher.processes import marked, read_proc
from decompft.launcher.runs import RunDir

_HELD_S = 2.0  # a thread stops when it leaves the system call that it is in
_STOPPED = "TtZX"  # states of a thread that does nothing any more


def has_proc() -> bool:
    """Whether this system shows its processes as drills need it."""
    return Path("/proc/self/environ").exists()


def rank_pids(run: RunDir, incarnation: int) -> dict[int, int]:
    """The process of each rank that has started, by rank."""
    found: dict[int, int] = {}
    for pid, environ in marked(job_mark(run.path, incarnation)):
        # what a rank starts (compilers, readers of data) inherits its environment, but not its module
        if b"RANK" in environ and WORKER.encode() in read_proc(pid, "cmdline"):
            rank = int(environ[b"RANK"])
            found[rank] = min(pid, found.get(rank, pid))
    return dict(sorted(found.items()))


def all_pids(run: RunDir) -> list[int]:
    """Every process of the run's jobs: ranks, what they started, torchrun."""
    return [pid for pid, _ in marked(job_mark(run.path))]


def hold(pids: Iterable[int]) -> None:
    """Stop processes where they are; returns when none of their threads runs any more."""
    pids = tuple(pids)
    send(pids, signal.SIGSTOP)
    deadline = time.monotonic() + _HELD_S
    while time.monotonic() < deadline and not all(_is_still(pid) for pid in pids):
        time.sleep(0.001)


def release(pids: Iterable[int]) -> None:
    """Let held processes go on."""
    send(pids, signal.SIGCONT)


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to those that are still there."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue


def _is_still(pid: int) -> bool:
    for thread in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            # the name before the state is in brackets and may hold anything
            state = thread.read_text(errors="replace").rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            continue  # it ended meanwhile
        if state not in _STOPPED:
            return False
    return True
