"""`decompft cancel`: the state is saved first, and the job does not come back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import testbed
from fake_slurm import FakeSlurm, recorded
from test_runs import make_checkpoint
from watched import end, failed, make_run, start, stopped, submit, train

from decompft.launcher import cli
from decompft.launcher.errors import SlurmError, UserError
from decompft.launcher.outcome import Outcome, read_outcome
from decompft.launcher.runs import RunDir
from decompft.slurm import cancel
from decompft.slurm.watch import status_of

pytestmark = pytest.mark.dist


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    monkeypatch.setattr(cancel, "_ASK_S", 0.1)
    return FakeSlurm(tmp_path, monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run", checkpoint={"grace_s": 0.3})


def cancelled(run: RunDir, *, now: bool = False) -> tuple[int, list[str]]:
    lines: list[str] = []
    return cancel.cancel(run.path, now=now, say=lines.append), lines


def ends_when_told(run: RunDir, slurm: FakeSlurm, *, outcome: Outcome | None) -> None:
    """A running job 23 whose ranks save at the stop file and the signal, and whose script then ends."""
    slurm.say("squeue", *recorded("squeue", "running", "23"))
    gone = recorded("squeue", "completed", "23")[0]
    told = (
        json.dumps({"result": outcome.result, "step": outcome.step, "message": outcome.message})
        if outcome
        else ""
    )
    slurm.scancel_does(
        f"""
import pathlib
run = pathlib.Path({str(run.path)!r})
assert (run / "slurm/cancelled").exists(), "the script would requeue"
if "--batch" in argv and {told!r}:
    assert (run / "incarnations/1/stop").exists()
    (run / "incarnations/1/outcome.json").write_text({told!r})
    open(folder + "/squeue", "w").write({gone!r})
elif "--batch" not in argv:
    open(folder + "/squeue", "w").write({gone!r})
