"""Saves run beside training: the loop goes on while one is written, waits before the next, and ends with its error."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import WORLDS, losses, make_run
from workers import run_worker

from decompft.launcher.checkpoint_survey import size_of
from decompft.launcher.checkpoints import list_checkpoints, newest_valid
from decompft.launcher.runs import RunDir
from decompft.launcher.worker import checkpoint as checkpoint_module
from decompft.launcher.worker.restore import load_adapter, open_checkpoint

pytestmark = pytest.mark.dist

TRAIN = {"max_steps": 8, "learning_rate": 0.01, "global_batch_size": 4, "micro_batch_size": 1}


def events(run: RunDir, name: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == name]


@pytest.mark.parametrize("world", ["single", "fsdp"])
def test_training_goes_on_while_a_save_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: str
) -> None:
    run = make_run(tmp_path, train=TRAIN, parallel=WORLDS[world], checkpoint={"every_steps": 3, "keep": 9})
    original = checkpoint_module._write_slices

    def late(folder: Path, *args: Any) -> None:
        """The first save is not written before two more steps were taken; the second only after the first."""
        end = time.monotonic() + 60
        if "00000003" in str(folder):
            while len(run.metrics_path.read_text().splitlines()) < 5:
                assert time.monotonic() < end, "training waits for a save"
                time.sleep(0.01)
        else:
            assert (run.checkpoints_dir / "step-00000003").exists()
        original(folder, *args)

    monkeypatch.setattr(checkpoint_module, "_write_slices", late)
    assert run_worker(run).outcome.result == "finished"
    monkeypatch.undo()
    saved = events(run, "save")
    assert [s["step"] for s in saved] == [3, 6, 8]
    assert saved[0]["save_s"] > saved[0]["stall_s"]
    assert all(s["reason"] in ("interval", "end") for s in saved)
    # of all ranks, as `inspect checkpoint` counts them
    assert [s["bytes"] for s in saved] == [size_of(run.path / s["path"])[0] for s in saved]
    # what was saved is the state of its step, though steps were taken before it was written
    rest = make_run(tmp_path, "rest", train=TRAIN, parallel=WORLDS[world])
    run_worker(rest, resume=run.checkpoints_dir / "step-00000003")
    assert losses(rest) == losses(run)[3:]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_that_fails_ends_the_run_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    train = {**TRAIN, "max_steps": 200}
    run = make_run(tmp_path, train=train, parallel=WORLDS["fsdp"], checkpoint={"every_steps": 2})
    original = checkpoint_module._write_slices

    def full(folder: Path, who: int, slices: Any) -> None:
        if who == rank and "00000004" in str(folder):
            raise OSError(28, "No space left on device", str(folder))
        original(folder, who, slices)

    monkeypatch.setattr(checkpoint_module, "_write_slices", full)
    ended = run_worker(run)
    assert ended.outcome.result == "failed" and ended.outcome.rank == rank
    assert "step-00000004: not saved: No space left" in ended.outcome.message
    assert [p.name for p in list_checkpoints(run.checkpoints_dir)] == ["step-00000002"]
    # the folder that was begun is gone
    assert os.listdir(run.checkpoints_dir) == ["step-00000002"]


def test_the_best_checkpoint_outlives_newer_ones(tmp_path: Path) -> None:
    """The learning rate is absurd from the start: the first evaluation is the best."""
    train = {**TRAIN, "max_steps": 8, "learning_rate": 5.0, "eval_every_steps": 2}
    run = make_run(
        tmp_path, train=train, data={"eval_fraction": 0.3},
        checkpoint={"every_steps": 2, "keep": 1, "keep_best": 1},
    )  # fmt: skip
    assert run_worker(run).outcome.result == "finished"
    judged = {e["step"]: e["loss"] for e in events(run, "eval") if e["step"]}
    best = min(judged, key=lambda step: judged[step])
    assert {p.name for p in list_checkpoints(run.checkpoints_dir)} == {f"step-{best:08d}", "step-00000008"}


@pytest.mark.parametrize(("before", "after", "is_equal"), [("fsdp", "fsdp", True), ("fsdp", "single", False)])
def test_8_bit_moments_resume_bit_for_bit_where_rows_are_cut_alike(
    tmp_path: Path, before: str, after: str, is_equal: bool
) -> None:
    train = {**TRAIN, "max_steps": 6, "optimizer": "adamw8bit"}
    wide = {"config": {**make_config(), "hidden_size": 256, "intermediate_size": 512}, "weights": "random"}
    adapter = {"method": "lora", "rank": 32, "alpha": 32.0}
    options: dict[str, Any] = {"model": wide, "adapter": adapter}
    unbroken = make_run(tmp_path, "unbroken", train=train, parallel=WORLDS[before], **options)
    run_worker(unbroken)
    first = make_run(
        tmp_path, "first", train={**train, "stop_after_steps": 3}, parallel=WORLDS[before], **options
    )
    run_worker(first)
    checkpoint = open_checkpoint(newest_valid(first.checkpoints_dir)[0])
    kinds = {k for n in checkpoint.names("param") for k in checkpoint.kinds(n)}
    assert any(k.startswith("raw") and k.endswith("exp_avg.codes") for k in kinds)
    rest = make_run(tmp_path, "rest", train=train, parallel=WORLDS[after], **options)
    ended = run_worker(rest, resume=checkpoint.path)
    assert ("quantized again" in ended.screen) == (not is_equal)
    if is_equal:
        assert losses(first) + losses(rest) == losses(unbroken)
        tensors, _ = load_adapter(rest.path / "adapter")
        expected, _ = load_adapter(unbroken.path / "adapter")
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def make_config() -> dict[str, Any]:
    from tiny import LLAMA

    return dict(LLAMA)
