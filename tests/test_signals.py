"""Signals that reach a rank or the launcher, and terminals that go away: training stops in order or goes on.

What the launcher does with a signal while ranks run is in test_local_launch.py, with real ranks in
test_launch_end_to_end.py.
"""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import losses, make_run
from workers import Rank, end_ranks, start_ranks

from decompft.launcher.checkpoints import newest_valid
from decompft.launcher.outcome import Outcome, read_outcome, write_rank
from decompft.launcher.runs import RunDir
from decompft.launcher.worker.console import Console, StepRow

pytestmark = pytest.mark.dist

ENDLESS = {"max_steps": 100_000, "learning_rate": 0.01, "global_batch_size": 4, "micro_batch_size": 1}
TWO_RANKS = {"strategy": "ddp", "gpus_per_node": 2}
TINY = "tiny_map"
CLI = [sys.executable, "-m", "decompft.launcher.cli"]


def wait_until(
    is_true: Callable[[], bool], run: RunDir | None = None, ranks: list[Rank] | None = None
) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline, "it never came to that"
        for rank, process in enumerate(ranks or []):
            assert process.is_alive() or run is None, run.rank_log(1, rank).read_text()
        time.sleep(0.01)


def start_training(run: RunDir) -> tuple[int, list[Rank]]:
    """An incarnation that has taken a step."""
    incarnation, ranks = start_ranks(run)
    wait_until(lambda: run.metrics_path.exists() and run.metrics_path.stat().st_size > 0, run, ranks)
    return incarnation, ranks


@pytest.mark.parametrize("whom", [[1], [0, 1]], ids=["one_rank", "all_ranks"])
def test_sigterm_to_a_rank_stops_all_of_them_after_a_checkpoint(tmp_path: Path, whom: list[int]) -> None:
    run = make_run(tmp_path, train=ENDLESS, parallel=TWO_RANKS)
    incarnation, ranks = start_training(run)
    for rank in whom:
        os.kill(ranks[rank].pid or 0, signal.SIGTERM)
    ended = end_ranks(run, incarnation, ranks)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert (ended.outcome.result, ended.outcome.exit_code) == ("checkpointed", 75)
    assert 1 <= ended.outcome.step == len(losses(run))
    kept = newest_valid(run.checkpoints_dir)[0]
    assert kept is not None and kept.name == f"step-{ended.outcome.step:08d}"


def test_a_survivor_of_a_killed_rank_ends_soon_though_sigterm_would_have_it_save(tmp_path: Path) -> None:
    run = make_run(tmp_path, train=ENDLESS, parallel=TWO_RANKS, checkpoint={"every_steps": 1})
    incarnation, ranks = start_ranks(run)
    wait_until(lambda: newest_valid(run.checkpoints_dir)[0] is not None, run, ranks)
    ranks[1].kill()
    began = time.monotonic()
    ended = end_ranks(run, incarnation, ranks)
    assert time.monotonic() - began < 20  # torchrun would wait 30 s before it kills
    assert ended.outcome.exit_code == 3
    assert newest_valid(run.checkpoints_dir)[0] is not None


def test_sigterm_ends_a_rank_at_once_when_another_has_failed(tmp_path: Path) -> None:
    run = make_run(tmp_path, train=ENDLESS)
    incarnation, ranks = start_training(run)
    write_rank(run.incarnation_dir(incarnation), 1, Outcome(result="failed", message="x", time_s=1.0))
    ranks[0].terminate()
    end_ranks(run, incarnation, ranks)
    assert ranks[0].exitcode == -signal.SIGTERM
    assert not run.stop_file(incarnation).exists()


def test_training_goes_on_when_the_terminal_of_the_bar_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    main, side = pty.openpty()
    stream = os.fdopen(side, "w")
    console = Console(stream, total_steps=2, start_step=0)
    os.close(main)
    numbers = {"epoch": 0.0, "loss": 1.0, "learning_rate": 0.1, "grad_norm": 1.0, "tokens_per_s": 1.0}
    for step in (1, 2):
        console.step(StepRow(step=step, trained_tokens=1, peak_mem_bytes=1, step_s=1.0, **numbers))
        console.message("saved")
    console.close()
    with pytest.raises(OSError):
        stream.close()


def test_the_launcher_survives_a_closed_pipe(tmp_path: Path) -> None:
    """`decompft launch ... | tee log`, and Ctrl-C takes tee first."""
    reader, writer = os.pipe()
    os.close(reader)
    argv = [*CLI, "launch", TINY, "--dry-run"]
    done = subprocess.run(argv, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_preparing_ends_with_75_and_leaves_no_run(
    tmp_path: Path, number: signal.Signals
) -> None:
    argv = [*CLI, "launch", TINY, "--run-dir", "r"]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
    wait_until(lambda: (tmp_path / "r" / "plan.json").exists())
    child.send_signal(number)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 75, out
    assert f"{number.name}: stopped while preparing; no rank was started" in out
    assert "Traceback" not in out
    assert not (tmp_path / "r" / "plan.json").exists(), "the same command would be refused"


def test_a_signal_while_a_resume_prepares_leaves_an_outcome_that_names_the_checkpoint(tmp_path: Path) -> None:
    argv = [*CLI, "launch", TINY, "train.max_steps=4", "--run-dir", "r"]
    argv += ["train.stop_after_steps=2", "logging.tensorboard=false", "data.cache_dir=cache"]
    env = os.environ | {"DECOMPFT_DEVICE": "cpu"}
    assert subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, timeout=120).returncode == 75
    run = RunDir(tmp_path / "r")
    recorded = run.plan_path.stat().st_mtime_ns
    argv += ["--resume", "auto"]
    child = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env=env
    )
    wait_until(lambda: run.plan_path.stat().st_mtime_ns > recorded)
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 75, out
    assert "SIGTERM: stopped while preparing; no rank was started" in out
    outcome = read_outcome(run.incarnation_dir(2))
    assert outcome is not None and (outcome.result, outcome.step) == ("checkpointed", 2)
    assert "a resume goes on from r/checkpoints/step-00000002" in outcome.message
    rows = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    events = [(row["event"], row.get("checkpoint")) for row in rows if row["incarnation"] == 2]
    assert events == [("start", "r/checkpoints/step-00000002"), ("signal", None), ("end", None)]
    assert rows[-1]["result"] == "checkpointed"
    assert out.splitlines()[-1].startswith("next: decompft launch tiny_map "), out
    assert "--resume auto --run-dir r" in out.splitlines()[-1]