"""
    )


def test_demand_8_a_running_job_saves_and_is_then_cancelled(run: RunDir, slurm: FakeSlurm) -> None:
    submit(run, "23")
    start(run, job_id="23")
    train(run, 1, 2, 3, 4)
    make_checkpoint(run.path, 4)
    ends_when_told(run, slurm, outcome=stopped(4))
    code, lines = cancelled(run)
    assert code == 0
    assert slurm.calls("scancel") == [["--batch", "--signal=USR1", "23"], ["23"]]
    assert any("stopped in order after step 4" in line for line in lines)
    assert lines[-2:] == [f"{run.path}: saved at step 4", f"next: sbatch {run.path}/slurm/train.sbatch"]
    marker = json.loads((run.path / "slurm/cancelled").read_text())
    assert marker["jobs"] == ["23"] and marker["now"] is False
    assert status_of(run.path).state == "cancelled"


def test_the_signal_is_the_one_that_the_script_takes(run: RunDir, slurm: FakeSlurm) -> None:
    submit(run, "23")
    (run.path / "slurm/train.sbatch").write_text("#!/bin/bash\n#SBATCH --signal=B:USR2@240\n")
    start(run, job_id="23")
    ends_when_told(run, slurm, outcome=stopped(4))
    cancelled(run)
    assert slurm.calls("scancel")[0] == ["--batch", "--signal=USR2", "23"]


def test_a_run_that_does_not_save_in_time_is_cancelled_and_said_so(
    run: RunDir, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancel, "_MARGIN_S", 0.5)
    submit(run, "23")
    start(run, job_id="23")
    make_checkpoint(run.path, 2)
    (run.path / "metrics.jsonl").write_text('{"step": 5}\n')
    ends_when_told(run, slurm, outcome=None)
    code, lines = cancelled(run)
    assert code == 3
    assert slurm.calls("scancel")[-1] == ["23"]
    assert "no rank was seen to save" in lines
    assert f"{run.path}: saved at step 2; 3 steps after it are lost" in lines


def test_a_rank_that_fails_while_it_is_told_to_save_is_no_success(run: RunDir, slurm: FakeSlurm) -> None:
    submit(run, "23")
    start(run, job_id="23")
    ends_when_told(run, slurm, outcome=failed(3))
    code, lines = cancelled(run)
    assert code == 3 and f"{run.path}: nothing is saved; it would begin at step 0" in lines


def test_a_run_that_finishes_meanwhile_has_finished(run: RunDir, slurm: FakeSlurm) -> None:
    submit(run, "23")
    start(run, job_id="23")
    ends_when_told(run, slurm, outcome=Outcome(result="finished", step=10))
    code, lines = cancelled(run)
    assert code == 0 and lines[-2] == f"{run.path}: it finished at step 10"


def test_a_waiting_job_is_just_cancelled(run: RunDir, slurm: FakeSlurm) -> None:
    submit(run, "23")
    ends_when_told(run, slurm, outcome=None)
    slurm.say("squeue", *recorded("squeue", "resources", "23"))
    code, lines = cancelled(run)
    assert code == 0 and slurm.calls("scancel") == [["23"]]
    assert lines[0] == "job 23 was waiting in the queue: cancelled"


def test_demand_8_now_cancels_at_once(run: RunDir, slurm: FakeSlurm) -> None:
    submit(run, "23")
    start(run, job_id="23")
    ends_when_told(run, slurm, outcome=None)
    began = time.monotonic()
    code, lines = cancelled(run, now=True)
    assert code == 0 and slurm.calls("scancel") == [["23"]] and time.monotonic() - began < 5
    assert not run.stop_file(1).exists()


def test_what_follows_is_cancelled_before_what_runs(run: RunDir, slurm: FakeSlurm) -> None:
    submit(run, "23")
    submit(run, "24", kind="merge", after=["23"])
    start(run, job_id="23")
    ends_when_told(run, slurm, outcome=stopped(4))
    slurm.scancel_does(
        (slurm.folder / "scancel-does")
        .read_text()
        .replace('elif "--batch"', 'elif argv[-1] == "23" and "--batch"')
    )
    slurm.say("squeue", *recorded("squeue", "running", "23"), *recorded("squeue", "dependency", "24"))
    cancelled(run)
    assert [call[-1] for call in slurm.calls("scancel")] == ["24", "23", "23"]


def test_nothing_to_cancel_is_said(run: RunDir, slurm: FakeSlurm) -> None:
    code, lines = cancelled(run)
    assert code == 0 and lines[0] == f"{run.path}: nothing of it is queued or running"
    submit(run, "23")
    end(run, start(run, job_id="23"), Outcome(result="finished", step=10))
    slurm.answer("completed", job_id="23")
    assert cancelled(run)[1][-1] == f"next: decompft report {run.path}"
    assert slurm.calls("scancel") == []


def test_a_refusal_of_slurm_is_said_in_words(run: RunDir, slurm: FakeSlurm) -> None:
    submit(run, "23")
    slurm.say("squeue", *recorded("squeue", "resources", "23"))
    slurm.scancel_does('sys.exit("scancel: error: Kill job error on job id 23: Access/permission denied")')
    with pytest.raises(SlurmError, match="permission denied"):
        cancelled(run)


# -- without Slurm --

# a launcher: holds the lock, its "ranks" save at the stop file; the second TERM kills them
LAUNCHER = """
import signal, sys, time
from pathlib import Path
from decompft.launcher.outcome import Outcome, write_outcome
from decompft.launcher.runs import RunDir
run, told = RunDir(Path(sys.argv[1])), []
signal.signal(signal.SIGTERM, lambda *_: told.append(time.monotonic()))
lock = run.lock()
print("ready", flush=True)
for _ in range(600):
    if sys.argv[2] == "preparing" and told:
        sys.exit(75)
    if sys.argv[2] == "training" and run.stop_file(1).exists() and not told:
        write_outcome(run.incarnation_dir(1), Outcome(result="checkpointed", step=4, message="stopped in order"))
        sys.exit(75)
    if len(told) > 1 and told[1] - told[0] > 1:
        write_outcome(run.incarnation_dir(1), Outcome(result="failed", step=4, message="killed by a second signal"))
        sys.exit(3)
    time.sleep(0.05)
