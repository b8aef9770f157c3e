"""`decompft logs`: what the ranks wrote, over all restarts, and who failed first."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import testbed
from fake_slurm import FakeSlurm
from watched import end, failed, make_run, start, stopped, submit

from decompft.launcher import cli
from decompft.launcher.errors import UserError
from decompft.launcher.outcome import Outcome, write_rank
from decompft.launcher.runs import RunDir
from decompft.slurm import logs

pytestmark = pytest.mark.dist


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run", ranks=2)


def write(run: RunDir, number: int, name: str, text: str) -> None:
    with (run.log_dir(number) / name).open("a") as file:
        file.write(text)


def shown(run: RunDir, *, incarnation: int | None = None, rank: str = "0") -> list[str]:
    lines: list[str] = []
    logs.show(run.path, incarnation=incarnation, rank=rank, say=lines.append)
    return lines


def test_demand_9_by_default_the_newest_start_of_rank_0(run: RunDir) -> None:
    for number in (1, 2):
        start(run)
        write(run, number, "rank-0.log", f"first of {number}\nlast, cut sho")
    assert shown(run) == ["first of 2", "last, cut sho"]
    assert shown(run, incarnation=1) == ["first of 1", "last, cut sho"]


def test_every_rank_has_its_name_before_its_lines(run: RunDir) -> None:
    start(run)
    for rank in (0, 1, 10):
        write(run, 1, f"rank-{rank}.log", "a\nb\n")
    write(run, 1, "launcher.log", "srun: error\n")
    assert shown(run, rank="all") == [
        "launcher: srun: error", "rank  0: a", "rank  0: b", "rank  1: a", "rank  1: b", "rank 10: a", "rank 10: b",
    ]  # fmt: skip
    assert shown(run, rank="1") == ["a", "b"]
    assert shown(run, rank="launcher") == ["srun: error"]


def test_ranks_that_never_came_up_leave_the_launchers_words(run: RunDir) -> None:
    start(run)
    write(run, 1, "launcher.log", "EADDRINUSE\n")
    assert shown(run) == ["EADDRINUSE"]


def test_what_is_not_there_is_refused_in_words(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no rank was started yet"):
        shown(run)
    start(run)
    with pytest.raises(UserError, match="no log of rank 0"):
        shown(run)
    with pytest.raises(UserError, match="no incarnation 7"):
        shown(run, incarnation=7)
    assert cli.main(["logs", str(run.path), "--rank", "first"]) == 2
    assert cli.main(["logs", str(run.path), "--follow", "--incarnation", "1"]) == 2
    capsys.readouterr()


class Following:
    """`logs --follow` in a thread."""

    def __init__(self, run: RunDir, rank: str = "0") -> None:
        self.lines: list[str] = []
        self.told: list[str] = []
        self.state = ""
        self._thread = threading.Thread(target=self._follow, args=(run, rank), daemon=True)
        self._thread.start()

    def until(self, is_true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not is_true():
            assert time.monotonic() < deadline, (self.lines, self.told)
            time.sleep(0.02)

    def ends(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _follow(self, run: RunDir, rank: str) -> None:
        self.state = logs.follow(run.path, rank=rank, say=self.lines.append, tell=self.told.append).state


def test_following_goes_on_over_a_restart_until_the_end(run: RunDir) -> None:
    handle = run.lock()
    start(run)
    write(run, 1, "rank-0.log", "one\nhal")
    follower = Following(run)
    follower.until(lambda: follower.lines == ["one"])
    write(run, 1, "rank-0.log", "f\n")
    follower.until(lambda: follower.lines == ["one", "half"])
    write(run, 1, "rank-0.log", "last of 1")
    end(run, 1, stopped(4), saves=True)
    start(run, job_id="24", nodes=("vn-1", "vn-2"), from_step=4)
    write(run, 2, "rank-0.log", "three\n")
    follower.until(lambda: follower.lines == ["one", "half", "last of 1", "three"])
    assert follower.told == [
        "--- incarnation 1, from step 0 ---", "--- incarnation 2, job 24 on vn-1, vn-2, from step 4 ---",
    ]  # fmt: skip
    write(run, 2, "rank-0.log", "last of 2\n")
    end(run, 2, Outcome(result="finished", step=10))

    os.close(handle)
    follower.ends()
    assert follower.lines[-1] == "last of 2" and follower.state == "finished"


def test_following_says_what_the_job_waits_for(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_ASK_S", 0.2)
    slurm = FakeSlurm(tmp_path, monkeypatch)
    submit(run, "23")
    slurm.answer("resources", job_id="23")
    follower = Following(run, rank="all")
    follower.until(lambda: bool(follower.told))
    assert follower.told[0].startswith("job 23: it is next, and waits for nodes to become free")
    slurm.answer("running", job_id="23")
    start(run, job_id="23", nodes=("vn-1",))
    write(run, 1, "rank-1.log", "here\n")
    follower.until(lambda: follower.lines == ["rank 1: here"])
    end(run, 1, failed(3))
    slurm.answer("failed", job_id="23")
    follower.ends()
    assert follower.state == "failed"
    assert len(follower.told) == 2  # each word once


def said(run: RunDir, incarnation: int | None = None) -> list[str]:
    lines: list[str] = []
    logs.first_error(run.path, incarnation=incarnation, say=lines.append)
    return lines


def test_demand_9_the_first_error_is_the_earliest_failing_ranks(run: RunDir) -> None:
    start(run)
    folder = run.incarnation_dir(1)
    later = Outcome(result="failed", message="Connection closed by peer", step=3, time_s=20.0)
    first = Outcome(
        result="failed", message="RuntimeError: CUDA error: an illegal memory access", step=3, time_s=10.0,
        traceback="Traceback\n  File x\nRuntimeError", node="vn-2",
    )  # fmt: skip
    write_rank(folder, 0, later)
    write_rank(folder, 1, first)
    write(run, 1, "rank-1.log", "".join(f"line {i}\n" for i in range(40)) + "CUDA error: an illegal\n")
    write(run, 1, "rank-0.log", "Connection closed by peer\n")
    lines = said(run)  # without outcome.json: its launcher died too
    assert "  first to fail: rank 1 on vn-2" in lines and "    | RuntimeError" in lines
    assert "    | CUDA error: an illegal" in lines and "    | line 0" not in lines
    assert not any("closed by peer" in line for line in lines)


def test_the_first_error_is_that_of_the_newest_failure(run: RunDir) -> None:
    end(run, start(run), failed(3))
    end(run, start(run), failed(5, rank=0, node="vn-1"))
    end(run, start(run), stopped(7))
    assert said(run)[0] == "incarnation 2" and "  first to fail: rank 0 on vn-1" in said(run)
    assert "  first to fail: rank 1 on vn-2" in said(run, 1)
    assert said(run, 3) == [f"{run.path}: incarnation 3 has not failed"]
    assert said(make_run(run.path / "other")) == [f"{run.path}/other: no incarnation has failed"]


@pytest.mark.slurm
def test_demand_9_a_real_job_is_followed_over_its_requeue(
    cluster: testbed.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_ASK_S", 1.0)
    run = make_run(tmp_path / "run")
    script = tmp_path / "job.sh"
    script.write_text(
        "#!/bin/bash\n#SBATCH --requeue --open-mode=append\n"
        "n=$((${SLURM_RESTART_COUNT:-0} + 1))\n"
        "mkdir -p run/incarnations/$n run/logs/incarnation-$n\n"
        'echo "start $n" > run/logs/incarnation-$n/rank-0.log\n'
        "sleep 2\n"
        '[ "$n" = 1 ] && scontrol requeue $SLURM_JOB_ID && sleep 60\n'
    )
    submit(run, cluster.submit("--time=5", str(script), cwd=tmp_path))
    follower = Following(run)
    follower.until(lambda: follower.lines == ["start 1"])
    follower.ends()
    assert follower.lines == ["start 1", "start 2"]
    assert any("requeued" in line for line in follower.told)
