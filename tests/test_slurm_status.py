"""`decompft status`: Slurm's word in plain words, put together with what the run left on disk."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
import testbed
from fake_slurm import FakeSlurm, recorded
from test_runs import make_checkpoint
from watched import age, end, failed, make_run, start, stopped, submit, train

from decompft.launcher import cli
from decompft.launcher.errors import UserError
from decompft.launcher.outcome import Outcome
from decompft.launcher.runs import RunDir
from decompft.slurm.history import read_history
from decompft.slurm.watch import Status, find_named, status_of

pytestmark = pytest.mark.dist


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    monkeypatch.chdir(tmp_path)
    return FakeSlurm(tmp_path, monkeypatch)


_TODO = {"prolog": "scontrol release 23", "no_log": "mkdir -p /nonexistent/logs"}


def run_of_job(tmp_path: Path, job_id: str = "23") -> RunDir:
    run = make_run(tmp_path / "runs/tiny")
    submit(run, job_id)
    return run


# -- a run and its job --


def test_a_queued_run(slurm: FakeSlurm, tmp_path: Path) -> None:
    run = run_of_job(tmp_path)
    slurm.answer("resources", job_id="23")
    status = status_of(run.path)
    assert (status.state, status.code) == ("queued", 75)
    assert "waits for nodes" in status.words
    assert status.next == f"decompft logs {run.path} --follow"


def test_a_running_run_with_its_numbers(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of_job(tmp_path)
    slurm.answer("running", job_id="23")
    end(run, start(run, job_id="23", nodes=("vn-1", "vn-2")), stopped(4), saves=True)
    train(run, 1, 2, 3, 4)
    start(run, job_id="23", nodes=("vn-2", "vn-3"), restart=1, from_step=4)
    train(run, 5, 6)
    (run.path / "slurm/state.json").write_text(
        json.dumps({"failures": 1, "step": 4, "suspects": {}, "excluded": ["vn-1"], "updated_s": 1.0})
    )
    assert cli.main(["status", "tiny"]) == 75
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "runs/tiny: running"
    facts = {line.split()[0]: line for line in lines[1:-1] if line}
    assert "23 (running) on vn-[2-3]" in facts["job"]
    assert "step 6 of 10, loss 2.94, 12,346 tokens/s" in facts["step"]
    assert "19 min 52 s of the job's time, about 8.00 s of training to the last step" in facts["left"]
    assert "1, failures in a row 1, excluded vn-1" in facts["restarts"]
    assert re.fullmatch(
        r"  1  23   vn-1,vn-2  0-4    .* saved: stopped in order after step 4 of 10", facts["1"]
    )
    assert re.fullmatch(r"  2  23   vn-2,vn-3  4-6    .* running", facts["2"])
    assert lines[-1] == "next: decompft logs runs/tiny --follow"
    assert cli.main(["status", "tiny", "--json"]) == 75
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["step"], told["total_steps"], told["eta_s"]) == ("running", 6, 10, 8.0)
    assert told["job"]["nodes"] == "vn-[2-3]" and told["job"]["left_s"] == 1192.0
    assert [past["to_step"] for past in told["incarnations"]] == [4, 6]
    assert (told["restarts"], told["failures_in_a_row"], told["excluded"]) == (1, 1, ["vn-1"])


def state_of(run: RunDir) -> tuple[str, int, str]:
    status = status_of(run.path)
    return status.state, status.code, status.next


def test_the_outcome_decides_when_the_job_is_gone(slurm: FakeSlurm, tmp_path: Path) -> None:
    """Without accounting, and after the controller has forgotten the job."""
    run, again = run_of_job(tmp_path), f"sbatch {tmp_path}/runs/tiny/slurm/train.sbatch"
    assert state_of(run) == ("failed", 3, again)
    assert "Slurm does not know its job any more" in status_of(run.path).words
    number = start(run, job_id="23")
    end(run, number, stopped(4), saves=True)
    assert state_of(run) == ("stopped", 75, again)
    end(run, number, failed(6))
    assert state_of(run) == ("failed", 3, again)
    assert status_of(run.path).words == "rank 1 was killed by signal 9 (SIGKILL)"
    end(run, number, Outcome(result="user_error", message="no such file"))
    assert state_of(run)[:2] == ("failed", 3)
    end(run, number, Outcome(result="finished", step=10))
    assert state_of(run) == ("finished", 0, f"decompft report {run.path}")


def test_a_script_that_started_no_rank_has_the_last_word(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of_job(tmp_path)
    run.append_event("submit", job_id="23", kind="train", after=[])
    slurm.say("squeue", *recorded("squeue", "failed", "23"))  # its log's place is not known
    (run.path / "logs").mkdir()
    (run.path / "logs/train-23.out").write_text("a\npython: No module named decompft\n")
    assert cli.main(["status", "tiny"]) == 3
    out = capsys.readouterr().out
    assert "runs/tiny/logs/train-23.out, which ends:" in out and "| python: No module named decompft" in out
    assert "how it ended" not in out  # no start, no table of starts
    assert cli.main(["logs", "tiny"]) == 0
    assert capsys.readouterr().out == "a\npython: No module named decompft\n"


@pytest.mark.parametrize(
    ("name", "state", "code", "words"),
    [
        ("timeout", "failed", 3, "it reached its time limit and was killed; no rank left an outcome, saved at step 4"),
        ("node_fail", "failed", 3, "a node failed; no rank left an outcome, saved at step 4"),
        ("cancelled", "cancelled", 75, "the job was cancelled; saved at step 4"),
        ("no_log", "needs a hand", 4, "Slurm could not start its script"),
        ("prolog", "needs a hand", 4, "holds the job until somebody lets it go"),
        ("requeued", "queued", 75, "Slurm starts a requeued job again after a delay, any moment now; saved at step 4"),
    ],
)  # fmt: skip
def test_what_slurm_says_when_the_ranks_said_nothing(
    name: str, state: str, code: int, words: str, slurm: FakeSlurm, tmp_path: Path
) -> None:
    run = run_of_job(tmp_path)
    slurm.answer(name, job_id="23")
    start(run, job_id="23")
    make_checkpoint(run.path, 4)
    status = status_of(run.path)
    assert (status.state, status.code) == (state, code)
    assert words in status.words
    if state == "needs a hand":
        assert status.next == _TODO[name]


def test_an_outcome_of_an_earlier_job_is_not_that_of_the_last(slurm: FakeSlurm, tmp_path: Path) -> None:
    run = run_of_job(tmp_path, "22")
    end(run, start(run, job_id="22"), stopped(4), saves=True)
    submit(run, "23")
    slurm.answer("no_log", job_id="23")
    assert state_of(run) == ("needs a hand", 4, "mkdir -p /nonexistent/logs")
    slurm.answer("failed", job_id="23")
    assert status_of(run.path).words.startswith("its script failed with exit code 3")
    assert "no rank was started, saved at step 4" in status_of(run.path).words


def test_the_job_that_runs_counts_before_the_successor_that_waits(slurm: FakeSlurm, tmp_path: Path) -> None:
    run = run_of_job(tmp_path, "22")
    start(run, job_id="22")
    submit(run, "23", after=["22"])
    slurm.say("squeue", *recorded("squeue", "running", "22"), *recorded("squeue", "dependency", "23"))
    status = status_of(run.path)
    assert status.job is not None
    assert (status.state, status.job.job_id) == ("running", "22")


def test_jobs_before_and_after_the_training_count_too(slurm: FakeSlurm, tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs/tiny")
    submit(run, "21", kind="prepare")
    submit(run, "22", after=["21"])
    submit(run, "23", kind="merge", after=["22"])

    def say(*jobs: tuple[str, str]) -> Status:
        slurm.say("squeue", *(line for name, job_id in jobs for line in recorded("squeue", name, job_id)))
        return status_of(run.path)

    status = say(("running", "21"), ("dependency", "22"), ("dependency", "23"))
    assert status.state == "queued" and [o.job_id for o in status.others] == ["21", "23"]
    status = say(("failed", "21"), ("dependent", "22"), ("dependent", "23"))
    assert status.state == "failed" and "Slurm cancelled it" in status.words
    end(run, start(run, job_id="22"), Outcome(result="finished", step=10))
    status = say(("completed", "21"), ("completed", "22"), ("resources", "23"))
    assert (status.state, status.code) == ("queued", 75) and "its merge job 23" in status.words
    status = say(("completed", "21"), ("completed", "22"), ("failed", "23"))
    assert (status.state, status.code) == ("failed", 3) and "its merge job 23" in status.words
    status = say(("completed", "21"), ("completed", "22"), ("completed", "23"))
    assert (status.state, status.code) == ("finished", 0)
    submit(run, "32")  # a successor of 22, to which what waited for 22 was handed over
    submit(run, "23", kind="merge", after=["32"])
    assert [o.job_id for o in status_of(run.path).others] == ["23"]


def test_a_controller_that_does_not_answer_leaves_the_files(slurm: FakeSlurm, tmp_path: Path) -> None:
    run = run_of_job(tmp_path)
    slurm.say("down", "")
    start(run, job_id="23")
    train(run, 1, 2)
    status = status_of(run.path)
    assert status.state == "running" and "Unable to contact slurm controller" in status.note
    age(run, 3600)
    assert status_of(run.path).state == "silent"
    end(run, 1, stopped(4))
    assert status_of(run.path).state == "stopped"


def test_a_start_without_outcome_is_told_by_accounting(slurm: FakeSlurm, tmp_path: Path) -> None:
    run = run_of_job(tmp_path)
    slurm.answer("running", sacct=("requeued", "node_fail"), job_id="23")
    for restart in (0, 1):
        start(run, job_id="23", restart=restart)
    start(run, job_id="23", restart=2)
    # 0: requeued, 1: nothing is known of it, since accounting's second row is of a job that runs
    words = [past.words for past in read_history(status_of(run.path))]
    assert words[0] == "left no word; requeued from outside"
    assert words[-1] == "running"


def test_a_job_number_finds_its_run(slurm: FakeSlurm, tmp_path: Path) -> None:
    run = run_of_job(tmp_path, "22")
    submit(run, "24")
    make_run(tmp_path / "runs/23")
    assert find_named("22") == (Path("runs/tiny"), None) and find_named("24") == (Path("runs/tiny"), None)
    assert find_named("23") == (Path("runs/23"), None)  # a run of that name comes first
    with pytest.raises(UserError, match="99: no run in ./runs knows this job"):
        find_named("99")
    assert cli.main(["status", "nothing"]) == 2


def test_demand_10_a_task_is_found_by_both_of_its_numbers(slurm: FakeSlurm, tmp_path: Path) -> None:
    sweep = make_run(tmp_path / "runs/sweep")
    submit(sweep, "13", kind="sweep", array=4)
    task = make_run(tmp_path / "runs/sweep/001-rank_8")
    submit(task, "13_1", kind="sweep")
    start(task, job_id="15")
    slurm.answer("array")
    assert find_named("13_1") == find_named("15") == (Path("runs/sweep/001-rank_8"), None)
    assert find_named("13") == find_named("13_3") == (Path("runs/sweep"), None)
    status = status_of(task.path)
    assert status.job is not None and (status.job.job_id, status.state) == ("13_1", "running")


def test_a_job_that_was_submitted_by_hand_is_found_by_its_comment(slurm: FakeSlurm, tmp_path: Path) -> None:
    make_run(tmp_path / "elsewhere/my run")
    line = recorded("squeue", "running", "23")[0].replace("/home/me/my runs/tiny", "elsewhere/my run")
    slurm.say("squeue", line.replace("/tmp/wrec2", str(tmp_path)))
    assert find_named("23") == (Path("elsewhere/my run"), None)


def test_a_job_between_two_starts_lengthens_neither(slurm: FakeSlurm, tmp_path: Path) -> None:
    run = run_of_job(tmp_path)
    end(run, start(run, job_id="23"), stopped(4))
    (past,) = read_history(status_of(run.path))
    with (run.path / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "submit", "time_s": time.time() + 3600, "job_id": "24"}) + "\n")
    assert read_history(status_of(run.path)) == (past,)


def test_a_job_of_no_run_is_shown_alone(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.answer("prolog", job_id="23")
    assert cli.main(["status", "23"]) == 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "job 23 (prolog): pending, launch failed requeued held"
    assert lines[-1] == "next: scontrol release 23"


# -- without Slurm --


def test_a_local_run_lives_while_its_lock_is_held(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert state_of(run)[:2] == ("not started", 4)
    handle = run.lock()
    assert state_of(run)[:2] == ("running", 75)
    number = start(run)
    train(run, 1, 2)
    age(run, 7200)
    assert "last sign of life 2 h ago" in status_of(run.path).words
    os.close(handle)
    assert state_of(run)[:2] == ("silent", 4)
    train(run, 3)  # from another machine
    assert state_of(run)[:2] == ("running", 75)
    end(run, number, stopped(3))
    assert state_of(run) == ("stopped", 75, f"decompft launch RECIPE --resume auto --run-dir {run.path}")


def test_a_failed_local_run_repeats_the_command_that_its_launcher_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    end(run, start(run), failed(3))
    run.append_event("failure", incarnation=1, next="decompft launch tiny.yaml --resume auto")
    assert state_of(run) == ("failed", 3, "decompft launch tiny.yaml --resume auto")


def test_what_a_run_wrote_cannot_command_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    end(run, start(run), Outcome(result="failed", message="\x1b[2Jgone", node="\x1b]0;title\x07", rank=0))
    assert cli.main(["status", str(run.path)]) == 3
    assert "\x1b" not in capsys.readouterr().out


def test_damaged_files_are_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    number = start(run, job_id="")
    for name in ("metrics.jsonl", "events.jsonl", "slurm/state.json", f"incarnations/{number}/slurm.json",
                 f"incarnations/{number}/outcome.json", f"incarnations/{number}/pulse-0.json"):  # fmt: skip
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_text('[1, {"step": "x"}]\n{"step": null}\n{"fail')
    assert cli.main(["status", str(run.path)]) == 75  # written a moment ago
    run.plan_path.write_text("{}")
    assert cli.main(["status", str(run.path)]) == 75
    assert "step 0" in capsys.readouterr().out


# -- the real one --


@pytest.mark.slurm
def test_demand_7_a_real_job_from_the_queue_to_its_end(
    cluster: testbed.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "runs/tiny")
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\nwhile [ ! -e go ]; do sleep 0.2; done; exit 3\n")
    job = cluster.submit("--hold", "--time=5", "--comment=decompft:runs/tiny", str(script), cwd=tmp_path)
    submit(run, job)
    assert find_named(job) == (Path("runs/tiny"), None)
    assert state_of(run) == ("needs a hand", 4, f"scontrol release {job}")
    cluster.run("scontrol", "release", job)
    cluster.until(lambda: status_of(run.path).state == "running", 60, "its start")
    status = status_of(run.path)
    assert status.job is not None and status.job.nodes and 0 < (status.job.left_s or 0) <= 300
    (tmp_path / "go").touch()
    cluster.finished(job, 60)
    status = status_of(run.path)
    assert (status.state, status.code) == ("failed", 3)
    assert "its script failed with exit code 3" in status.words
    job = cluster.submit(f"--output={tmp_path}/none/x.out", str(script), cwd=tmp_path)
    submit(run, job)
    cluster.finished(job, 60)
    assert state_of(run) == ("needs a hand", 4, f"mkdir -p {tmp_path}/none")
