"""How text, numbers, times and sizes are written for people; what comes from a run's folder is untrusted."""

from __future__ import annotations

import html
import math
import re
import time

LIMIT = 4000  # characters of one text from a run's folder

# what XML refuses, what a terminal obeys, and what turns the direction of a line around
_UNSHOWN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def text(value: object, limit: int = LIMIT) -> str:
    """Any value as HTML text or as the value of a quoted attribute: escaped, shown, cut at `limit` characters."""
    return html.escape(plain(value, limit), quote=True)


def plain(value: object, limit: int = LIMIT) -> str:
    """Any value as text that a terminal shows and does not obey, cut at `limit` characters."""
    words = str(value)
    if len(words) > limit:
        words = f"{words[:limit]} ... ({len(words) - limit:,} characters more)"
    return _UNSHOWN.sub("\ufffd", words)


def number(value: float | None, digits: int = 4) -> str:
    """`5.2278`, `12,345`, `3.80e-05`; `-` for what is not known or not finite."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.{digits}g}"


def size(num_bytes: float | None) -> str:
    """`1.4 GiB`."""
    if num_bytes is None or not math.isfinite(num_bytes):
        return "-"
    value, units = float(num_bytes), ["B", "KiB", "MiB", "GiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.{_decimals(value)}f} {units[0]}"


def duration(seconds: float | None) -> str:
    """`12 ms`, `3.2 s`, `1 min 15 s`, `2 h 5 min`, `3 d 4 h`."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 0.0995:
        return f"{1000 * seconds:.{_decimals(1000 * seconds)}f} ms"
    if seconds < 59.5:
        return f"{seconds:.{_decimals(seconds)}f} s"
    whole = round(seconds)
    for unit, below, length in (("d", "h", 86400), ("h", "min", 3600), ("min", "s", 60)):
        if whole >= length:
            rest = whole % length * {"h": 1 / 3600, "min": 1 / 60, "s": 1}[below]
            return (
                f"{whole // length} {unit} {int(rest)} {below}" if int(rest) else f"{whole // length} {unit}"
            )
    raise AssertionError(seconds)


def counted(num: int, thing: str) -> str:
    """`1 step`, `12,000 steps`."""
    return f"{num:,} {thing}{'' if num == 1 else 's'}"


def moment(time_s: float | None) -> str:
    """`2026-11-22 14:03:12 UTC`."""
    if time_s is None:
        return "-"
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(time_s))
    except (OverflowError, ValueError, OSError):  # not a time: the file is not ours
        return "-"


def _decimals(value: float) -> int:
    return 0 if abs(value) >= 99.5 else 1 if abs(value) >= 9.95 else 2
