"""Which processes of this machine hold a file's lock? Asked of the kernel, since taking it would be in the way."""

from __future__ import annotations

from pathlib import Path


def lock_holders(lock: Path) -> list[int]:
    """Their pids; the kernel goes on naming the one that took the lock, when others have inherited it."""
    try:
        number = str(lock.stat().st_ino)
        held = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    rows = [words for words in map(str.split, held) if len(words) > 5 and words[1] == "FLOCK"]
    return [int(words[4]) for words in rows if words[5].rpartition(":")[2] == number]
