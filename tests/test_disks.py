"""A disk that is full, fills up, or turns read-only is named, and no checkpoint is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import (
    FSDP,
    GOOD,
    all_whole,
    assert_words,
    content,
    copied,
    go_on,
    is_plain,
    name,
    run_on,
    train_two_ranks,
    until,
    write_recipe,
)
from tiny import losses, make_run
from workers import Ended, end_ranks, run_worker, start_ranks

import decompft.launcher.worker.checkpoint as checkpoint_module
from decompft.launcher.checkpoints import list_checkpoints, newest_valid
from decompft.launcher.cli import main
from decompft.launcher.resume import choose_start
from decompft.launcher.runs import RunDir
from decompft.launcher.worker.restore import load_adapter
from decompft.launcher.worker.tools import prepare
from decompft.launcher.worker.tools.main import run_tool

pytestmark = pytest.mark.usefixtures("on_a_cpu")

Capture = pytest.CaptureFixture[str]


def mounted(place: Path, size: str) -> Iterator[Path]:
    """A file system of its own."""
    place.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root")
    argv = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Of 64 MiB: room for many checkpoints of the tiny run."""
    yield from mounted(tmp_path / "disk", "64m")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Of 400 KiB: room for one checkpoint of the tiny run, not for two."""
    yield from mounted(tmp_path / "disk", "400k")


def remount(disk: Path, options: str, *, patience_s: float = 30) -> None:
    """A file system on which a file is open for writing refuses to become read-only."""
    end = time.monotonic() + patience_s
    while subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], capture_output=True).returncode:
        assert time.monotonic() < end, f"cannot be remounted: {options}"


def fill(disk: Path) -> None:
    with (disk / "ballast").open("wb", buffering=0) as ballast, pytest.raises(OSError):
        while True:
            ballast.write(bytes(4096))


@pytest.mark.dist
def test_a_full_disk_ends_the_run_and_spoils_no_checkpoint(small_disk: Path, tmp_path: Path) -> None:
    made = make_run(tmp_path, "made", checkpoint={"every_steps": 2})
    run = RunDir(shutil.copytree(made.path, small_disk / "run"))
    ended = run_worker(run)
    assert ended.outcome.exit_code == 3
    assert "step-00000004: not saved: No space left on device" in ended.said
    assert "free some space" in ended.said
    assert "last step: 4" in ended.said and is_plain(ended.said + ended.screen)
    kept, skipped = newest_valid(run.checkpoints_dir)
    assert kept is not None and (kept.name, skipped) == ("step-00000002", [])
    # with room again, the same run goes on from there
    whole = RunDir(shutil.copytree(run.path, tmp_path / "whole"))
    assert run_worker(whole, resume=whole.checkpoints_dir / kept.name).outcome.exit_code == 0
    assert len(losses(whole)) == 4


@pytest.mark.dist
def test_a_disk_too_full_for_words_still_ends_in_words(small_disk: Path, tmp_path: Path) -> None:
    made = make_run(tmp_path, "made", checkpoint={"every_steps": 2})
    run = RunDir(shutil.copytree(made.path, small_disk / "run"))
    run.incarnation_dir(1).mkdir(parents=True)  # as next_incarnation would, before the disk is full
    (run.incarnation_dir(1) / "plan.json").write_bytes(run.plan_path.read_bytes())
    run.log_dir(1).mkdir(parents=True)
    run.rank_log(1, 0).touch()
    fill(small_disk)
    ended = run_worker(run, incarnation=1)
    assert ended.outcome.exit_code == 3
    assert "rank 0 ended with exit code 3" in ended.said
    assert "the disk (or the quota) of the run directory is full" in ended.said
    assert is_plain(ended.said + ended.screen)


def test_a_disk_that_fills_while_preparing_is_said_in_words(
    small_disk: Path, tmp_path: Path, capfd: Any
) -> None:
    run = run_on(tmp_path, [GOOD])
    there = RunDir(shutil.copytree(run.path, small_disk / "run"))
    fill(small_disk)
    with pytest.raises(SystemExit) as caught:
        run_tool(prepare.main, [str(there.path)])
    assert caught.value.code == 3
    err = capfd.readouterr().err
    assert "error: " in err and "no space left on the disk" in err and is_plain(err)


def test_a_run_directory_on_a_full_disk_is_refused(small_disk: Path, tmp_path: Path, capsys: Capture) -> None:
    fill(small_disk)
    assert main(["launch", str(write_recipe(tmp_path)), "--run-dir", str(small_disk / "run")]) == 2
    err = capsys.readouterr().err
    assert "the run directory cannot be written (No space left on device)" in err and "--run-dir" in err


@pytest.mark.dist
def test_a_disk_that_fills_under_two_ranks_keeps_what_was_saved(disk: Path, tmp_path: Path) -> None:
    checkpoint = {"every_steps": 1, "keep": 999}
    made = make_run(tmp_path, "made", train={"max_steps": 14}, parallel=FSDP, checkpoint=checkpoint)
    run = RunDir(shutil.copytree(made.path, disk / "run"))
    remount(disk, "size=2m")
    ended = run_worker(run)
    assert ended.outcome.exit_code == 3
    assert_words(ended, "No space left on device", "free some space")
    kept = all_whole(run)
    assert 2 < len(kept) < 14 and kept == [name(step) for step in range(1, len(kept) + 1)]
    remount(disk, "size=64m")  # some space was freed
    assert go_on(run).outcome.exit_code == 0
    assert all_whole(run) == [name(step) for step in range(1, 15)]


@pytest.mark.dist
@pytest.mark.parametrize("when", ["before", "in its middle"])
def test_a_disk_that_fills_at_the_very_end_costs_nothing_but_another_start(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """All is trained and saved; there is no room for the adapter's own folder."""
    made = make_run(tmp_path, "made", checkpoint={"every_steps": 2})
    run = RunDir(shutil.copytree(made.path, disk / "run"))
    owner, function = {
        "before": (checkpoint_module, "save_adapter"),
        "in its middle": (checkpoint_module.shutil, "copytree"),  # the tokenizer, after the tensors
    }[when]
    write = getattr(owner, function)

    def late(source: Path, *args: Any, **kwargs: Any) -> Any:
        fill(disk)
        return write(source, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, late)
        ended = run_worker(run)
    assert ended.outcome.exit_code == 3
    assert_words(ended, "adapter: not saved: ", "No space left on device", "free some space")
    assert not (run.path / "adapter").exists() and not (run.path / ".tmp-adapter").exists()
    (disk / "ballast").unlink()
    assert go_on(run).outcome.exit_code == 0
    tensors, _ = load_adapter(run.path / "adapter")
    assert run_worker(made).outcome.exit_code == 0
    expected, _ = load_adapter(made.path / "adapter")
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.dist
def test_a_disk_that_turns_read_only_under_two_ranks_keeps_what_was_saved(disk: Path, tmp_path: Path) -> None:
    checkpoint = {"every_steps": 5, "keep": 999}
    run = make_run(tmp_path, "run", train={"max_steps": 400}, parallel=FSDP, checkpoint=checkpoint)
    # only the checkpoints lie there: what else a run keeps open for writing would keep the disk from turning
    run.checkpoints_dir.symlink_to(disk)
    incarnation, ranks = start_ranks(run)
    until(lambda: list_checkpoints(disk))
    remount(disk, "ro")
    before = {path.name: content(path) for path in list_checkpoints(disk)}
    ended = end_ranks(run, incarnation, ranks)
    assert ended.outcome.exit_code == 3
    assert_words(ended, "Read-only file system")
    assert {path.name: content(path) for path in list_checkpoints(disk)} == before
    remount(disk, "rw")
    assert go_on_to_a_stop(run, after=max(before)).outcome.exit_code == 75
    assert all_whole(run)[: len(before)] == sorted(before)


