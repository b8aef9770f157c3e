"""The rank that failed first is named: its host, its step, its cause with the evidence, what to type next."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
from test_runs import RECIPE, make_plan

from decompft.launcher.ending import conclude, report
from decompft.launcher.hangs import Reading, pulse_path, to_json
from decompft.launcher.outcome import Outcome, read_outcome, write_rank
from decompft.launcher.runs import RunDir

HOST = platform.node()


class Death:
    """A run directory whose ranks are gone."""

    def __init__(self, folder: Path, *, ranks: int = 2, nodes: int = 1) -> None:
        plan = make_plan(ranks=ranks)
        world = plan.world.model_copy(update={"nodes": nodes, "ranks_per_node": ranks // nodes})
        self.run = RunDir.create(
            folder / "run", recipe_text=RECIPE, plan=plan.model_copy(update={"world": world})
        )
        self.folder = self.run.incarnation_dir(self.run.next_incarnation())
        self.ranks = ranks

    def told(self, rank: int, message: str, *, time_s: float = 1.0, **more: object) -> None:
        write_rank(self.folder, rank, Outcome(result="failed", message=message, time_s=time_s, **more))  # type: ignore[arg-type]

    def torchrun_reports(self, *ranks: tuple[int, int]) -> None:
        """(rank, exit code), the root cause last, as torchrun's own report has it."""
        blocks = "".join(
            f"  time      : 2026-11-22_10:00:00\n  host      : node-{rank}\n"
            f"  rank      : {rank} (local_rank: {rank})\n  exitcode  : {code} (pid: 123)\n"
            for rank, code in ranks
        )
        self.log(f"Root Cause (first observed failure):\n{blocks}")

    def log(self, text: str) -> None:
        with self.run.launcher_log(1).open("a") as file:
            file.write(text + "\n")

    def pulse(self, rank: int, **what: object) -> None:
        reading = Reading(rank=rank, **{"node": f"node-{rank // 2}", "count": 1, **what})  # type: ignore[arg-type]
        pulse_path(self.folder, rank).write_text(to_json(reading))

    def conclude(self, returncode: int = 1, **more: int) -> Outcome:
        outcome = conclude(self.run, 1, returncode, **more)
        assert read_outcome(self.folder) == outcome, "it does not survive in outcome.json"
        return outcome


@pytest.fixture
def death(tmp_path: Path) -> Death:
    return Death(tmp_path)


