"""How does Slurm write a length of time? `9:57`, `1:30:00`, `1-12:00:00`."""

from __future__ import annotations

import re


def seconds(text: str) -> int | None:
    """Of a [D-][HH:]MM:SS; None for UNLIMITED, NOT_SET, INVALID and the like."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text, re.ASCII)
    if not found:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return days * 86400 + hours * 3600 + minutes * 60 + rest


def clock(time_s: int) -> str:
    """[D-]HH:MM:SS."""
    days, rest = divmod(time_s, 86400)
    text = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{text}" if days else text
