"""What is on disk after a rank fails, hangs, or cannot obey: the last completed step, and a run goes on from it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TRAIN, WORLDS, losses, make_run
from workers import end_ranks, run_worker, start_ranks

import decompft.launcher.worker.build as build_module
import decompft.launcher.worker.checkpoint as checkpoint_module
import decompft.launcher.worker.train as train_module
from decompft.launcher.again import next_command
from decompft.launcher.checkpoints import list_checkpoints, newest_valid
from decompft.launcher.resume import choose_start
from decompft.launcher.runs import RunDir
from decompft.launcher.worker.data.ahead import Ahead
from decompft.launcher.worker.metrics import Metrics, StepRow
from decompft.launcher.worker.phases import Phases
from decompft.launcher.worker.pulse import Pulse
from decompft.launcher.worker.restore import load_adapter, open_checkpoint
from decompft.launcher.worker.saver import Saver

pytestmark = pytest.mark.dist

GRACE = {"grace_s": 3.0}


def make(folder: Path, world: str, name: str = "run", **sections: Any) -> RunDir:
    return make_run(
        folder, name, **{"train": TRAIN, "parallel": WORLDS[world], "checkpoint": GRACE, **sections}
    )


def in_step(monkeypatch: pytest.MonkeyPatch, rank: int, step: int, do: Callable[[], None]) -> None:
    """Have one rank do something when it takes the data of the step after `step` completed ones."""
    original = Ahead.step

    def faulty(self: Ahead, index: int) -> Any:
        if index == step and os.environ["RANK"] == str(rank):
            do()
        return original(self, index)

    monkeypatch.setattr(Ahead, "step", faulty)


def fail() -> None:
    raise OSError(5, "Input/output error", "shard-00007.jsonl")


def events(run: RunDir, name: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == name]


def assert_resumes_as_unbroken(run: RunDir, unbroken: RunDir) -> None:
    checkpoint, skipped = newest_valid(run.checkpoints_dir)
    assert checkpoint is not None and not skipped
    assert run_worker(run, resume=checkpoint).outcome.result == "finished"
    assert losses(run) == losses(unbroken)
    tensors, _ = load_adapter(run.path / "adapter")
    expected, _ = load_adapter(unbroken.path / "adapter")
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.fixture
def unbroken(tmp_path: Path, request: pytest.FixtureRequest) -> RunDir:
    run = make(tmp_path, request.getfixturevalue("world"), "unbroken")
    assert run_worker(run).outcome.result == "finished"
    return run


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("world", ["ddp", "fsdp", "zero2", "zero3"])
def test_an_exception_in_one_rank_costs_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: str, rank: int, unbroken: RunDir
) -> None:
    run = make(tmp_path, world)
    with monkeypatch.context() as patch:
        in_step(patch, rank, 3, fail)
        ended = run_worker(run)
    assert ended.outcome.result == "failed" and ended.outcome.rank == rank
    assert "shard-00007.jsonl" in ended.outcome.message
    assert [p.name for p in list_checkpoints(run.checkpoints_dir)] == ["step-00000003"]
    assert [(e["reason"], e["step"]) for e in events(run, "save")] == [("emergency", 3)]
    assert_resumes_as_unbroken(run, unbroken)


@pytest.mark.parametrize("world", ["ddp", "fsdp", "zero2"])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_between_the_agreement_and_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: str, rank: int
) -> None:
    """The other rank takes the step: under ddp it holds all of it, else no step is whole any more."""
    run = make(tmp_path, world, checkpoint={"every_steps": 2, **GRACE})
    at = Pulse.at

    def faulty(self: Pulse, what: str, step: int | None = None) -> None:
        if what == "optimizer" and self.beat.step == 3 and os.environ["RANK"] == str(rank):
            time.sleep(1.0)  # the other one takes it meanwhile
            fail()
        at(self, what, step)

    write = Saver.write

    def slow(self: Saver, *args: Any) -> Path:
        time.sleep(
            1.0
        )  # the save of step 4 that was under way has been called off, and the main thread failed
        return write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Pulse, "at", faulty)
        patch.setattr(Saver, "write", slow)
        began = time.monotonic()
        ended = run_worker(run)
    assert ended.outcome.result == "failed" and ended.outcome.rank == rank
    assert time.monotonic() - began < 60, "nobody waits for the part of a rank that cannot give it"
    newest, skipped = newest_valid(run.checkpoints_dir)
    assert newest is not None and not skipped
    assert newest.name == ("step-00000004" if world == "ddp" else "step-00000002")
    logs = "".join(run.rank_log(1, k).read_text() for k in range(2))
    assert "defect" not in logs
    if world == "ddp":
        assert [e["step"] for e in events(run, "save") if e["reason"] == "emergency"] == [4]
    else:
        # DeepSpeed's update has collectives: it is the other one that does not come out of it
        assert f"were held by rank {rank if world == 'fsdp' else 1 - rank} alone" in logs


@pytest.mark.parametrize("world", ["single"])
def test_an_exception_in_the_only_rank_costs_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: str, unbroken: RunDir
) -> None:
    run = make(tmp_path, world)
    with monkeypatch.context() as patch:
        in_step(patch, 0, 4, fail)
        assert run_worker(run).outcome.result == "failed"
    assert_resumes_as_unbroken(run, unbroken)


@pytest.mark.parametrize("world", ["ddp", "fsdp"])
def test_a_rank_that_was_killed_takes_only_what_it_alone_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: str
) -> None:
    """Under ddp rank 0 has everything; under fsdp half of it is gone, and the checkpoint before stays the newest."""
    run = make(tmp_path, world, checkpoint={"every_steps": 2, **GRACE})
    with monkeypatch.context() as patch:
        in_step(patch, 1, 3, lambda: os.kill(os.getpid(), signal.SIGKILL))
        ended = run_worker(run)
    assert ended.outcome.result == "failed"
    newest, skipped = newest_valid(run.checkpoints_dir)
    assert newest is not None and not skipped
    assert newest.name == ("step-00000003" if world == "ddp" else "step-00000002")


@pytest.mark.parametrize("world", ["ddp"])
def test_a_rank_0_that_dies_before_it_writes_a_row_leaves_no_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: str, unbroken: RunDir
) -> None:
    """Rank 1 completed the step and saved it; the row of it is known there, too."""
    run = make(tmp_path, world)
    write = Metrics.step

    def dying(self: Metrics, row: StepRow) -> None:
        if row.step == 3 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "step", dying)
        assert run_worker(run).outcome.result == "failed"
    assert len(losses(run)) == 2
    assert_resumes_as_unbroken(run, unbroken)


@pytest.mark.parametrize("world", ["ddp"])
def test_the_state_before_a_non_finite_loss_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: str, unbroken: RunDir
) -> None:
    run = make(tmp_path, world)
    with monkeypatch.context() as patch:
        in_step(patch, 1, 4, _poison_next_backward)
        ended = run_worker(run)
    assert ended.outcome.result == "failed" and "the loss is" in ended.outcome.message
    assert [(e["reason"], e["step"]) for e in events(run, "save")] == [("non-finite", 4)]
    assert_resumes_as_unbroken(run, unbroken)


def test_a_loss_that_is_not_finite_costs_no_other_checkpoint_and_a_resume_goes_on_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path, "single", checkpoint={"every_steps": 3, "keep": 1, **GRACE})
    with monkeypatch.context() as patch:
        in_step(patch, 0, 4, _poison_next_backward)
        ended = run_worker(run)
    assert [p.name for p in list_checkpoints(run.checkpoints_dir)] == ["step-00000003", "step-00000004"]
    command = next_command(run, run.read_plan(), ("recipe",), ended.outcome).split()
    start = choose_start(run.read_plan(), run_dir=run.path, resume="auto")
    assert start.checkpoint is not None and start.checkpoint.name == "step-00000003"
    assert any("step-00000004: suspect" in note for note in start.notes)
    # what it says to type works
    at = {name: command[command.index(name) + 1] for name in ("--resume", "--run-dir")}
    slower = {**TRAIN, "learning_rate": TRAIN["learning_rate"] / 2}
    assert f"train.learning_rate={slower['learning_rate']}" in command
    fork = make(tmp_path, "single", "fork", train=slower, checkpoint={"keep": 1})
    begin = choose_start(fork.read_plan(), run_dir=Path(at["--run-dir"]), resume=at["--resume"])
    assert begin.checkpoint == start.checkpoint and any("train.learning_rate" in n for n in begin.notes)
    assert run_worker(fork, resume=begin.checkpoint).outcome.result == "finished"
    # and so does the run itself, whose suspect checkpoint is replaced, and goes
    assert run_worker(run, resume=start.checkpoint).outcome.result == "finished"
    assert [p.name for p in list_checkpoints(run.checkpoints_dir)] == ["step-00000006"]


def _poison_next_backward() -> None:
    """This rank's next loss is not a number."""
    original = torch.Tensor.backward

    def backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.Tensor.backward = original  # type: ignore[method-assign]
        original(self * float("nan"), *args, **kwargs)

    torch.Tensor.backward = backward  # type: ignore[method-assign]


