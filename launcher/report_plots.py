"""Plots over steps as inline SVG, drawn by hand: lines, dots, levels, restarts and gaps, with axes and units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from decompft.launcher.report_scale import Axis, Point, thin
from decompft.launcher.report_text import text

NUM_COLOURS = 8  # classes c0 to c7 of the page's style
Tone = Literal["good", "wait", "bad", "plain"]

_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 32, 40  # margins in units of the view box
_CHAR = 7.2  # width of a character, about
_FEW = 40  # points of a line, each of which is to be seen
_MAX_DOTS = 400  # that get a title of their own


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One colour's worth of points."""

    pieces: Sequence[Sequence[Point]]  # unbroken lines; of dots: any grouping
    name: str
    colour: int = 0
    kind: Literal["line", "faint", "dots"] = "line"
    is_dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Something that happened at a step: a vertical line with a word on it."""

    x: float
    words: str
    tone: Tone = "plain"


@dataclass(frozen=True, kw_only=True)
class Level:
    """A value to compare with: a horizontal line with a word on it."""

    y: float
    words: str
    tone: Tone = "plain"


@dataclass(frozen=True, kw_only=True)
class Plot:
    """What is drawn; `label` is read out instead of the picture."""

    label: str
    x_axis: Axis
    y_axis: Axis
    x_title: str
    y_title: str  # with the unit
    curves: Sequence[Curve]
    marks: Sequence[Mark] = ()
    levels: Sequence[Level] = ()
    holes: Sequence[tuple[float, float]] = ()  # where rows are missing
    width: int = 520
    height: int = 250
    y_words: Callable[[Sequence[float]], list[str]] | None = None  # of ticks; None: plain numbers


def draw(plot: Plot) -> str:
    """The plot as an <svg> element; its colours are the page's."""
    frame = _Frame(plot)
    parts = [
        f'<svg viewBox="0 0 {plot.width} {plot.height}" role="img" aria-label="{text(plot.label)}" '
        f'class="{"wide" if plot.width > 600 else "half"}">'
    ]
    parts += _axes(plot, frame)
    parts += [_hole(frame, hole) for hole in plot.holes]
    parts += _levels(plot, frame)
    parts += _marks(plot, frame)  # under the curves: a run often fails right after its last row
    num_buckets = max(60, min(frame.inner_width, 6000 // max(len(plot.curves), 1)))
    for curve in plot.curves:
        parts += _dots(curve, frame) if curve.kind == "dots" else _line(curve, frame, num_buckets)
    parts.append("</svg>")
    return "".join(parts)


class _Frame:
    """Values to units of the view box."""

    def __init__(self, plot: Plot) -> None:
        self.x_axis, self.y_axis = plot.x_axis, plot.y_axis
        self.left, self.right = _LEFT, plot.width - _RIGHT
        self.top, self.bottom = _TOP, plot.height - _BOTTOM
        self.inner_width = self.right - self.left

    def x(self, value: float) -> float:
        part = min(max(self.x_axis.part(value), 0.0), 1.0)
        return self.left + part * self.inner_width

    def y(self, value: float) -> float:
        """Values beyond the axis lie on its edge."""
        part = min(max(self.y_axis.part(value), 0.0), 1.0)
        return self.bottom - part * (self.bottom - self.top)


def _axes(plot: Plot, frame: _Frame) -> list[str]:
    parts = []
    ticks = frame.y_axis.ticks(5)
    for value, label in zip(ticks, (plot.y_words or frame.y_axis.words)(ticks), strict=True):
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{frame.left} {y:.1f}H{frame.right}"/>')
        parts.append(f'<text x="{frame.left - 6}" y="{y + 4:.1f}" class="end">{text(label)}</text>')
    # steps are whole numbers
    steps = [value for value in frame.x_axis.ticks(max(2, frame.inner_width // 90)) if value == int(value)]
    for value in steps:
        x = frame.x(value)
        parts.append(f'<path class="axis" d="M{x:.1f} {frame.bottom}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{frame.bottom + 17}" class="mid">{int(value):,}</text>')
    parts.append(f'<path class="axis" d="M{frame.left} {frame.top}V{frame.bottom}H{frame.right}"/>')
    middle = (frame.left + frame.right) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{plot.height - 6}" class="mid title">{text(plot.x_title)}</text>'
    )
    parts.append(f'<text x="4" y="12" class="title">{text(plot.y_title)}</text>')
    return parts


def _hole(frame: _Frame, hole: tuple[float, float]) -> str:
    x, end = frame.x(hole[0]), frame.x(hole[1])
    words = f"no rows between step {hole[0]:,.0f} and step {hole[1]:,.0f}"
    box = (
        f'<rect class="hole" x="{x:.1f}" y="{frame.top}" width="{max(end - x, 1):.1f}" '
        f'height="{frame.bottom - frame.top}"><title>{text(words)}</title></rect>'
    )
    if end - x < 50:
        return box
    return (
        f'{box}<text x="{(x + end) / 2:.1f}" y="{(frame.top + frame.bottom) / 2}" class="mid">no rows</text>'
    )


def _levels(plot: Plot, frame: _Frame) -> list[str]:
    parts: list[str] = []
    taken: list[float] = []
    for level in sorted(plot.levels, key=lambda level: -level.y):
        y = frame.y(level.y)
        parts.append(f'<path class="level {level.tone}" d="M{frame.left} {y:.1f}H{frame.right}"/>')
        # above its line, or below the line where another's words are
        places = [at for at in (y - 4, y + 13) if at > frame.top + 8 and all(abs(at - t) > 12 for t in taken)]
        place = places[0] if places else None
        if place is not None:
            taken.append(place)
            words = text(level.words)
            parts.append(
                f'<text x="{frame.right - 4}" y="{place:.1f}" class="end {level.tone}">{words}</text>'
            )
    return parts


def _line(curve: Curve, frame: _Frame, num_buckets: int) -> list[str]:
    path: list[str] = []
    dots: list[str] = []
    above: list[float] = []
    for piece in curve.pieces:
        if curve.kind == "faint" or len(curve.pieces) == 1:
            above += [x for x, y in piece if frame.y_axis.part(y) > 1]
        thinned = thin(piece, frame.x_axis, num_buckets)
        places = [f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in thinned]
        if curve.kind == "line" and len(piece) <= _FEW:
            dots += places
        # a line of one point is a dot
        path.append(f"M{places[0]}" + ("L" + " ".join(places[1:]) if len(places) > 1 else "h0"))
    if not path:
        return []
    style = f"{curve.kind} c{curve.colour % NUM_COLOURS}{' dash' if curve.is_dashed else ''}"
    parts = [f'<path class="{style}" d="{"".join(path)}"><title>{text(curve.name)}</title></path>']
    if dots:
        parts.append(
            f'<path class="many c{curve.colour % NUM_COLOURS}" d="{"".join(f"M{at}h0" for at in dots)}"/>'
        )
    if above:
        places = sorted({f"{frame.x(x):.0f}" for x in above})
        arrows = "".join(f"M{x} {frame.top}l-4 7h8z" for x in places)
        parts.append(f'<path class="above c{curve.colour % NUM_COLOURS}" d="{arrows}"/>')
    return parts


def _dots(curve: Curve, frame: _Frame) -> list[str]:
    points = [point for piece in curve.pieces for point in piece]
    colour = f"c{curve.colour % NUM_COLOURS}"
    if len(points) > _MAX_DOTS:
        places = dict.fromkeys(f"{frame.x(x):.0f} {frame.y(y):.0f}" for x, y in points)
        return [f'<path class="many {colour}" d="{"".join(f"M{place}h0" for place in places)}"/>']
    return [
        f'<circle class="dot {colour}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="4">'
        f"<title>{text(curve.name)}: {text(plot_value(y))} at step {x:,.0f}</title></circle>"
        for x, y in points
    ]


def plot_value(value: float) -> str:
    """A value as a dot's title says it."""
    return f"{value:.5g}"


def _marks(plot: Plot, frame: _Frame) -> list[str]:
    parts: list[str] = []
    free_from = float("-inf")
    drawn: set[tuple[int, str]] = set()
    for mark in sorted(plot.marks, key=lambda mark: mark.x):
        x = frame.x(mark.x)
        if (round(x / 3), mark.tone) in drawn:
            continue  # a thousand restarts are no more to see than one every three pixels
        drawn.add((round(x / 3), mark.tone))
        parts.append(
            f'<path class="mark {mark.tone}" d="M{x:.1f} {frame.top}V{frame.bottom}">'
            f"<title>{text(mark.words)} at step {mark.x:,.0f}</title></path>"
        )
        length = _CHAR * len(mark.words)
        begin = x - 3 - length if x + 3 + length > frame.right else x + 3
        if begin < free_from:
            continue
        free_from = begin + length + 8
        parts.append(
            f'<text x="{begin:.1f}" y="{frame.top - 4}" class="{mark.tone}">{text(mark.words)}</text>'
        )
    return parts
