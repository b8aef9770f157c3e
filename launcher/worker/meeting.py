"""How do the ranks of a save find each other without a collective: through small files.

A save runs on threads beside the training loop, and sometimes while a rank hangs in a collective or is gone, so that
no process group can carry it. Rank K leaves `rank-K.json` (it wrote its part) or `rank-K.failed` in the save's
temporary folder; the leader (rank 0, or who stands in for it) then leaves a verdict in the incarnation's folder.
Folders are listed, not looked up: opening a folder is what makes NFS ask the server again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decompft.launcher.errors import RunFailed
from decompft.launcher.outcome import write_atomic

ANOTHER = "another rank could not write its part"
_POLL_S, _SLOWEST_POLL_S = 0.01, 0.25


class AnotherRankFailed(RunFailed):
    """This rank did its part."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long ranks wait for one another."""

    timeout_s: float = 1800.0
    called_off: Callable[[], bool] = lambda: False  # the training loop knows that the save has failed
    only: frozenset[int] | None = None  # ranks that take part where the others may be gone; None: all


PATIENT = Patience()


def wait_for_parts(folder: Path, world_size: int, patience: Patience) -> list[int]:
    """The leader: the ranks whose part is in `folder`, all that take part.

    Raises:
        RunFailed: a rank failed, the save was called off, or time is up.
    """
    missing = awaited = sorted(range(world_size) if patience.only is None else patience.only)
    for names in _polls(folder, patience):
        failed = sorted(name for name in names if name.endswith(".failed"))
        if failed:
            raise AnotherRankFailed(f"{ANOTHER}: {_read_text(folder / failed[0]) or failed[0]}")
        missing = [rank for rank in awaited if f"{stem(rank)}.json" not in names]
        if not missing:
            return awaited
    raise RunFailed(
        f"rank {missing[0]} did not write its part within {patience.timeout_s:.0f} s",
        "look at that rank's log and at the speed of the file system",
    )


def leave(temp: Path, rank: int, failure: RunFailed) -> None:
    """This rank's part will not come: say so, or, where the save has failed anyway, leave nothing.

    On a full disk the half-written file makes the room for the word.
    """
    folder = temp / "state"
    for name in (f"{stem(rank)}.safetensors", f"{stem(rank)}.json", f".{stem(rank)}.json"):
        with suppress(OSError):
            (folder / name).unlink(missing_ok=True)
    if isinstance(failure, AnotherRankFailed):
        with suppress(OSError):  # whoever is last finds it empty
            folder.rmdir()
            temp.rmdir()
    else:
        with suppress(OSError):
            (folder / f"{stem(rank)}.failed").write_text(f"rank {rank}: {failure}", encoding="utf-8")


def write_verdict(path: Path, step: int, failure: Exception | None) -> None:
    """The leader's last word on a save; disk permitting."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"step": step, "failure": None if failure is None else str(failure)}))


def wait_for_verdict(path: Path, step: int, patience: Patience) -> None:
    """The other ranks: return when the checkpoint is in place.

    Raises:
        RunFailed: it never will be.
    """
    for _ in _polls(path.parent, patience):
        verdict = _read_verdict(path, step)
        if verdict is not None:
            if verdict["failure"] is not None:
                raise AnotherRankFailed(ANOTHER)
            return
    raise RunFailed(
        f"the rank that commits gave no verdict within {patience.timeout_s:.0f} s",
        "look at the log of rank 0, or of the lowest rank that is there",
    )


def has_failed(path: Path, step: int) -> bool:
    """Whether the leader has said that the save of this step is over."""
    verdict = _read_verdict(path, step)
    return verdict is not None and verdict["failure"] is not None


def stem(rank: int) -> str:
    return f"rank-{rank:05d}"


def _read_verdict(path: Path, step: int) -> dict[str, Any] | None:
    try:
        verdict: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return verdict if verdict["step"] == step else None


def _polls(folder: Path, patience: Patience) -> Iterator[list[str]]:
    """The names in a folder, again and again until time is up."""
    end, wait = time.monotonic() + patience.timeout_s, _POLL_S
    while time.monotonic() < end:
        if patience.called_off():
            raise AnotherRankFailed(ANOTHER)
        try:
            yield os.listdir(folder)
        except FileNotFoundError:  # not made yet, or removed by a leader that has given up
            yield []
        time.sleep(wait)
        wait = min(wait * 1.5, _SLOWEST_POLL_S)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")[:500]
    except OSError:
        return ""
