"""From numbers to places on a plot, and to words beside it."""

from __future__ import annotations

import random

from reporting import GIB

from decompft.launcher.report_scale import Axis, fit_axis, gaps, smooth, thin, tick_labels
from decompft.launcher.report_text import duration, size, text


def test_thinning_keeps_the_extremes_and_the_ends() -> None:
    rng = random.Random(1)
    points = [(float(step), rng.random()) for step in range(50_000)]
    points[31_415] = (31_415.0, 7.0)
    points[27_182] = (27_182.0, -7.0)
    kept = thin(points, Axis(low=0, high=50_000), 900)
    assert len(kept) <= 1802
    assert (31_415.0, 7.0) in kept and (27_182.0, -7.0) in kept
    assert kept[0] == points[0] and kept[-1] == points[-1]
    assert kept == sorted(kept)
    for bucket in range(900):
        width = 50_000 / 900
        inside = [
            p
            for p in points[int(bucket * width) : int((bucket + 1) * width) + 2]
            if int(p[0] / width) == bucket
        ]
        assert max(y for x, y in kept if int(x / width) == bucket) == max(y for _, y in inside)
    assert thin(points[:100], Axis(low=0, high=100), 900) == points[:100]


def test_smoothing_is_a_running_median() -> None:
    points = [(float(x), float(x)) for x in range(100)]
    points[50] = (50.0, 1e6)
    smoothed = smooth(points, 5)
    assert smoothed[10] == (10.0, 10.0) and smoothed[50] == (50.0, 51.0)
    assert [x for x, _ in smoothed] == [float(x) for x in range(100)]
    assert smooth(points, 41)[-1][0] == 99.0


def test_gaps_are_found_whatever_the_interval() -> None:
    assert gaps([1, 2, 3, 7, 8, 9]) == [(3, 7)]
    assert gaps([10, 20, 30, 60, 70]) == [(30, 60)]
    assert gaps([1, 2, 3, 10, 20, 30]) == []  # the interval was changed on resume
    assert gaps([10, 20, 30, 35]) == []  # the last step
    assert gaps([]) == gaps([5]) == gaps([5, 90]) == []


def test_ticks_are_round_and_their_labels_differ() -> None:
    assert Axis(low=0, high=1000).ticks(5) == [0, 200, 400, 600, 800, 1000]
    for low, high in [(0, 20), (5.1, 5.6), (0, 2e-4), (0, 5e6), (0.9, 40_000), (-3, 3), (1e-9, 3e-9)]:
        axis = fit_axis([low, high])
        ticks = axis.ticks(5)
        assert 3 <= len(ticks) <= 9
        assert all(axis.low <= tick <= axis.high for tick in ticks)
        assert len(set(axis.words(ticks))) == len(ticks)
    assert tick_labels([0, 1e-4, 2e-4]) == ["0", "1e-4", "2e-4"]
    assert tick_labels([0, 20_000, 40_000]) == ["0", "20k", "40k"]
    assert tick_labels([5.2, 5.3]) == ["5.2", "5.3"]
    assert fit_axis([0.01, 100], is_log=True).ticks(5) == [0.01, 0.1, 1.0, 10.0, 100.0]


def test_times_and_sizes_read_well() -> None:
    said = [duration(s) for s in (0.0123, 0.5, 3.21, 59.9, 75, 3600, 7500, 90_000, None)]
    assert said == ["12.3 ms", "0.50 s", "3.21 s", "1 min", "1 min 15 s", "1 h", "2 h 5 min", "1 d 1 h", "-"]
    assert [size(n) for n in (512, 2**20 * 1.5, GIB * 40, None)] == ["512 B", "1.50 MiB", "40.0 GiB", "-"]
    assert text('<a b="c">&\'\x07') == "&lt;a b=&quot;c&quot;&gt;&amp;&#x27;\ufffd"
    assert len(text("x" * 10**6)) < 5000