def go_on_to_a_stop(run: RunDir, *, after: str) -> Ended:
    """Resume, and stop in order after the next save."""
    start = choose_start(run.read_plan(), run_dir=run.path, resume="auto")
    assert start.checkpoint is not None and start.checkpoint.name == after
    incarnation, ranks = start_ranks(run, resume=start.checkpoint)
    until(lambda: list_checkpoints(run.checkpoints_dir)[-1].name > after)
    run.stop_file(incarnation).touch()
    return end_ranks(run, incarnation, ranks)


@pytest.mark.dist
def test_a_run_on_a_read_only_disk_is_refused_but_can_be_inspected_and_forked(
    disk: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "trained").mkdir()
    trained = train_two_ranks(tmp_path / "trained")
    there = copied(trained, disk)
    remount(disk, "ro")
    recipe = str(trained.path.parent / "recipe.yaml")
    assert main(["launch", recipe, "--run-dir", str(there.path), "--resume", "auto"]) == 2
    err = capsys.readouterr().err
    assert "the run directory cannot be written (Read-only file system)" in err and "--run-dir DIR" in err
    assert is_plain(err)
    assert main(["inspect", "checkpoint", str(there.path)]) == 0
    start = choose_start(there.read_plan(), run_dir=tmp_path / "new", resume=str(there.path))
    assert start.checkpoint == there.checkpoints_dir / name(6) and start.is_new
    sections = {"train": {"max_steps": 8}, "checkpoint": {"every_steps": 2}, "parallel": FSDP}
    fork = make_run(tmp_path, "new", **sections)
    assert run_worker(fork, resume=start.checkpoint).outcome.exit_code == 0
    assert all_whole(fork) == [name(8)]
    assert content(there.path) == content(trained.path)
