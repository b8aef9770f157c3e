"""On a real Slurm: an array sweep finishes, one of its tasks goes back into the queue alone, and so does a chain."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from slurmed import CLI, START_S, job_env, json_lines
from testbed import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def decompft(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, *words], cwd=folder, env=job_env(), capture_output=True, text=True, timeout=120
    )


def launch(cluster: Cluster, folder: Path, recipe: str, *words: str, profile: str = "") -> list[str]:
    """`decompft launch --slurm site.yaml`; the ids of its jobs."""
    interface = "eth0" if cluster.mode == "veth" else "lo"
    (folder / "site.yaml").write_text(
        f"network: {{interface: {interface}}}\ncpus_per_node: 2\ntime: '0:30:00'\nnode_check: false\n{profile}"
    )
    done = decompft(
        folder, "launch", recipe, "--slurm", "site.yaml", "train.max_steps=2", "logging.tensorboard=false",
        f"data.cache_dir={folder / 'cache'}", "--run-dir", "run", *words,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [row["job_id"] for row in json_lines(folder / "run/slurm/jobs.jsonl")]


def logs(folder: Path) -> str:
    return "\n".join(
        path.read_text(errors="replace")[-3000:] for path in sorted(folder.glob("run/logs/*.out"))
    )


def test_a_sweep_of_three_tasks_finishes_though_its_last_is_told_to_stop(
    cluster: Cluster, tmp_path: Path
) -> None:
    words = ("parallel.nodes=1", "sweep.parameters={adapter.rank: [2, 4, 8]}", "sweep.throttle=2")
    (job,) = launch(cluster, tmp_path, "tiny_sweep", *words)
    most = 0

    def states() -> dict[str, str]:
        nonlocal most
        rows = cluster.run("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%i %T").splitlines()
        found = dict(row.split() for row in rows)
        most = max(most, [*found.values()].count("RUNNING"))
        return found

    # the last task has the array's own number, which must not be taken for all of it
    last = tmp_path / "run/002-rank_8"
    cluster.until(
        lambda: states() and (last / "incarnations/1").exists(), 2 * START_S, f"task 2\n{logs(tmp_path)}"
    )
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_2")
    cluster.until(
        lambda: all(state == "COMPLETED" for state in states().values()), 2 * START_S, logs(tmp_path)
    )
    assert most == 2
    starts = [len([*run.glob("incarnations/*")]) for run in sorted(tmp_path.glob("run/00*"))]
    assert starts == [1, 1, 2]
    done = decompft(tmp_path, "status", "run", "--json")
    assert done.returncode == 0, done.stdout
    tasks = json.loads(done.stdout)["tasks"]
    assert [task["state"] for task in tasks] == ["finished"] * 3
    assert [task["eval_loss"] for task in tasks] == sorted(task["eval_loss"] for task in tasks)


def test_prepare_train_and_merge_follow_each_other_over_a_successor(cluster: Cluster, tmp_path: Path) -> None:
    prepare, train, merge = launch(
        cluster, tmp_path, "tiny_map", "--chain", "train,merge",
        profile="requeue: successor\nprepare: {cpus: 1, time: '0:10:00'}\n",
    )  # fmt: skip
    run = tmp_path / "run"
    cluster.until(lambda: (run / "incarnations/1").exists(), 2 * START_S, logs(tmp_path))
    cluster.run("scancel", "--batch", "--signal=USR1", train)
    assert cluster.finished(merge, 2 * START_S + 60) == "COMPLETED", logs(tmp_path)
    rows = {row["job_id"]: row for row in json_lines(run / "slurm/jobs.jsonl")}
    (successor,) = rows.keys() - {prepare, train, merge}
    assert cluster.state(prepare) == cluster.state(successor) == "COMPLETED"
    assert rows[merge]["after"] == [successor]
    assert [*run.glob("merged/*.safetensors")]
    assert decompft(tmp_path, "status", "run").returncode == 0
