"""Bars as inline SVG: memory in stacked parts, and what happened when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from decompft.launcher.report_plots import NUM_COLOURS, Tone
from decompft.launcher.report_scale import Axis, tick_labels
from decompft.launcher.report_text import duration, size, text

_CHAR = 7.2


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A total in named parts."""

    name: str
    parts: Sequence[tuple[str, float, int]]  # (name, bytes, colour), in the order in which they are stacked
    words: str  # behind the bar


def draw_memory(bars: Sequence[Bar], capacity: float | None, *, width: int = 520, height: int = 250) -> str:
    """Stacked bars of bytes, and a line where the device is full unless that is far away."""
    longest = max((sum(num for _, num, _ in bar.parts) for bar in bars), default=0.0) or 1.0
    if capacity is not None and capacity > 4 * longest:
        capacity = None
    top = max(longest, capacity or 0.0)
    unit = 2.0**30 if top >= 2**30 / 4 else 2.0**20
    axis = Axis(low=0.0, high=1.04 * top / unit)
    left, right, first, bottom = 92, width - 14, 26, height - 40

    def x(num_bytes: float) -> float:
        return left + axis.part(num_bytes / unit) * (right - left)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="memory" class="half">']
    ticks = axis.ticks(5)
    for value, label in zip(ticks, tick_labels(ticks), strict=True):
        at = x(value * unit)
        parts.append(f'<path class="grid" d="M{at:.1f} {first - 8}V{bottom}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 17}" class="mid">{text(label)}</text>')
    parts.append(f'<path class="axis" d="M{left} {first - 8}V{bottom}H{right}"/>')
    unit_name = "GiB" if unit == 2.0**30 else "MiB"
    parts.append(
        f'<text x="{(left + right) / 2}" y="{height - 6}" class="mid title">{unit_name} of a rank</text>'
    )
    room = (bottom - first) / max(len(bars), 1)
    thick = min(30.0, room - 22)
    for index, bar in enumerate(bars):
        y, begin = first + index * room + (room - thick - 16) / 2, 0.0
        for name, num_bytes, colour in bar.parts:
            part = x(begin + num_bytes) - x(begin)
            parts.append(
                f'<rect class="bar c{colour % NUM_COLOURS}" x="{x(begin):.1f}" y="{y:.1f}" width="{part:.1f}" '
                f'height="{thick:.1f}"><title>{text(name)}: {size(num_bytes)}</title></rect>'
            )
            begin += num_bytes
        parts.append(f'<text x="{left - 8}" y="{y + thick / 2 + 4:.1f}" class="end">{text(bar.name)}</text>')
        parts.append(f'<text x="{left + 4}" y="{y + thick + 13:.1f}">{text(bar.words)}</text>')
    if capacity is not None:
        at, words = x(capacity), f"full at {size(capacity)}"
        parts.append(f'<path class="level bad" d="M{at:.1f} {first - 8}V{bottom}"/>')
        parts.append(f'<text x="{at - 4:.1f}" y="{first - 12}" class="end bad">{words}</text>')
    parts.append("</svg>")
    return "".join(parts)


@dataclass(frozen=True, kw_only=True)
class Span:
    """Something with a beginning and an end; alike, it is a moment."""

    begin_s: float
    end_s: float
    words: str  # its title
    tone: Tone = "plain"
    label: str = ""  # written on it where there is room


@dataclass(frozen=True, kw_only=True)
class Lane:
    """Spans of one kind."""

    name: str
    spans: Sequence[Span]


_UNITS = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
_THICK = 20
_ROOM = 30  # of a lane
_MAX_TITLES = 300


def draw_timeline(lanes: Sequence[Lane], *, width: int = 1060) -> str:
    """Lanes under one another over the time since the first of them began."""
    begin = min((span.begin_s for lane in lanes for span in lane.spans), default=0.0)
    length = max((span.end_s for lane in lanes for span in lane.spans), default=0.0) - begin
    length = max(length, 1.0)
    unit_name, unit = next((u for u in _UNITS if length >= 2 * u[1]), _UNITS[-1])
    axis = Axis(low=0.0, high=1.01 * length / unit)
    left, right, first = 104, width - 14, 12
    bottom = first + _ROOM * len(lanes)

    def x(time_s: float) -> float:
        return left + axis.part((time_s - begin) / unit) * (right - left)

    parts = [f'<svg viewBox="0 0 {width} {bottom + 40}" role="img" aria-label="timeline" class="wide">']
    ticks = axis.ticks(8)
    for value, label in zip(ticks, tick_labels(ticks), strict=True):
        at = x(begin + value * unit)
        parts.append(f'<path class="grid" d="M{at:.1f} {first}V{bottom}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 16}" class="mid">{text(label)}</text>')
    words = f"{unit_name} since the first start"
    parts.append(f'<text x="{(left + right) / 2:.0f}" y="{bottom + 34}" class="mid title">{words}</text>')
    for index, lane in enumerate(lanes):
        y = first + index * _ROOM + (_ROOM - _THICK) / 2
        parts.append(
            f'<text x="{left - 8}" y="{y + _THICK / 2 + 4:.1f}" class="end">{text(lane.name)}</text>'
        )
        spans = {(round(x(span.begin_s)), round(x(span.end_s)), span.tone): span for span in lane.spans}
        if len(spans) > _MAX_TITLES:  # thousands of saves are a pattern, and nobody reads their titles
            places = "".join(f"M{at} {y:.0f}h{max(end - at, 1)}v{_THICK}H{at}z" for at, end, _ in spans)
            parts.append(f'<path class="instants {lane.spans[0].tone}" d="{places}"/>')
            continue
        for span in spans.values():
            at, end = x(span.begin_s), x(span.end_s)
            title = f"{span.words} ({duration(span.begin_s - begin)} after the first start)"
            parts.append(
                f'<rect class="span {span.tone}" x="{at:.1f}" y="{y:.1f}" width="{max(end - at, 2.5):.1f}" '
                f'height="{_THICK}"><title>{text(title)}</title></rect>'
            )
            if span.label and end - at > _CHAR * len(span.label) + 8:
                label, middle = text(span.label), (at + end) / 2
                parts.append(
                    f'<text x="{middle:.1f}" y="{y + _THICK / 2 + 4:.1f}" class="mid on">{label}</text>'
                )
    parts.append("</svg>")
    return "".join(parts)
