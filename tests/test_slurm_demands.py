"""What submitting promises, on a real Slurm: other users, other ways to ask, many interruptions.

Numbers of `demand` are those of SLURM.md section 4.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurmed import CLI, job_env, patched, python_for_everyone, slow_steps, submit, unbroken
from test_runs import make_plan
from test_sbatch import on_gpus
from testbed import Cluster

from decompft.launcher.errors import SlurmError
from decompft.slurm.profile import Profile
from decompft.slurm.render import train_script
from decompft.slurm.submit import check_script

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[int, int]:
    return unbroken(tmp_path_factory.mktemp("unbroken"))


def test_demand_1_submit_asks_slurm_first_and_refuses_a_second_time(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="Slurm would refuse this job: .*partition"):
        submit(cluster, tmp_path, "slurm.partition=nowhere")
    assert not (tmp_path / "run").exists()
    run = submit(cluster, tmp_path, "train.max_steps=2", env=slow_steps(tmp_path, 30))
    script = (run.run.path / "slurm/train.sbatch").read_text()
    assert str(tmp_path) not in script
    with pytest.raises(AssertionError, match=f"job {run.job} of this run is queued or running"):
        submit(cluster, tmp_path, "--resume=auto")


@pytest.mark.parametrize("request_", ["gpus-per-node", "gres"])
@pytest.mark.parametrize("tasks", ["node", "gpu"])
def test_demand_1_slurm_accepts_what_is_rendered(cluster: Cluster, request_: str, tasks: str) -> None:
    fields = {
        "gpu_request": request_, "gpu_type": "sim", "tasks": tasks, "cpus_per_node": 8, "mem": "8G", "exclusive": True,
        "partition": "debug", "directives": ["--nice=5"], "mail": {"user": "me@example.org"}, "requeue": "successor",
    }  # fmt: skip
    plan = on_gpus(
        make_plan(ranks=2, parallel={"nodes": "2-3"}, slurm={"spares": 1, "time": "1:00:00"}), nodes=2
    )
    text = train_script(plan, Profile.model_validate(fields), run_dir="runs/it's $HOME %j")
    assert "to start at" in check_script(text)
    with pytest.raises(SlurmError, match="Slurm would refuse this job"):
        check_script(text.replace("--nodes=3-4", "--nodes=13-14"))


@pytest.fixture
def user() -> Iterator[str]:
    """Somebody without root's rights, made for the test."""
    name = f"decompft-{os.getpid()}"
    subprocess.run(["useradd", "--no-create-home", "--home-dir", "/nonexistent", name], check=True)
    yield name
    # by force: the last processes of the job may still be leaving
    subprocess.run(["userdel", "--force", name], check=True, capture_output=True)


def test_demand_10_a_user_without_rights_with_gres_and_without_requeue(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, user: str
) -> None:
    folder = Path("/tmp") / user  # pytest's own folders are root's alone
    folder.mkdir()
    try:
        python = python_for_everyone(folder)
        stop = "if 'RANK' in __import__('os').environ: pass\n"
        env = patched(folder, stop) | {
            "HOME": str(folder), "DECOMPFT_PYTHON": str(python), "DECOMPFT_CACHE": str(folder / "cache"),
        }  # fmt: skip
        subprocess.run(["chown", "-R", user, str(folder)], check=True)
        run = submit(
            cluster, folder, "parallel.nodes=1", "train.max_steps=6", "train.stop_after_steps=null",
            profile="node_check: false\nrequeue: successor\ngres: [gpu:sim:1]", env=env | slow_steps(folder, 0.5),
            as_user=("runuser", "--preserve-environment", "-u", user, "--", str(python)),
        )  # fmt: skip
        shown = cluster.show(run.job)
        assert shown["UserId"].startswith(user) and "gpu:sim:1" in shown["TresPerNode"]
        run.until_step(2)
        cluster.run("scancel", "--batch", "--signal=USR1", run.job)
        cluster.until(lambda: (run.run.path / "adapter").exists(), 200, f"the adapter\n{run.log()}")
        first, successor = [row["slurm_job"] for row in run.events("start")]
        assert first == run.job != successor
        assert cluster.finished(successor, 60) == "COMPLETED", run.log()
        assert run.steps_lost() == 0
        assert (run.run.path / "adapter/adapter.json").stat().st_uid != 0
    finally:
        # while there is the user: of one without a name Slurm starts no job, and tries it again every two minutes
        cluster.cancel_all()
        subprocess.run(["rm", "-rf", str(folder)], check=True)


def test_plain_sbatch_of_the_printed_script_works(cluster: Cluster, tmp_path: Path) -> None:
    words = [
        "sbatch",
        "tiny_map",
        "train.max_steps=2",
        "logging.tensorboard=false",
        f"data.cache_dir={tmp_path}",
    ]
    done = subprocess.run(
        [*CLI, *words], cwd=tmp_path, env=job_env(), capture_output=True, text=True, check=True
    )
    (tmp_path / "job.sh").write_text(done.stdout)
    job = cluster.submit("job.sh", cwd=tmp_path, env=job_env())
    assert cluster.finished(job, 240) == "COMPLETED", (tmp_path / f"tiny_map-{job}.out").read_text()
    assert (tmp_path / "runs/tiny_map/adapter/adapter.json").exists()
    # the same script again finds nothing to do
    again = cluster.submit("job.sh", cwd=tmp_path, env=job_env())
    assert cluster.finished(again, 240) == "COMPLETED"