@pytest.mark.parametrize("world", ["ddp", "fsdp"])
def test_a_stop_during_an_evaluation_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: str
) -> None:
    """One rank never comes back from a batch: its thread and the others' write the step, within the grace."""
    data = {"eval_fraction": 0.3}
    run = make(tmp_path, world, train={**TRAIN, "eval_every_steps": 3}, data=data)
    original = train_module.evaluate

    def hanging(model: Any, *args: Any) -> Any:
        if os.environ["RANK"] == "1" and args[2].beat.step == 3:
            run.stop_file(1).touch()
            time.sleep(3600)
        return original(model, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "evaluate", hanging)
        began = time.monotonic()
        incarnation, ranks = start_ranks(run)
        ended = end_ranks(run, incarnation, ranks)
    assert ended.outcome.result == "checkpointed" and ended.outcome.step == 3
    assert "still evaluating" in ended.outcome.message
    assert time.monotonic() - began < 60
    checkpoint = open_checkpoint(newest_valid(run.checkpoints_dir)[0])
    assert checkpoint.step == 3 and checkpoint.state["progress"]["eval_due"]
    assert run_worker(run, resume=checkpoint.path).outcome.result == "finished"
    # the evaluation that was cut short is done first
    assert [e["step"] for e in events(run, "eval")] == [0, 3, 6]