def test_one_event_and_the_last_lines_say_the_same(death: Death) -> None:
    death.run.rank_log(1, 1).write_text("noise\n")
    death.told(0, "RuntimeError: Connection closed by peer", time_s=1.0)
    death.told(1, "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", step=12, node="gpu-07")
    outcome = death.conclude()
    said: list[str] = []
    report(death.run, 1, outcome, again="decompft launch x --resume auto", say=said.append)
    assert said[-6:] == [
        "run failed: rank 1: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "  first to fail: rank 1 on gpu-07",
        "  last step: 12",
        "  cause: out_of_memory_gpu (the GPU ran out of memory)",
        f"  hint: {outcome.hint}",
        "next: decompft launch x --resume auto",
    ]
    events = [json.loads(line) for line in (death.run.path / "events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["event"] == "failure"]
    assert (event["rank"], event["node"], event["step"]) == (1, "gpu-07", 12)
    assert (event["cause"], event["meaning"]) == ("out_of_memory_gpu", "the GPU ran out of memory")
    assert event["evidence"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert (event["hint"], event["next"]) == (outcome.hint, "decompft launch x --resume auto")


def test_a_rank_whose_save_another_spoiled_is_not_the_cause(death: Death) -> None:
    full = "step 4: not saved: No space left on device"
    death.told(0, f"another rank could not write its part: rank 1: {full}", time_s=1.0, traceback="x")
    death.told(1, full, time_s=2.0)
    outcome = death.conclude()
    assert (outcome.rank, outcome.cause) == (1, "disk")


def test_a_user_error_of_data_is_of_the_class_data(death: Death) -> None:
    write_rank(
        death.folder, 1,
        Outcome(result="user_error", message="a.jsonl:2: not JSON", traceback="decompft.launcher.errors.DataError: a"),
    )  # fmt: skip
    write_rank(death.folder, 0, Outcome(result="failed", message="Connection reset by peer", time_s=1.0))
    outcome = death.conclude()
    assert (outcome.result, outcome.cause, outcome.rank) == ("user_error", "data", 1)


def test_a_users_mistake_is_of_the_class_user(death: Death) -> None:
    write_rank(
        death.folder, 0, Outcome(result="user_error", message="adapter.targets: ImportError is no layer")
    )
    outcome = death.conclude()
    assert (outcome.cause, outcome.evidence) == ("user", "adapter.targets: ImportError is no layer")


def test_a_killed_rank_is_named_with_the_host_of_torchruns_report(death: Death) -> None:
    death.told(0, "RuntimeError: Connection closed by peer")
    death.torchrun_reports((0, 3), (1, -9))
    outcome = death.conclude()
    assert (outcome.rank, outcome.node, outcome.cause) == (1, "node-1", "killed")
    assert outcome.evidence == "was killed by signal 9 (SIGKILL)"


@pytest.mark.parametrize("host", ["localhost", "localhost.localdomain"])
def test_a_killed_rank_is_on_the_node_of_its_pulse_where_torchrun_says_localhost(
    death: Death, host: str
) -> None:
    death.log(
        f"  host      : {host}\n  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 123)\n"
        "Root Cause (first observed failure):\n"
    )
    death.pulse(1, node="gpu-07", step=12)
    outcome = death.conclude()
    assert (outcome.rank, outcome.node, outcome.cause) == (1, "gpu-07", "killed")


def test_a_kill_while_the_kernel_freed_memory_is_the_hosts_memory(death: Death) -> None:
    death.torchrun_reports((1, -9))
    outcome = death.conclude(oom_kills=1)
    assert outcome.cause == "out_of_memory_host"
    assert "SIGKILL" in outcome.evidence and "for memory" in outcome.evidence


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=1.0.", "out_of_memory_host"),
        ("0: slurmstepd: error: *** STEP 1.0 ON n CANCELLED AT 2026 DUE TO TIME LIMIT ***", "preempted"),
        ("a library once said: No space left on device", "killed"),
    ],
)
def test_the_schedulers_lines_tell_why_a_rank_was_killed(death: Death, line: str, cause: str) -> None:
    death.log(line)
    death.run.rank_log(1, 1).write_text("CUDA out of memory, caught and handled\n")
    death.torchrun_reports((1, -9))
    assert death.conclude().cause == cause


def test_a_rank_that_nccl_aborted_is_not_the_cause(death: Death) -> None:
    death.run.rank_log(1, 0).write_text(
        "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=8\n"
    )
    death.torchrun_reports((1, -15), (0, -6))
    death.pulse(0, what="reducing", step=7, still_s=600.0)
    death.pulse(1, what="data", step=7, still_s=601.0, stack=("a.py:1 in f: f()", "b.py:2 in g: sleep(9)"))
    outcome = death.conclude()
    assert (outcome.rank, outcome.node, outcome.cause, outcome.step) == (1, "node-0", "hang", 7)
    assert outcome.evidence == "b.py:2 in g: sleep(9)"
    assert "stood still for 601 s in data after step 7" in outcome.message


def test_a_rank_that_torchrun_killed_after_a_timeout_is_named_as_hanging(death: Death) -> None:
    death.told(0, "RuntimeError: Timed out waiting 600000ms for recv operation to complete")
    death.torchrun_reports((1, -9), (0, 3))
    death.pulse(0, what="reducing", step=7, still_s=600.0)
    death.pulse(1, what="forward", step=7, still_s=601.0)
    outcome = death.conclude()
    assert (outcome.rank, outcome.cause) == (1, "hang")


def test_a_timeout_without_any_pulse_is_still_said(death: Death) -> None:
    death.told(0, "RuntimeError: Timed out waiting 600000ms for recv operation to complete")
    outcome = death.conclude()
    assert (outcome.rank, outcome.cause, outcome.node) == (0, "hang", HOST)
    assert "parallel.timeout_s" in outcome.meaning


def test_a_node_that_left_no_word_is_named(tmp_path: Path) -> None:
    death = Death(tmp_path, ranks=4, nodes=2)
    for rank in range(4):
        death.pulse(rank, what="forward", step=30)
    death.told(0, "RuntimeError: Connection reset by peer [10.0.0.2]", node="node-0")
    death.told(1, "RuntimeError: Connection reset by peer [10.0.0.2]", node="node-0")
    outcome = death.conclude()
    assert (outcome.rank, outcome.node, outcome.cause, outcome.step) == (2, "node-1", "node_lost", 30)


def test_the_last_step_is_the_pulses_when_that_is_newer(death: Death) -> None:
    death.told(1, "ValueError: x", step=10)
    death.pulse(1, what="forward", step=14)
    assert death.conclude().step == 14


@pytest.mark.parametrize(
    ("line", "node", "rank", "cause"),
    [
        ("srun: error: vn-2: task 1: Killed", "vn-2", 1, "killed"),
        ("srun: error: vn-2: tasks 2-3: Segmentation fault (core dumped)", "vn-2", 2, "crash"),
        ("srun: error: vn-2: task 1: Exited with exit code 127", "vn-2", 1, "unknown"),
    ],
)
def test_a_task_that_srun_saw_fail_is_named_and_not_those_that_it_ended_then(
    tmp_path: Path, line: str, node: str, rank: int, cause: str
) -> None:
    death = Death(tmp_path, ranks=4, nodes=2)
    death.log(
        f"{line}\nsrun: launch/slurm: _step_signal: Terminating StepId=5.0\n"
        "0: slurmstepd-vn-1: error: *** STEP 5.0 ON vn-1 CANCELLED AT 2026-11-22T10:00:00 ***\n"
        "srun: error: vn-1: task 0: Terminated"
    )
    outcome = death.conclude(143)
    assert (outcome.node, outcome.rank, outcome.cause) == (node, rank, cause)


def test_a_task_of_srun_is_the_torchrun_of_a_node(tmp_path: Path) -> None:
    death = Death(tmp_path, ranks=4, nodes=2)
    death.log(
        '0:   File "torch/distributed/run.py", line 1\nsrun: error: vn-2: task 1: Exited with exit code 127'
    )
    assert (death.conclude(143).node, death.conclude(143).rank) == ("vn-2", 2)


def test_a_step_that_was_cancelled_from_outside_blames_nobody(tmp_path: Path) -> None:
    death = Death(tmp_path, ranks=4, nodes=2)
    death.log("srun: error: vn-1: task 0: Terminated\nsrun: error: vn-2: task 1: Terminated")
    assert death.conclude(143).cause == "preempted"
