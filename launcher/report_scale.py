"""From numbers to places on a plot: limits, ticks and their labels, decimation, smoothing, gaps."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from statistics import median

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A range of values, and whether it is drawn by decades."""

    low: float
    high: float
    is_log: bool = False

    def part(self, value: float) -> float:
        """Where a value lies: 0 at the low end, 1 at the high end, outside when beyond."""
        if not self.is_log:
            return (value - self.low) / (self.high - self.low)
        if value <= 0:
            return -1.0
        return math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self, num: int) -> list[float]:
        """About `num` round values in the range."""
        return _decades(self.low, self.high) if self.is_log else _round_values(self.low, self.high, num)

    def words(self, ticks: Sequence[float]) -> list[str]:
        """What is written at the ticks."""
        return [f"{tick:g}" for tick in ticks] if self.is_log else tick_labels(ticks)


def fit_axis(values: Iterable[float], *, from_zero: bool = False, is_log: bool = False) -> Axis:
    """The range of the finite values, with some air."""
    finite = [value for value in values if math.isfinite(value) and (value > 0 or not is_log)]
    if not finite:
        return Axis(low=0.1 if is_log else 0.0, high=1.0, is_log=is_log)
    low, high = min(finite), max(finite)
    if is_log:
        return Axis(low=max(low / 1.5, 1e-300), high=min(high * 1.5, 1e300), is_log=True)
    if from_zero:
        low = min(low, 0.0)
    air = 0.06 * (high - low)
    if air < 1e-4 * abs(high) or air == 0:  # a level line, but for rounding
        air = 0.1 * abs(high) or 1.0
    return Axis(low=0.0 if from_zero and low == 0 else low - air, high=high + air)


def without_spikes(values: Sequence[float]) -> list[float]:
    """The values that an axis must show: a few far above the rest would leave the rest a flat line."""
    finite = sorted(value for value in values if math.isfinite(value))
    if len(finite) < 40:
        return finite
    low, high = finite[len(finite) // 50], finite[-1 - len(finite) // 50]
    return [value for value in finite if value <= high + 1.5 * (high - low)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Short labels that tell the ticks apart: `0.25`, `1,500`, `20k`, `1.5M`, `2e-4`."""
    top = max((abs(tick) for tick in ticks), default=0.0)
    if 0 < top < 2e-3 or top >= 1e10:
        return ["0" if tick == 0 else _scientific(tick) for tick in ticks]
    scale, suffix = (
        (1e9, "G") if top >= 1e9 else (1e6, "M") if top >= 1e6 else (1e3, "k") if top >= 2e4 else (1, "")
    )
    scaled = [tick / scale for tick in ticks]
    for decimals in range(7):
        labels = [f"{value:,.{decimals}f}" for value in scaled]
        if len(set(labels)) == len(labels) and all(
            abs(float(label.replace(",", "")) - value) <= 1e-3 * abs(value) + 1e-12
            for label, value in zip(labels, scaled, strict=True)
        ):
            break
    return [label if value == 0 else label + suffix for label, value in zip(labels, scaled, strict=True)]


def gaps(steps: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring steps between which rows are missing: further apart than the rows on either side."""
    apart = [after - before for before, after in zip(steps, steps[1:], strict=False)]
    found = []
    for index, length in enumerate(apart):
        beside = [*apart[max(0, index - 1) : index], *apart[index + 1 : index + 2]]
        if beside and length > 1.5 * max(beside):
            found.append((steps[index], steps[index + 1]))
    return found


def pieces(points: Iterable[Point], holes: Sequence[tuple[int, int]] = ()) -> list[list[Point]]:
    """The points as unbroken lines: cut at holes, and at values that are not finite."""
    starts = {after for _, after in holes}
    cut: list[list[Point]] = [[]]
    for x, y in points:
        if not math.isfinite(y):
            cut.append([])
            continue
        if x in starts:
            cut.append([])
        cut[-1].append((x, y))
    return [piece for piece in cut if piece]


def smooth(piece: Sequence[Point], window: int) -> list[Point]:
    """Medians of `window` neighbouring points, fewer at the ends; a spike does not bend them.

    A wide window moves on by an eighth of its width, which no eye can tell from point by point.
    """
    half, stride = window // 2, max(1, window // 8)
    places = [*range(0, len(piece) - 1, stride), len(piece) - 1]
    return [(piece[i][0], median(y for _, y in piece[max(0, i - half) : i + half + 1])) for i in places]


def thin(piece: Sequence[Point], x_axis: Axis, num_buckets: int) -> list[Point]:
    """At most two points a bucket, the lowest and the highest: the same picture, however many rows.

    The first and the last point stay.
    """
    if len(piece) <= 2 * num_buckets:
        return list(piece)
    width = (x_axis.high - x_axis.low) / num_buckets
    kept, begin = [piece[0]], 0
    while begin < len(piece):
        bucket = math.floor((piece[begin][0] - x_axis.low) / width)
        end = bisect_left(piece, x_axis.low + (bucket + 1) * width, lo=begin + 1, key=_X)
        low, high = min(piece[begin:end], key=_Y), max(piece[begin:end], key=_Y)
        kept += sorted({low, high} - {kept[-1]})
        begin = end
    return kept if kept[-1] == piece[-1] else [*kept, piece[-1]]


_X, _Y = itemgetter(0), itemgetter(1)


def _round_values(low: float, high: float, num: int) -> list[float]:
    rough = (high - low) / max(num, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    every = max(1, (last - first) // 6)
    values = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    return [value for value in values if low <= value <= high]


def _scientific(value: float) -> str:
    digits, power = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(power)}"
