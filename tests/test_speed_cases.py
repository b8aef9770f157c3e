"""The runs of the speed table: each can be planned on the machine it is for, and a row is set beside its targets."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from planning import GIB

from decompft.launcher import planner
from decompft.launcher.machine import Machine
from decompft.launcher.source import load

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import gpu_7b  # noqa: E402
from gpu_7b import add, beside_targets, command, fixed, table  # noqa: E402
from speed_cases import RECIPE, Case, cases, with_twins  # noqa: E402
from waiting import waiting  # noqa: E402


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


@pytest.mark.parametrize("together", [1, 2])
def test_a_row_is_there_before_the_next_one_runs(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    ran: list[str] = []

    def run(name: str, *_: Any, **__: Any) -> dict[str, Any]:
        ran.append(name)
        return {"case": name}

    monkeypatch.setattr(gpu_7b, "run_ours", run)
    chosen = [
        Case(name=n, overrides=(n,), is_unfused=n.endswith("twin")) for n in ("a-twin", "a", "b-twin", "b")
    ]
    jobs = [(case, list(case.overrides), case.name) for case in chosen]
    names = []
    for (case, *_), row in gpu_7b.made(jobs, together):
        names.append(case.name)
        assert row["case"] == case.name
        assert ran == names or (together > 1 and case.is_unfused)
    assert names == {1: ["a-twin", "a", "b-twin", "b"], 2: ["a-twin", "b-twin", "a", "b"]}[together]


def test_a_run_that_waits_for_the_gpu_comes_to_it_when_the_other_has_ended(tmp_path: Path) -> None:
    path, ready = tmp_path / "gpu.lock", tmp_path / "ready"
    code = (
        f"import pathlib, torch\npathlib.Path({str(ready)!r}).touch()\n"
        "try:\n    torch.cuda.init()\nexcept (AssertionError, RuntimeError):\n    pass  # no GPU\nprint('there')"
    )
    environment = waiting({n: v for n, v in os.environ.items() if n != "PYTHONPATH"}, path)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        child = subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
        )
        while not ready.exists():
            assert child.poll() is None
            time.sleep(0.05)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(timeout=1)
    assert child.communicate(timeout=60)[0] == "there\n"


def test_a_row_is_set_beside_its_targets_and_the_peers_of_its_call() -> None:
    case = Case(
        name="lora-none-fp8", overrides=(), tokens_per_s=27_000, peak_gib=34.0, peers=("nf4-liger", "unsloth-false")
    )  # fmt: skip
    row: dict[str, Any] = {
        "case": case.name, "tokens_per_s": 54_000, "ranks": 2, "peak_in_tensors_gib": 17.0, "losses": [2.0, 1.1],
        "call": "now",
    }  # fmt: skip
    twin = {"case": "lora-none-bfloat16", "losses": [2.0, 1.0], "stack": "decompft"}
    peers = [
        {"case": "nf4-liger", "tokens_per_s": 18_000, "stack": "peft", "call": "now"},
        {"case": "nf4-liger", "tokens_per_s": 1_000, "stack": "peft", "call": "before"},
        {"case": "unsloth-false", "tokens_per_s": 13_500, "stack": "unsloth", "call": "now"},
    ]
    found = beside_targets(row, case, [*peers, twin])
    assert (found["over_target"], found["memory_over_target"], found["over_peer"]) == (1.0, 0.5, 1.5)
    assert found["over_unsloth"] == 2.0
    assert found["loss_apart"] == pytest.approx(0.1)
    assert "| lora-none-fp8 | 27,000 | 1.0 | 1.5 | 2.0 | 17.0 | 0.5 |  |" in table([found])
    assert "failed" in table([{"case": "x", "error": "out of memory"}])


TWIN = Case(name="lora", overrides=("train.recompute=full",), twin=("train.recompute=none",))


def twin_row(*override: str) -> dict[str, Any]:
    return {
        "case": "lora-twin", "fixed_loss": [11.0, 3.0], "stack": "decompft",
        "command": command(RECIPE, [*TWIN.twin, fixed(RECIPE), *override], unfused=True),
    }  # fmt: skip


def own_row(start: float, end: float, compute: str = "bfloat16") -> dict[str, Any]:
    return {
        "case": "lora", "tokens_per_s": 1, "ranks": 1, "peak_in_tensors_gib": 1.0, "compute": compute,
        "fixed_loss": [start, end], "losses": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("start", "end", "compute", "ok"),
    [
        (11.0, 3.1, "bfloat16", True),
        (11.0, 3.3, "bfloat16", False),  # not as its twin
        (11.0, 3.3, "fp8", True),
        (3.0, 3.1, "bfloat16", False),  # not fallen
    ],
)
def test_a_row_has_trained_if_its_loss_fell_as_its_twins(
    start: float, end: float, compute: str, ok: bool
) -> None:
    found = beside_targets(own_row(start, end, compute), TWIN, [twin_row()])
    assert found["ok"] is ok
    assert ("| yes; " if ok else "| NO; ") in table([found])


@pytest.mark.parametrize(
    "twin",
    [
        {**twin_row(), "error": "out of memory"},
        twin_row("train.max_steps=3"),
        {**twin_row(), "fixed_loss": [3.0, 3.0]},
    ],
    ids=["failed", "of another command", "not fallen"],
)
def test_without_a_twin_that_trained_nothing_is_said_to_have(twin: dict[str, Any]) -> None:
    found = beside_targets(own_row(11.0, 3.0), TWIN, [twin])
    assert found["ok"] is False and found["twin_apart"] is None
    assert "| NO; no twin |" in table([found])


def test_a_trials_twin_has_its_overrides() -> None:
    override = ["train.max_steps=3"]
    assert beside_targets(own_row(11.0, 3.0), TWIN, [twin_row(*override)], override)["ok"] is True


def test_peers_of_each_call_are_kept_and_what_failed_is_replaced(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for call, command_, stack, more in (
        ("1", "peer", "peft", {}), ("1", "ours", "decompft", {"error": "x"}), ("2", "peer", "peft", {}),
        ("2", "ours", "decompft", {}),
    ):  # fmt: skip
        add(
            rows,
            {"case": command_, "command": command_, "call": call, "stack": stack, **more},
            tmp_path / "rows.json",
        )
    assert [(r["command"], r["call"]) for r in rows] == [("peer", "1"), ("peer", "2"), ("ours", "2")]
    assert json.loads((tmp_path / "rows.json").read_text()) == rows


@pytest.mark.parametrize("gpus", [1, 2])
def test_each_twin_is_run_once_before_those_that_it_is_the_twin_of(gpus: int) -> None:
    chosen = with_twins(cases(gpus))
    made = [c for c in chosen if c.is_unfused]
    assert len({(c.overrides, c.recipe) for c in made}) == len(made) == {1: 6, 2: 2}[gpus]
    seen = set()
    for case in chosen:
        if case.is_unfused:
            seen.add((case.overrides, case.recipe))
        else:
            assert (case.twin, case.recipe) in seen, case.name
    assert all("DECOMPFT_TRITON=0 " in command(c.recipe, list(c.overrides), unfused=True) for c in made)
