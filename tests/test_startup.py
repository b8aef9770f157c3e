"""What a start takes is told once, by phase, and the phases are all of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_run, run_ranks

from decompft.launcher.json_lines import read_lines
from decompft.launcher.processes import process_age_s
from decompft.launcher.runs import RunDir
from decompft.launcher.worker.engines.base import Engine
from decompft.launcher.worker.startup import Startup, launcher_phases, startup_line
from decompft.launcher.worker.warmup import warm_up


class Told:
    """A stand-in for Metrics."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.lines: list[str] = []

    def event(self, name: str, **fields: Any) -> None:
        self.events.append({"event": name, **fields})

    def message(self, text: str) -> None:
        self.lines.append(text)


def test_a_process_knows_its_age() -> None:
    age = process_age_s()
    assert 0 < age < 1e6
    assert process_age_s() >= age


def test_phases_are_told_once_and_add_up(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    began = time.time() - 5
    run.append_event("start", incarnation=1, plan_s=9.0)
    run.append_event("start", incarnation=2, plan_s=0.5, prepare_s=1.5)
    startup, told = Startup(process_began_s=began), Told()
    startup.done("imports")
    startup.done("base")
    startup.done("base")
    for _ in range(2):
        startup.tell(told, run, incarnation=2, step=1)  # type: ignore[arg-type]
    (event,) = told.events
    assert list(event["phases"]) == ["plan", "prepare", "start of ranks", "imports", "base"]
    assert event["phases"]["plan"] == 0.5 and event["phases"]["imports"] == pytest.approx(5, abs=1)
    assert event["seconds"] == pytest.approx(sum(event["phases"].values()), abs=0.01)
    assert len(told.lines) == 1 and told.lines[0].startswith("first step after ")


def test_a_run_that_nothing_launched_begins_with_its_process(tmp_path: Path) -> None:
    assert launcher_phases(RunDir(tmp_path), 1, time.time()) == {}


def test_short_phases_are_not_in_the_line() -> None:
    assert startup_line({"imports": 2.0, "data": 0.01}) == "first step after 2.0 s: imports 2.0"


@pytest.mark.gpu
def test_warm_up_leaves_workspaces_and_no_more() -> None:
    device = torch.device("cuda", 0)
    before = torch.cuda.memory_allocated(device)
    warm_up(Engine(device, timeout_s=60))
    assert torch.cuda.memory_allocated(device) - before < 128 << 20  # cuBLAS's own


def test_warm_up_does_nothing_on_a_cpu() -> None:
    warm_up(Engine(torch.device("cpu"), timeout_s=60))
    assert not torch.cuda.is_initialized()


@pytest.mark.dist
def test_a_run_tells_its_start_once_whatever_it_logs(tmp_path: Path) -> None:
    run = make_run(tmp_path, train={"max_steps": 3}, logging={"every_steps": 2})
    run_ranks(run)
    events = [row for row in read_lines(run.events_path) if row and row["event"] == "startup"]
    assert [row["step"] for row in events] == [1]
    assert {"imports", "group", "base", "optimizer", "first data", "first step"} <= events[0]["phases"].keys()
    assert events[0]["seconds"] == pytest.approx(sum(events[0]["phases"].values()), abs=0.02)
