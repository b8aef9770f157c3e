"""`decompft status`: Slurm's word in plain words, put together with what the run left on disk."""

from __future__ import annotations

import json
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
from decompft.slurm.queue import Job, find_job, find_jobs, past_rows
from decompft.slurm.reasons import explain
from decompft.slurm.watch import Status, find_named, status_of

pytestmark = pytest.mark.dist


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    monkeypatch.chdir(tmp_path)
    return FakeSlurm(tmp_path, monkeypatch)


def at(clock: str) -> float:
    """A moment of the day on which the answers were recorded."""
    return time.mktime(time.strptime(f"2026-11-22T{clock}", "%Y-%m-%dT%H:%M:%S"))


def run_of_job(tmp_path: Path, job_id: str = "23") -> RunDir:
    run = make_run(tmp_path / "runs/tiny")
    submit(run, job_id)
    return run


# -- Slurm's words --

REASONS = {
    "resources": ("waits", "it is next, and waits for nodes to become free; Slurm expects to start it at 16:20:47"),
    "priority": ("waits", "jobs of higher priority are before it; Slurm expects to start it at 16:40:00"),
    "dependency": ("waits", r"it waits for afterok:17\(unfulfilled\)"),
    "begin": ("waits", r"it is to begin at 17:00:32 \(in 59 min"),
    "requeued": ("waits", r"requeued; Slurm starts a requeued job again after a delay, at 16:00:41 \(in 6.00 s\)"),
    "node_requeued": ("waits", "nodes that it needs are down, drained or reserved"),
    "never": ("stuck", "a job that it was to follow has failed"),
    "held_user": ("stuck", "held by its owner"),
    "held_admin": ("stuck", "held by an administrator"),
    "requeue_held": ("stuck", "it was requeued and held"),
    "prolog": ("stuck", r"health check \(the prolog\) failed .* holds the job"),
    "req_node": ("stuck", r"it asks for vn-3 by name, and not all of them are available \(vn-3\)"),
    "no_log": ("stuck", r"the folder of its log file is missing on the node \(/nonexistent/logs\)"),
    "running": ("runs", "^running for"),
    "completing": ("runs", "its processes are being ended"),
    "completed": ("done", "the job has ended"),
    "failed": ("failed", r"its script failed with exit code 3 \(the run failed\)"),
    "dependent": ("failed", "a job that it was to follow has failed"),
    "timeout": ("failed", "it reached its time limit"),
    "preempted": ("failed", "a job of higher priority took its nodes"),
    "node_fail": ("failed", "a node failed"),
    "cancelled": ("cancelled", "the job was cancelled"),
}  # fmt: skip
TODO = {
    "held_user": "scontrol release 23", "requeue_held": "scontrol release 23", "prolog": "scontrol release 23",
    "never": "scancel 23", "req_node": "scancel 23", "no_log": "mkdir -p /nonexistent/logs",
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_7_a_recorded_state_is_explained_in_words(name: str, slurm: FakeSlurm) -> None:
    slurm.answer(name, job_id="23")
    job = find_job("23")
    assert job is not None
    kind, words = REASONS[name]
    standing = explain(job, at("16:00:35"))
    assert standing.kind == kind
    assert re.search(words, standing.words), standing.words
    assert standing.todo == TODO.get(name, "")


# not heard on the testbed: it has no limits by user, and no memory limits
@pytest.mark.parametrize(
    ("state", "reason", "kind", "words"),
    [
        ("PENDING", "QOSMaxJobsPerUserLimit", "waits", "other jobs use all that its QOS may use at a time"),
        ("PENDING", "AssocGrpCpuLimit", "waits", "other jobs use all that its account or user may use"),
        (
            "PENDING",
            "AssocMaxWallDurationPerJobLimit",
            "stuck",
            "more than its account or user allows to one job",
        ),
        (
            "PENDING",
            "AssocGrpCPUMinutesLimit",
            "stuck",
            "the computing time of its account or user is used up",
        ),
        ("PENDING", "AssocGrpCPURunMinutesLimit", "waits", "other jobs use all"),
        ("PENDING", "PartitionTimeLimit", "stuck", "more time than its partition allows"),
        ("PENDING", "ReqNodeNotAvail, Reserved for maintenance", "waits", "reserved for maintenance"),
        ("PENDING", "SomethingNew", "waits", "Slurm's reason is SomethingNew"),
        ("PENDING", "None", "waits", "Slurm's reason is None"),
        ("PENDING", "", "waits", "the scheduler has not looked at it yet"),
        ("OUT_OF_MEMORY", "OutOfMemory", "failed", "it used more memory than it asked for"),
        ("COMPLETING", "", "runs", "its processes are being ended"),
    ],
)
def test_a_state_from_the_manual_is_explained_in_words(
    state: str, reason: str, kind: str, words: str
) -> None:
    standing = explain(Job(job_id="23", state=state, reason=reason), 0.0)
    assert standing.kind == kind
    assert words in standing.words


def test_7_an_old_row_of_accounting_is_not_believed_over_the_queue(slurm: FakeSlurm) -> None:
    slurm.answer("late", sacct=("late",), job_id="23")
    assert recorded("sacct", "late")[0].split("|")[2] == "PENDING"  # heard at the same moment
    (job,) = find_jobs(["23"])
    assert (job.state, job.source, job.nodes) == ("RUNNING", "queue", "watch-[1-2]")
    assert slurm.calls("sacct") == []


def test_7_a_job_that_the_queue_has_forgotten_is_found_in_accounting(slurm: FakeSlurm) -> None:
    slurm.answer(sacct=("timeout", "preempted", "cancelled"))
    slurm.say("squeue", *recorded("squeue", "running"))
    ids = [recorded("sacct", name)[-1].split("|")[0] for name in ("timeout", "preempted", "cancelled")]
    running = recorded("squeue", "running")[0].split("|")[0]
    states = {job.job_id: (job.state, job.source) for job in find_jobs([*ids, running])}
    assert states == {
        ids[0]: ("TIMEOUT", "accounting"), ids[1]: ("PREEMPTED", "accounting"), ids[2]: ("CANCELLED", "accounting"),
        running: ("RUNNING", "queue"),
    }  # fmt: skip
    assert explain(find_jobs(ids[2:])[0], 0.0).words == "the job was cancelled by 0"


def test_an_end_that_accounting_never_heard_of_is_not_made_up(slurm: FakeSlurm) -> None:
    slurm.answer(sacct=("running",), job_id="23")
    job = find_job("23")
    assert job is not None and job.state == "UNKNOWN" and not job.is_live
    assert "accounting saw no end of it" in explain(job, 0.0).words


def test_unknown_ids_are_left_out(slurm: FakeSlurm) -> None:
    slurm.answer("running", job_id="23")
    assert [job.job_id for job in find_jobs(["23", "9999"])] == ["23"]
    assert find_jobs(["9999"]) == () and find_job("9999") is None
    assert find_jobs([]) == ()


def test_10_the_tasks_of_an_array_are_jobs_of_their_own(slurm: FakeSlurm) -> None:
    slurm.answer("array")
    array = recorded("squeue", "array")[0].split("_")[0]
    tasks = {job.job_id: job.state for job in find_jobs([array])}
    assert tasks == {f"{array}_{k}": "RUNNING" if k < 2 else "PENDING" for k in range(4)}
    (one,) = find_jobs([f"{array}_1"])
    assert one.belongs_to(array) and one.belongs_to(one.raw_id) and not one.belongs_to(f"{array}_0")
    assert "throttle" in explain(find_jobs([f"{array}_3"])[0], 0.0).words


def test_values_with_blanks_come_through(slurm: FakeSlurm) -> None:
    slurm.answer("running", job_id="23")
    job = find_job("23")
    assert job is not None
    assert (job.comment, job.work_dir, job.limit_s) == (
        "decompft:/home/me/my runs/tiny",
        "/tmp/wrec2",
        1200.0,
    )
    assert (job.exit_code, job.restarts, job.log) == (0, 0, "/tmp/wrec2/slurm-17.out")


def test_each_start_of_a_requeued_job_has_a_row_in_accounting(slurm: FakeSlurm) -> None:
    slurm.answer(sacct=("requeued",), job_id="23")
    assert [row.state for row in past_rows("23")][0] == "REQUEUED"


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
    slurm.answer("failed", job_id="23")
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
        assert status.next == TODO[name]


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
    import os

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
def test_7_a_real_job_from_the_queue_to_its_end(
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
