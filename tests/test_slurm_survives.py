"""A run that a real Slurm interrupts: it ends trained to its last step, on the samples of an unbroken one.

Numbers of `demand` are those of SLURM.md section 4.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from slurmed import (
    CLI,
    REPLACED_S,
    Submitted,
    job_env,
    json_lines,
    patched,
    slow_saves,
    slow_steps,
    submit,
    unbroken,
)
from testbed import Cluster

from decompft.launcher.checkpoints import list_checkpoints, step_of

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[int, int]:
    return unbroken(tmp_path_factory.mktemp("unbroken"))


def check(run: Submitted, samples: dict[int, int], *, most_lost: int = 0) -> None:
    lost = run.steps_lost()
    print(f"steps lost: {lost}, incarnations: {len(run.events('start'))}")
    assert run.samples() == samples
    assert lost <= most_lost, run.log()


@pytest.mark.parametrize(
    "profile", ["node_check: true", "node_check: false\ntasks: gpu", "node_check: false\nrendezvous: c10d"]
)
def test_two_nodes_of_two_ranks_train_to_the_last_step(
    cluster: Cluster, tmp_path: Path, samples: dict[int, int], profile: str
) -> None:
    run = submit(cluster, tmp_path, "parallel.gpus_per_node=2", profile=profile)
    run.finished(240)
    check(run, samples)
    assert f"job {run.job}" in run.shown
    assert run.events("start")[0]["world_size"] == 4
    assert run.events("start")[0]["nodes"] == ["vn-1", "vn-2"]
    checked = list((run.run.incarnation_dir(1) / "nodes").glob("vn-?.json"))
    assert len(checked) == (2 if "true" in profile else 0)


def test_the_quickstart_runs_as_a_job(cluster: Cluster, tmp_path: Path) -> None:
    words = [
        "quickstart",
        "--slurm",
        "train.max_steps=2",
        "--run-dir",
        "run",
        f"data.cache_dir={tmp_path / 'cache'}",
    ]
    subprocess.run([*CLI, "launch", *words], cwd=tmp_path, env=job_env(), check=True, timeout=120)
    job = json_lines(tmp_path / "run/slurm/jobs.jsonl")[-1]["job_id"]
    assert cluster.finished(job, 400) == "COMPLETED"
    assert (tmp_path / "run/adapter/adapter.safetensors").exists()


@pytest.mark.parametrize("signal", ["USR1", "TERM"])
def test_a_signal_to_the_batch_script_saves_and_requeues(
    cluster: Cluster, tmp_path: Path, samples: dict[int, int], signal: str
) -> None:
    run = submit(
        cluster, tmp_path, profile=f"node_check: false\nsignal: {signal}", env=slow_steps(tmp_path, 0.3)
    )
    run.until_step(5)
    cluster.run("scancel", "--batch", f"--signal={signal}", run.job)
    run.finished(240)
    check(run, samples)
    assert [row["reason"] for row in run.events("requeue")] == ["state saved, more to do"]
    assert cluster.show(run.job)["Restarts"] == "1"


def test_demand_2_the_time_limit_loses_no_step(
    cluster: Cluster, tmp_path: Path, samples: dict[int, int]
) -> None:
    # the warning comes 180 s before the end, a minute after the start, and Slurm looks every 30 s: the run is longer
    run = submit(cluster, tmp_path, env=slow_steps(tmp_path, 4.0))
    run.until_step(3)
    cluster.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=4")
    run.until_incarnation(2)
    (tmp_path / "hurry").touch()
    cluster.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=30")
    run.finished(240)
    check(run, samples)
    assert len(run.events("start")) == 2


def test_demand_3_preemption_makes_way_and_loses_no_step(
    cluster: Cluster, tmp_path: Path, samples: dict[int, int]
) -> None:
    run = submit(
        cluster, tmp_path, "slurm.partition=preempt", profile="node_check: false\nexclusive: true",
        env=slow_steps(tmp_path, 0.3),
    )  # fmt: skip
    run.until_step(5)
    high = cluster.submit(
        "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "date +%s.%N > high", cwd=tmp_path
    )
    assert cluster.finished(high, 60) == "COMPLETED"
    saved = run.events("save")[-1]["time_s"]
    waited = float((tmp_path / "high").read_text()) - saved
    print(f"the other job started {waited:.1f} s after the save")
    assert waited < 10
    run.finished(240)
    check(run, samples)


def test_demand_3_a_save_longer_than_torchruns_patience_survives(
    cluster: Cluster, tmp_path: Path, samples: dict[int, int]
) -> None:
    env = slow_steps(tmp_path, 0.3) | slow_saves(tmp_path, 3.5)
    run = submit(cluster, tmp_path, "checkpoint.every_steps=1000", env=env)
    run.until_step(5)
    # to every process of the steps, torchrun too, as a preemption does it
    cluster.run("scancel", "--signal=TERM", run.job)
    run.finished(400)
    check(run, samples)
    assert max(row["save_s"] for row in run.events("save")) > 30


@pytest.mark.parametrize("profile", ["rendezvous: static", "rendezvous: c10d", "tasks: gpu"])
def test_demand_4_a_killed_rank_is_replaced_in_the_same_job(
    cluster: Cluster, tmp_path: Path, samples: dict[int, int], profile: str
) -> None:
    run = submit(cluster, tmp_path, profile=f"node_check: false\n{profile}", env=slow_steps(tmp_path, 0.3))
    run.until_step(12)
    first, *others = run.ranks()
    assert len(others) == 1  # torchrun names the worker too, but has no rank
    os.kill(first, signal.SIGKILL)
    run.finished(240)
    check(run, samples, most_lost=10)
    assert run.events("restart") and not run.events("requeue")
    assert cluster.show(run.job)["Restarts"] == "0"


def test_demand_4_scontrol_requeue_goes_on_from_the_last_checkpoint(
    cluster: Cluster, tmp_path: Path, samples: dict[int, int]
) -> None:
    run = submit(cluster, tmp_path, env=slow_steps(tmp_path, 0.3))
    run.until_step(12)
    cluster.run("scontrol", "requeue", run.job)
    run.finished(240)
    check(run, samples, most_lost=10)


@pytest.mark.parametrize("node", ["vn-1", "vn-2"])  # the script runs on the first
def test_demand_4_a_node_that_dies_is_replaced(
    cluster: Cluster, tmp_path: Path, samples: dict[int, int], node: str
) -> None:
    run = submit(cluster, tmp_path, profile="node_check: true", env=slow_steps(tmp_path, 0.3))
    run.until_step(12)
    assert run.events("start")[0]["nodes"] == ["vn-1", "vn-2"]
    cluster.node("kill", node)
    try:
        run.until_incarnation(2, REPLACED_S)
        assert node not in run.events("start")[-1]["nodes"]
        run.finished(240)
    finally:
        cluster.node("start", node)
    check(run, samples, most_lost=10)


def test_demand_4_a_run_that_may_have_fewer_nodes_goes_on_without_one_that_dies(
    cluster: Cluster, tmp_path: Path, samples: dict[int, int]
) -> None:
    """And it had as many as there were, though it would have begun with one."""
    run = submit(cluster, tmp_path, "parallel.nodes=1-2", env=slow_steps(tmp_path, 0.3))
    run.until_step(12)
    assert run.events("start")[0]["nodes"] == ["vn-1", "vn-2"]
    cluster.node("kill", "vn-2")
    try:
        run.finished(300)
    finally:
        cluster.node("start", "vn-2")
    check(run, samples, most_lost=10)
    assert [row["world_size"] for row in run.events("start")] == [2, 1]
    assert not run.events("requeue") and cluster.show(run.job)["Restarts"] == "0"


def test_demand_5_a_failure_before_the_first_step_ends_after_the_cap(
    cluster: Cluster, tmp_path: Path
) -> None:
    broken = """
        import os
        if "RANK" in os.environ:
            os.write(2, b"ImportError: this node has no luck\\n")
            os._exit(1)
    """
    run = submit(cluster, tmp_path, "slurm.max_failures=2", "parallel.nodes=1", env=patched(tmp_path, broken))
    assert cluster.finished(run.job, 240) == "FAILED"
    assert cluster.show(run.job)["ExitCode"] == "3:0"
    assert len(run.events("start")) == 3
    assert "this node has no luck" in run.log()
    assert "slurm.max_failures" in run.log()


def test_demand_4_a_node_that_comes_back_cannot_overwrite_the_newer_state(
    cluster: Cluster, tmp_path: Path, samples: dict[int, int]
) -> None:
    run = submit(
        cluster, tmp_path, "parallel.nodes=1", "checkpoint.every_steps=2", env=slow_steps(tmp_path, 0.5)
    )
    run.until_step(6)
    stale = run.events("start")[0]["nodes"][0]
    cuts = cluster.mode == "veth"
    print(f"node {'cut' if cuts else 'freeze'} {stale}")
    cluster.node("cut" if cuts else "freeze", stale)
    try:
        run.until_incarnation(2, REPLACED_S)
        assert run.events("start")[1]["nodes"] != [stale]
        cluster.until(
            lambda: any(row["incarnation"] == 2 for row in run.events("save")), 150, "a save elsewhere"
        )
    finally:
        cluster.node("join" if cuts else "thaw", stale)
    run.finished(240)
    assert run.samples() == samples
    began = step_of(Path(run.events("start")[1]["checkpoint"]))
    assert began >= 4  # every second step is saved, and one was in its save when it stopped
    # the stale rank may still write down a save that was in place before, and none after it
    assert max(row["step"] for row in run.events("save") if row["incarnation"] == 1) <= began
    writers = {
        path.name: json.loads((path / "manifest.json").read_bytes())["incarnation"]
        for path in list_checkpoints(run.run.checkpoints_dir)
    }
    assert 1 not in writers.values(), writers
    assert json.loads((run.run.path / "adapter/adapter.json").read_text())["step"] == 40


def test_demand_6_a_node_that_fails_twice_is_excluded(
    cluster: Cluster, tmp_path: Path, samples: dict[int, int]
) -> None:
    crash = """
        import os, signal
        if "RANK" in os.environ and os.environ.get("SLURMD_NODENAME") == "vn-2":
            os.kill(os.getpid(), signal.SIGSEGV)
    """
    run = submit(cluster, tmp_path, env=patched(tmp_path, crash))
    run.finished(400)
    check(run, samples)
    assert cluster.show(run.job)["ExcNodeList"] == "vn-2"
    assert [row["exclude"] for row in run.events("requeue")] == [["vn-2"]]
    assert "vn-2" not in run.events("start")[-1]["nodes"]


def test_demand_6_a_node_that_fails_its_check_is_named_and_excluded(
    cluster: Cluster, tmp_path: Path, samples: dict[int, int]
) -> None:
    """The folder of the job's Python is not mounted there."""
    mount, python = tmp_path / "mount", tmp_path / "mount/python3"
    mount.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    cluster.node("exec", "vn-2", "mount", "-t", "tmpfs", "none", str(mount))
    try:
        run = submit(cluster, tmp_path, profile="node_check: true", env={"DECOMPFT_PYTHON": str(python)})
        run.finished(400)
    finally:
        cluster.node("exec", "vn-2", "umount", str(mount))
    check(run, samples)
    assert [(row["node"], row["cause"]) for row in run.events("failure")] == [("vn-2", "node_lost")] * 2
    assert [row["exclude"] for row in run.events("requeue")] == [["vn-2"]]
    assert all(row["message"].startswith("vn-2 is not fit to train") for row in run.events("failure"))
    assert "vn-2" not in run.events("start")[-1]["nodes"]


def test_demand_6_a_spare_takes_the_place_of_a_node_that_dies(
    cluster: Cluster, tmp_path: Path, samples: dict[int, int]
) -> None:
    run = submit(cluster, tmp_path, "slurm.spares=1", env=slow_steps(tmp_path, 0.3))
    run.until_step(12)
    assert run.events("start")[0]["nodes"] == ["vn-1", "vn-2"]
    cluster.node("kill", "vn-2")
    try:
        run.finished(300)
    finally:
        cluster.node("start", "vn-2")
    check(run, samples, most_lost=10)
    assert run.events("start")[-1]["nodes"] == ["vn-1", "vn-3"]
    assert not run.events("requeue") and cluster.show(run.job)["Restarts"] == "0"