@pytest.mark.parametrize("world", ["ddp", "fsdp"])
def test_a_hang_is_named_and_costs_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: str, unbroken: RunDir
) -> None:
    """Rank 1 never gets its data, rank 0 waits for it in a collective."""
    run = make(tmp_path, world, parallel={**WORLDS[world], "hang_s": 4})
    with monkeypatch.context() as patch:
        in_step(patch, 1, 3, lambda: time.sleep(3600))
        ended = run_worker(run)
    assert ended.outcome.result == "failed" and ended.outcome.cause == "hang" and ended.outcome.rank == 1
    assert "time.sleep(3600)" in (run.path / "events.jsonl").read_text()
    assert [(e["reason"], e["step"]) for e in events(run, "save")] == [("emergency", 3)]
    assert_resumes_as_unbroken(run, unbroken)


def test_a_rank_0_that_is_gone_is_stood_in_for(tmp_path: Path) -> None:
    """Stopped like a dead node: under ddp rank 1 holds the same state, writes all of it and says how it ended."""
    run = make(tmp_path, "ddp", train={**TRAIN, "max_steps": 100_000}, checkpoint={"grace_s": 2.0})
    incarnation, ranks = start_ranks(run)
    deadline = time.monotonic() + 60
    while not run.metrics_path.exists() or len(losses(run)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(ranks[0].pid or 0, signal.SIGSTOP)
    run.stop_file(incarnation).touch()
    ranks[1].join(60)
    assert ranks[1].exitcode == 0
    ranks[0].kill()
    ended = end_ranks(run, incarnation, ranks)
    assert ended.outcome.result == "checkpointed"
    newest, skipped = newest_valid(run.checkpoints_dir)
    assert newest is not None and not skipped
    checkpoint = open_checkpoint(newest)
    assert checkpoint.step == ended.outcome.step >= 3
    kinds = {kind for name in checkpoint.names("param") for kind in checkpoint.kinds(name)}
    assert {"param", "exp_avg", "exp_avg_sq", "step"} <= kinds
    rest = make(
        tmp_path,
        "ddp",
        "rest",
        train={**TRAIN, "max_steps": 100_000, "stop_after_steps": checkpoint.step + 1},
    )
    assert run_worker(rest, resume=newest).outcome.result == "checkpointed"


def test_a_save_under_way_outlives_a_rank_that_fails_in_an_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing newer can be written, so the older one is waited for."""
    run = make(tmp_path, "fsdp", checkpoint={"every_steps": 2, **GRACE})
    write, update = checkpoint_module._write_slices, Phases.observe

    def slow(folder: Path, rank: int, slices: Any) -> None:
        if rank == 0:
            time.sleep(12)  # longer than a failing rank waits for something better
        write(folder, rank, slices)

    def torn(self: Phases, step: int) -> None:
        if step == 2 and os.environ["RANK"] == "1":
            fail()
        update(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "_write_slices", slow)
        patch.setattr(Phases, "observe", torn)
        ended = run_worker(run)
    assert ended.outcome.result == "failed" and ended.outcome.rank == 1
    newest, _ = newest_valid(run.checkpoints_dir)
    assert newest is not None and newest.name == "step-00000002"


@pytest.mark.parametrize("step", [3, 6])
def test_an_evaluation_that_a_stop_came_before_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The stop falls on the step of an evaluation, once the last one."""
    run = make(tmp_path, "ddp", train={**TRAIN, "eval_every_steps": 3}, data={"eval_fraction": 0.3})
    with monkeypatch.context() as patch:
        in_step(patch, 1, step - 1, run.stop_file(1).touch)
        ended = run_worker(run)
    assert ended.outcome.result == "checkpointed" and ended.outcome.step == step
    assert [e["step"] for e in events(run, "eval")] == [0, 3, 6][: step // 3]
    assert run_worker(run, resume=newest_valid(run.checkpoints_dir)[0]).outcome.result == "finished"
    assert [e["step"] for e in events(run, "eval")] == [0, 3, 6]


def test_a_stop_during_an_evaluation_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing hangs: the loop itself looks between two batches, on all ranks alike."""
    run = make(tmp_path, "fsdp", train={**TRAIN, "eval_every_steps": 3}, data={"eval_fraction": 0.5})
    original = train_module.evaluate

    def stopped_meanwhile(model: Any, *args: Any) -> Any:
        if os.environ["RANK"] == "1" and args[2].beat.step == 3:
            run.stop_file(1).touch()
        return original(model, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "evaluate", stopped_meanwhile)
        ended = run_worker(run)
    assert ended.outcome.result == "checkpointed" and ended.outcome.message.startswith(
        "stopped in order after step 3"
    )
    assert [e["step"] for e in events(run, "eval")] == [0]
    assert run_worker(run, resume=newest_valid(run.checkpoints_dir)[0]).outcome.result == "finished"
    assert [e["step"] for e in events(run, "eval")] == [0, 3, 6]


@pytest.mark.parametrize("resumes", [False, True])
def test_a_stop_before_the_first_step_leaves_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumes: bool
) -> None:
    """A rank still loads when the stop comes: there is nothing to save; the outcome says what a resume begins with."""
    checkpoint = None
    run = make(tmp_path, "ddp", train={**TRAIN, "stop_after_steps": 2})
    if resumes:
        run_worker(run)
        checkpoint, _ = newest_valid(run.checkpoints_dir)
    original = build_module.build

    def slow(*args: Any, **kwargs: Any) -> Any:
        if os.environ["RANK"] == "1":
            run.stop_file(2 if resumes else 1).touch()
            time.sleep(3600)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "build", slow)
        began = time.monotonic()
        ended = run_worker(run, resume=checkpoint)
    assert ended.outcome.result == "checkpointed"
    assert "before the first step" in ended.outcome.message
    assert ("step-00000002" if resumes else "from the beginning") in ended.outcome.message
    assert time.monotonic() - began < 30
    assert len(list_checkpoints(run.checkpoints_dir)) == int(resumes)
