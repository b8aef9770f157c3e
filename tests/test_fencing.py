"""An older incarnation that still runs, or runs again, cannot write into the run that goes on elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from test_checkpoint import Whole, failures, leftovers, make_whole, save_all, saved, shard
from test_runs import make_plan

from decompft.launcher.checkpoints import list_checkpoints
from decompft.launcher.runs import RunDir
from decompft.launcher.worker import checkpoint
from decompft.launcher.worker.checkpoint import Slice
from decompft.launcher.worker.retention import Retention, rotate


def test_a_stale_incarnation_may_not_commit(tmp_path: Path) -> None:
    (tmp_path / "incarnations/1").mkdir(parents=True)
    good = saved(tmp_path, 100, make_whole())
    (tmp_path / "incarnations/2").mkdir()
    failed = failures(save_all(tmp_path, 200, make_whole()))
    assert "incarnation 2 of the run has started" in failed[0].message
    assert list_checkpoints(tmp_path / "checkpoints") == [good]


def test_an_incarnation_that_gets_stale_while_writing_may_not_commit(tmp_path: Path) -> None:
    def shards(whole: Whole, rank: int, world_size: int) -> Iterator[Slice]:
        (tmp_path / "incarnations/2").mkdir(parents=True, exist_ok=True)  # run lazily: after the first check
        yield from shard(whole, rank, world_size)

    failures(save_all(tmp_path, 100, make_whole(), shards=shards))
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_rank_that_was_frozen_before_its_rename_cannot_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir.create(tmp_path, recipe_text="", plan=make_plan())
    run.next_incarnation()
    good = saved(tmp_path, 100, make_whole())
    move = checkpoint._move_into_place

    def frozen(temp: Path, final: Path) -> None:  # it has looked: there is no newer incarnation
        assert run.next_incarnation() == 2
        move(temp, final)

    monkeypatch.setattr(checkpoint, "_move_into_place", frozen)
    failures(save_all(tmp_path, 200, make_whole()))
    assert list((tmp_path / "checkpoints").iterdir()) == [good]


def test_a_rank_that_was_frozen_after_its_rename_leaves_newer_checkpoints_alone(tmp_path: Path) -> None:
    for step in (100, 200, 300, 400):
        saved(tmp_path, step, make_whole(), incarnation=1 if step < 300 else 2, keep=9)
    before = leftovers(tmp_path), list_checkpoints(tmp_path / "checkpoints")
    rotate(tmp_path / "checkpoints/step-00000200", Retention(newest=1), 1)
    assert (leftovers(tmp_path), list_checkpoints(tmp_path / "checkpoints")) == before
