"""The runs of the speed table: each can be planned on the machine it is for, and a row is set beside its targets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from planning import GIB

from decompft.launcher import planner
from decompft.launcher.machine import Machine
from decompft.launcher.source import load

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from gpu_7b import beside_targets, command, fixed, table  # noqa: E402
from speed_cases import RECIPE, Case, cases, with_twins  # noqa: E402


@pytest.mark.parametrize("gpus", [1, 2])
def test_every_case_can_be_planned(gpus: int) -> None:
    machine = Machine(
        num_gpus=gpus, gpu_name="NVIDIA H200", gpu_memory_bytes=139 * GIB, compute_capability=(9, 0),
        num_cores=16, host_memory_bytes=128 * GIB,
    )  # fmt: skip
    chosen = cases(gpus)
    assert (
        len({case.name for case in chosen}) == len(chosen) == len({c.overrides + (c.recipe,) for c in chosen})
    )
    for case in chosen:
        plan = planner.make(load(case.recipe, list(case.overrides)), machine=machine)
        assert plan.cuda_graph == ("graph" in case.name), case.name
        assert plan.recompute in case.name or case.name.startswith(("map-", "8b")), case.name


def test_a_row_is_set_beside_its_targets_its_peer_and_its_twin() -> None:
    case = Case(name="lora-none-fp8", overrides=(), tokens_per_s=27_000, peak_gib=34.0, peer="nf4-liger")
    row: dict[str, Any] = {
        "case": case.name, "tokens_per_s": 54_000, "ranks": 2, "peak_in_tensors_gib": 17.0, "losses": [2.0, 1.1]
    }  # fmt: skip
    twin = {"case": "lora-none-bfloat16", "losses": [2.0, 1.0]}
    peer = {"case": "nf4-liger", "tokens_per_s": 18_000}
    found = beside_targets(row, case, [peer, twin])
    assert (found["over_target"], found["memory_over_target"], found["over_peer"]) == (1.0, 0.5, 1.5)
    assert found["loss_apart"] == pytest.approx(0.1)
    assert "| lora-none-fp8 | 27,000 | 1.0 | 1.5 | 17.0 | 0.5 |  |" in table([found])
    assert "failed" in table([{"case": "x", "error": "out of memory"}])


@pytest.mark.parametrize(
    ("start", "end", "compute", "trained"),
    [
        (11.0, 3.60, "bfloat16", True),
        (11.0, 3.70, "bfloat16", False),  # not as its twin
        (11.0, 3.69, "fp8", True),
        (3.5, 3.60, "bfloat16", False),  # not fallen
    ],
)
def test_a_row_has_trained_if_its_loss_fell_to_its_twins(
    start: float, end: float, compute: str, trained: bool
) -> None:
    case = Case(name="lora", overrides=("train.recompute=full",), twin=("train.recompute=none",))
    twin = {
        "case": "lora-twin", "fixed_loss": [11.0, 3.59],
        "command": command(RECIPE, [*case.twin, fixed(RECIPE)], unfused=True),
    }  # fmt: skip
    row = {
        "case": "lora", "tokens_per_s": 1, "ranks": 1, "peak_in_tensors_gib": 1.0, "compute": compute,
        "fixed_loss": [start, end], "losses": [],
    }  # fmt: skip
    found = beside_targets(row, case, [twin])
    assert found["ok"] is trained
    assert ("| yes; " if trained else "| NO; ") in table([found])


def test_each_twin_is_run_once_before_those_that_it_is_the_twin_of() -> None:
    chosen = with_twins(cases(1))
    made = [c for c in chosen if c.is_unfused]
    assert len({(c.overrides, c.recipe) for c in made}) == len(made) == 6
    seen = set()
    for case in chosen:
        if case.is_unfused:
            seen.add((case.overrides, case.recipe))
        else:
            assert (case.twin, case.recipe) in seen, case.name
    assert all("DECOMPFT_TRITON=0 " in command(c.recipe, list(c.overrides), unfused=True) for c in made)
