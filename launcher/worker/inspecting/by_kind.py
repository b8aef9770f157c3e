"""What is typical of each kind of layer, and how does it go with depth?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol, TypeVar

SPIKE = 2.0  # the first layer stands out where it is this many times the median of the others


class Placed(Protocol):
    """A row that belongs to a kind of layer at a depth."""

    @property
    def kind(self) -> str: ...

    @property
    def depth(self) -> int | None: ...


Row = TypeVar("Row", bound=Placed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """A number over the depth of one kind of layer."""

    depths: tuple[int, ...]
    values: tuple[float, ...]
    slope: float | None  # least squares, per layer; None with one depth
    slope_share: float | None  # slope times (last - first depth), over the mean: growth over the model
    first_over_median: (
        float | None
    )  # the first value over the median of the others; None with less than 3 others
    spike_at_first: bool  # `first_over_median` is 2 or more


def by_kind(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of each kind, in order of first appearance."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row.kind, []).append(row)
    return kinds


def profile(rows: Sequence[Row], number: Callable[[Row], float | None]) -> Profile:
    """`number` over the depth of rows of one kind; layers without it or without a depth are left out."""
    points = sorted((r.depth, v) for r in rows if r.depth is not None and (v := number(r)) is not None)
    depths, values = tuple(d for d, _ in points), tuple(v for _, v in points)
    slope = share = first = None
    if len(set(depths)) > 1:
        x, y = sum(depths) / len(depths), sum(values) / len(values)
        slope = sum((d - x) * (v - y) for d, v in points) / sum((d - x) ** 2 for d in depths)
        share = slope * (depths[-1] - depths[0]) / y if y else None
    if len(values) > 3 and (middle := median(values[1:])) > 0:
        first = values[0] / middle
    return Profile(
        depths=depths,
        values=values,
        slope=slope,
        slope_share=share,
        first_over_median=first,
        spike_at_first=first is not None and first >= SPIKE,
    )


def typical(numbers: Iterable[float | None]) -> float | None:
    """The median of those that there are."""
    known = [n for n in numbers if n is not None]
    return median(known) if known else None


def extreme(numbers: Iterable[float | None]) -> float | None:
    """The one of largest size of those that there are, with its sign."""
    known = [n for n in numbers if n is not None]
    return max(known, key=abs) if known else None
