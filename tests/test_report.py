"""The line that compares measured peak memory with the forecast."""

from __future__ import annotations

from decompft.launcher.worker.report import PeakMemory

GIB = 2**30


def test_the_line_sets_each_figure_beside_its_forecast() -> None:
    peak = PeakMemory(
        measured=40 * GIB, forecast=38 * GIB, allocated=36 * GIB, allocated_forecast=36 * GIB,
        host=5 * GIB, host_forecast=6 * GIB,
    )  # fmt: skip
    assert peak.line() == (
        "peak memory of the fullest rank: 40.00 GiB measured, 38.00 GiB forecast (-5.0 %)"
        "; in tensors 36.00 GiB measured, 36.00 GiB forecast (+0.0 %)"
        "; on the host 5.00 GiB measured, 6.00 GiB forecast (+20.0 %)"
    )


def test_a_cpu_has_one_memory() -> None:
    line = PeakMemory(measured=GIB, forecast=GIB).line()
    assert line == "peak memory of the fullest rank: 1.00 GiB measured, 1.00 GiB forecast (+0.0 %)"