"""


@pytest.mark.parametrize(
    ("phase", "now", "code"), [("training", False, 75), ("stubborn", True, 3), ("preparing", False, 75)]
)
def test_a_local_run_is_told_as_its_terminal_would(phase: str, now: bool, code: int, run: RunDir) -> None:
    if phase != "preparing":
        start(run)
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(run.path), phase], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        try:
            assert cancelled(run, now=now)[0] == 0
            assert process.wait(20) == code
        finally:
            process.kill()
    outcome = read_outcome(run.incarnation_dir(1)) if phase != "preparing" else None
    assert (outcome.result if outcome else None) == {"training": "checkpointed", "stubborn": "failed"}.get(
        phase
    )


def test_a_local_run_of_another_machine_is_not_touched(run: RunDir) -> None:
    start(run)
    (run.incarnation_dir(1) / "pulse-0.json").write_text(
        json.dumps({"node": "elsewhere", "pid": os.getpid()})
    )
    with pytest.raises(UserError, match="its ranks are on elsewhere"):
        cancelled(run)
    assert not run.stop_file(1).exists()


def test_the_lock_of_a_launcher_that_is_gone_names_no_stranger(run: RunDir) -> None:
    """Its ranks hold the lock on; the kernel still names the launcher's pid, which may be anybody's by now."""
    handle = run.lock()
    heir = subprocess.Popen(["sleep", "60"], pass_fds=[handle])
    os.close(handle)
    try:
        assert cancel._launcher(run) is None
    finally:
        heir.send_signal(signal.SIGKILL)
        heir.wait()


# -- the real one --

# stands in for the job script: the signal becomes a stop file, the ranks save, the script asks for a requeue
JOB = """#!/bin/bash
#SBATCH --requeue --open-mode=append --time=5
trap 'touch run/incarnations/1/stop' USR1
mkdir -p run/incarnations/1 run/logs/incarnation-1
echo '{"job_id": "'$SLURM_JOB_ID'", "restart": 0, "nodes": ["vn"], "time_s": 0}' > run/incarnations/1/slurm.json
while [ ! -e run/incarnations/1/stop ]; do sleep 0.2; done
sleep 1
echo '{"result": "checkpointed", "step": 4, "message": "stopped in order"}' > run/incarnations/1/outcome.json
[ -e run/slurm/cancelled ] || scontrol requeue $SLURM_JOB_ID
sleep 1
exit 75
"""


@pytest.mark.slurm
def test_demand_8_a_real_job_is_drained_and_does_not_come_back(
    cluster: testbed.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(Path("run"))
    script = tmp_path / "job.sh"
    script.write_text(JOB)
    job = cluster.submit(str(script), cwd=tmp_path)
    submit(run, job)
    cluster.until(lambda: status_of(run.path).seen.start is not None, 60, "its start")
    assert status_of(run.path).state == "running"
    assert cli.main(["cancel", "run"]) == 0
    assert read_outcome(run.incarnation_dir(1)) is not None
    assert cluster.state(job) in ("FAILED", "CANCELLED")  # 75 is no success for Slurm
    assert (status_of(run.path).state, status_of(run.path).code) == ("cancelled", 75)


@pytest.mark.slurm
def test_demand_8_a_real_job_is_cancelled_now(cluster: testbed.Cluster, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\nsleep 300\n")
    running = cluster.submit("--time=5", str(script), cwd=tmp_path)
    waiting = cluster.submit("--hold", "--time=5", str(script), cwd=tmp_path)
    submit(run, running)
    submit(run, waiting, kind="merge", after=[running])
    cluster.until(lambda: status_of(run.path).state == "running", 60, "its start")
    assert cli.main(["cancel", str(run.path), "--now"]) == 0
    assert {cluster.state(running), cluster.state(waiting)} == {"CANCELLED"}
    assert status_of(run.path).state == "cancelled"
