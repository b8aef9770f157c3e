"""Real runs that die, each of another cause: what events.jsonl and the terminal say of it."""

from __future__ import annotations

import json
import os
import platform
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import make_run
from workers import Ended, end_ranks, run_worker, start_ranks

from decompft.launcher.runs import RunDir

pytestmark = pytest.mark.dist

TRAIN = {"max_steps": 200, "learning_rate": 0.01, "global_batch_size": 4, "micro_batch_size": 1}
TWO_RANKS = {"strategy": "ddp", "gpus_per_node": 2}


def failure(run: RunDir, ended: Ended) -> dict[str, Any]:
    """The event, which says what the terminal says."""
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["event"] == "failure"]
    last = ended.said.splitlines()
    assert event["message"].splitlines()[0] in ended.said and event["next"] == "AGAIN"
    before = "next, when that is mended: " if event["result"] == "user_error" else "next: "
    assert last[-1] == f"{before}AGAIN"
    if event["result"] == "failed":
        assert f"  first to fail: rank {event['rank']} on {platform.node()}" in last
        assert f"  cause: {event['cause']} ({event['meaning']})" in last
        assert f"  last step: {event['step'] or 'none'}" in last
    return event


def test_a_record_that_breaks_while_training(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [json.dumps({"instruction": f"Say {i}.", "output": "yes"}) for i in range(600)]
    path.write_text("\n".join([*rows, '{"instruction": "cut sho']) + "\n")
    train = TRAIN | {"global_batch_size": 64, "micro_batch_size": 16}
    run = make_run(tmp_path, train=train, data={"streaming": True, "shuffle": False, "packing": False})
    event = failure(run, run_worker(run))
    assert (event["cause"], event["rank"], event["node"]) == ("data", 0, platform.node())
    assert f"{path}:601" in event["message"]
    assert event["step"] >= 1, "it was to break while training"


def test_a_rank_that_is_killed(tmp_path: Path) -> None:
    run = make_run(tmp_path, train=TRAIN | {"max_steps": 100_000}, parallel=TWO_RANKS)
    incarnation, ranks = start_ranks(run)
    deadline = time.monotonic() + 60
    while not (run.metrics_path.exists() and run.metrics_path.stat().st_size):
        assert time.monotonic() < deadline and all(process.is_alive() for process in ranks)
        time.sleep(0.01)
    # as torchrun's report, which this test has to do without, would say it
    os.kill(ranks[1].pid or 0, signal.SIGKILL)
    report = (
        f"  host : {platform.node()}\n  rank : 1 (local_rank: 1)\n  exitcode : -9 (pid: {ranks[1].pid})\n"
    )
    run.launcher_log(incarnation).write_text(report)
    event = failure(run, end_ranks(run, incarnation, ranks))
    assert (event["cause"], event["rank"], event["evidence"]) == (
        "killed",
        1,
        "was killed by signal 9 (SIGKILL)",
    )
    assert event["step"] >= 1


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    train = TRAIN | {"learning_rate": 1e30, "warmup_steps": 3, "schedule": "constant_with_warmup"}
    run = make_run(tmp_path, train=train)
    event = failure(run, run_worker(run))
    assert (event["cause"], event["rank"]) == ("non_finite", 0)
    assert "the gradient norm" in event["evidence"]
