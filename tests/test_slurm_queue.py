"""What Slurm says of a job, and what it means in words: recorded answers of a real one."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm, recorded

from decompft.slurm.queue import Job, find_job, find_jobs, past_rows
from decompft.slurm.reasons import explain

pytestmark = pytest.mark.dist


def at(clock: str) -> float:
    """A moment of the day on which the answers were recorded."""
    return time.mktime(time.strptime(f"2026-11-22T{clock}", "%Y-%m-%dT%H:%M:%S"))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path, monkeypatch)


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
def test_demand_7_a_recorded_state_is_explained_in_words(name: str, slurm: FakeSlurm) -> None:
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


def test_demand_7_an_old_row_of_accounting_is_not_believed_over_the_queue(slurm: FakeSlurm) -> None:
    slurm.answer("late", sacct=("late",), job_id="23")
    assert recorded("sacct", "late")[0].split("|")[2] == "PENDING"  # heard at the same moment
    (job,) = find_jobs(["23"])
    assert (job.state, job.source, job.nodes) == ("RUNNING", "queue", "watch-[1-2]")
    assert slurm.calls("sacct") == []


def test_demand_7_a_job_that_the_queue_has_forgotten_is_found_in_accounting(slurm: FakeSlurm) -> None:
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


def test_demand_10_the_tasks_of_an_array_are_jobs_of_their_own(slurm: FakeSlurm) -> None:
    slurm.answer("array")
    array = recorded("squeue", "array")[0].split("_")[0]
    tasks = {job.job_id: job.state for job in find_jobs([array])}
    assert tasks == {f"{array}_{k}": "RUNNING" if k < 2 else "PENDING" for k in range(4)}
    (one,) = find_jobs([f"{array}_1"])
    assert one.belongs_to(array) and one.belongs_to(one.raw_id) and not one.belongs_to(f"{array}_0")
    assert "throttle" in explain(find_jobs([f"{array}_3"])[0], 0.0).words


def test_a_job_of_another_cluster_is_asked_for_there(slurm: FakeSlurm) -> None:
    slurm.answer("running", job_id="23")
    job = find_job("23", cluster="far")
    assert job is not None and job.cluster == "far"
    asked = [*slurm.calls("squeue"), *slurm.calls("scontrol")]
    assert len(asked) == 2 and all(argv[:2] == ["-M", "far"] for argv in asked)


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
