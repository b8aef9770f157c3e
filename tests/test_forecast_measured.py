"""The forecast against what was measured on H200s (benchmarks/results)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from decompft.launcher.forecast import EFFECTIVE_FLOPS
from decompft.launcher.machine import Machine
from decompft.launcher.planner import make
from decompft.launcher.source import load

ROOT = Path(__file__).parent.parent
GIB = 2**30
ROWS = [
    row
    for name in ("single_gpu.json", "multi_gpu.json")
    for row in json.loads((ROOT / "benchmarks" / "results" / name).read_text())
    if row["stack"] == "decompft"
]


def test_there_are_rows_of_every_strategy() -> None:
    assert {row["strategy"] for row in ROWS} == {"single", "ddp", "fsdp"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['case']}-{row['tokens_per_s']}")
def test_forecast_is_within_5_percent_of_the_measured_peak(row) -> None:
    machine = Machine(num_gpus=row["ranks"], gpu_memory_bytes=140 * GIB, gpu_name="NVIDIA H200", num_cores=16)
    overrides = [part for part in row["command"].split() if "=" in part]
    plan = make(load(ROOT / "benchmarks" / "llama7b_shape.yaml", overrides), machine=machine)
    assert (plan.strategy, plan.recompute) == (row["strategy"], row["recompute"])
    assert plan.forecast.total_bytes == pytest.approx(row["peak_gib"] * GIB, rel=0.05)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_known_speed_is_the_newest_measurement_of_map(recompute) -> None:
    rows = [
        r for r in ROWS if r["strategy"] == "single" and r["adapter"] == "map" and r["recompute"] == recompute
    ]
    newest = [r for r in rows if r["accumulation"] == 1][-1]
    assert EFFECTIVE_FLOPS["H200", recompute] == newest["tokens_per_s"] * 28.0e9
