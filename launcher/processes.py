"""Which processes carry a job's mark, and how old is this one? Linux only: it reads /proc."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from decompft.launcher.job import MARK


def marked(mark: str) -> Iterator[tuple[int, dict[bytes, bytes]]]:
    """Each such process and its environment; none where there is no /proc.

    Args:
        mark: of one incarnation's job, or what those of a run begin with: see job_mark.
    """
    needle = f"\0{MARK}={mark}".encode() + (b"" if mark.endswith("#") else b"\0")
    for folder in Path("/proc").glob("[0-9]*"):
        environ = read_proc(int(folder.name), "environ")
        if needle in b"\0" + environ + b"\0":
            words = (word.split(b"=", 1) for word in environ.split(b"\0") if b"=" in word)
            yield int(folder.name), {name: value for name, value in words}


def process_age_s() -> float:
    """Seconds since this process began, Python's own start included; 0.0 where there is no /proc."""
    fields = read_proc(os.getpid(), "stat").rpartition(b")")[2].split()
    if len(fields) < 20:
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK"))


def read_proc(pid: int, name: str) -> bytes:
    """A file of a process; empty where it has ended or is another user's."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