def test_twenty_random_preemptions_lose_no_sample(
    cluster: Cluster, tmp_path: Path, samples: dict[int, int]
) -> None:
    """A job of higher priority takes the nodes at random moments: while it loads, trains, saves, or waits."""
    count = 20
    rng = random.Random(6)
    # The 20 waits below are 154 s together, and a preemption takes 2 s or so: however fast the machine starts a run,
    # its 40 steps do not end before the last preemption. A step is far shorter than the partition's grace of 20 s.
    run = submit(
        cluster, tmp_path, "parallel.nodes=1", "slurm.partition=preempt", env=slow_steps(tmp_path, 6.0),
        profile="node_check: false\nexclusive: true",
    )  # fmt: skip
    for number in range(count):
        what = (
            f"the run's turn after {number} preemptions, at step {max(run.samples(), default=0)}\n{run.log()}"
        )
        cluster.until(lambda: cluster.state(run.job) == "RUNNING", 120, what)
        time.sleep(rng.uniform(0.5, 14))
        high = cluster.submit(
            "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "true", cwd=tmp_path
        )
        cluster.until(lambda high=high: cluster.state(high) == "COMPLETED", 120, "the other job")
    (tmp_path / "hurry").touch()
    run.finished(300)
    ends = [row["step"] for row in run.events("end")]
    print(f"{cluster.show(run.job)['Restarts']} restarts; the incarnations ended at steps {ends}")
    assert int(cluster.show(run.job)["Restarts"]) >= count
    print(
        f"steps trained again: {run.steps_lost()}; a preemption before the ranks listen leaves them 5 s at its end"
    )
    assert run.samples() == samples
    # a rank may be told to end before it can hear it: that counts as no failure
    assert {row["cause"] for row in run.events("failure")} <= {"preempted"} and not run.events("restart")


# once, something takes five minutes: the import of a module that ...
IMPORTING = """
    import os, sys, time
    mark = {mark!r}
    class Slow:
        def find_spec(self, name, *_):
            if name == {module!r} and ("RANK" in os.environ) == {is_rank} and not os.path.exists(mark):
                open(mark, "w").close()
                time.sleep(300)
    sys.meta_path.insert(0, Slow())
"""
# ... or each batch of an evaluation after the first step, 20 seconds
EVALUATING = """
    import os, pathlib, sys, time
    mark, exists = {mark!r}, pathlib.Path.exists
    def slow(path):
        has_steps = os.path.exists("run/metrics.jsonl") and os.path.getsize("run/metrics.jsonl")
        frame = sys._getframe(1) if has_steps else None
        while frame is not None and frame.f_code.co_name != "evaluate":
            frame = frame.f_back
        if frame is not None and len(os.listdir("run/incarnations")) == 1:
            open(mark, "w").close()
            time.sleep(20)
        return exists(path)
    pathlib.Path.exists = slow
"""


@pytest.mark.parametrize("doing", ["loading", "tokenizing", "evaluating"])
def test_a_stop_outside_of_training_leaves_at_once_and_goes_on_later(
    cluster: Cluster, tmp_path: Path, samples: dict[int, int], doing: str
) -> None:
    mark = str(tmp_path / doing)
    text = {
        "loading": IMPORTING.format(mark=mark, module="torch", is_rank=True),
        "tokenizing": IMPORTING.format(
            mark=mark, module="decompft.launcher.worker.data.prepare", is_rank=False
        ),
        "evaluating": EVALUATING.format(mark=mark),
    }[doing]
    run = submit(
        cluster, tmp_path, "parallel.nodes=1", "train.eval_every_steps=8", env=patched(tmp_path, text)
    )
    cluster.until((tmp_path / doing).exists, 120, f"a run that is {doing}\n{run.log()}")
    cluster.run("scancel", "--batch", "--signal=USR1", run.job)
    run.until_incarnation(2)
    run.finished(300)
    assert run.samples() == samples
    assert run.steps_lost() == 0
    began = run.events("start")[1]["checkpoint"]
    assert began == ("run/checkpoints/step-00000008" if doing == "evaluating" else None)


def test_demand_10_without_accounting_and_where_requeueing_is_forbidden(
    lone_cluster: Cluster, tmp_path: Path, samples: dict[int, int]
) -> None:
    """status, runs, logs and cancel answer without sacct, and a successor goes on where the job may not."""
    done = subprocess.run(["sacct"], capture_output=True, text=True)
    assert done.returncode != 0 and "disabled" in done.stderr
    run = submit(
        lone_cluster, tmp_path, "parallel.nodes=1", env=slow_steps(tmp_path, 0.5) | {"SBATCH_NO_REQUEUE": "1"}
    )
    run.until_step(5)
    lone_cluster.run("scancel", "--batch", "--signal=USR1", run.job)
    run.until_incarnation(2)
    successor = run.events("start")[1]["slurm_job"]
    assert successor != run.job and "this site does not requeue" in run.log()
    run.until_step(20)
    assert _told(tmp_path, "status", "run").startswith("run: running")
    assert "saved: stopped in order" in _told(tmp_path, "status", "run")
    assert _told(tmp_path, "cancel", "run", code=0).count("stopped in order") == 1
    assert lone_cluster.finished(successor, 60) in ("COMPLETED", "FAILED")
    assert _told(tmp_path, "status", "run").startswith("run: cancelled")
    assert "checkpoint at step" in _told(tmp_path, "logs", "run")
    assert all(run.samples()[step] == samples[step] for step in run.samples())
    assert run.steps_lost() == 0


def _told(folder: Path, *words: str, code: int | None = None) -> str:
    done = subprocess.run(
        [*CLI, *words], cwd=folder, env=job_env(), capture_output=True, text=True, timeout=120
    )
    assert code in (None, done.returncode), done.stderr
    return done.stdout + done.stderr
