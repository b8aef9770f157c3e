"""Checkpoints: any number of ranks writes, any other number reads, and nothing damages the last good one."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from decompft.launcher.checkpoints import list_checkpoints, newest_valid
from decompft.launcher.errors import CheckpointError, RunFailed
from decompft.launcher.worker.checkpoint import (
    Checkpoint,
    Slice,
    load_adapter,
    open_checkpoint,
    save,
)
from decompft.launcher.worker.meeting import AnotherRankFailed, Patience
from decompft.launcher.worker.retention import Retention

Whole = dict[tuple[str, str], Tensor]  # (name, kind) -> the whole tensor
STATE = {"cursor": {"epoch": 1, "sample": 640}, "best_loss": 0.1 + 0.2, "seed": 2**63 - 1}
ADAPTER_JSON = {"method": "map", "rank": 4, "targets": ["q_proj"]}


def make_whole(seed: int = 0) -> Whole:
    g = torch.Generator().manual_seed(seed)
    whole: Whole = {}
    for name, shape in (("layers.0.q.A", (7, 5)), ("layers.0.q.B", (10, 3)), ("layers.0.q.b", (1,))):
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            whole[name, kind] = torch.randn(shape, generator=g)
        whole[name, "step"] = torch.tensor([float(seed)])
    whole["head.weight", "param"] = torch.randn(6, 4, generator=g).to(torch.bfloat16)
    whole["head.weight", "exp_avg_q"] = torch.randint(0, 255, (6, 4), generator=g, dtype=torch.uint8)
    return whole


def bounds(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """ZeRO-3's pieces: ceil(n / W) numbers a rank, also in the middle of a row; the last ranks may have none."""
    chunk = -(-numel // world_size)
    return min(rank * chunk, numel), min((rank + 1) * chunk, numel)


def shard(whole: Whole, rank: int, world_size: int) -> list[Slice]:
    slices = []
    for (name, kind), tensor in whole.items():
        start, stop = bounds(tensor.numel(), rank, world_size)
        shape, piece = tuple(tensor.shape), tensor.view(-1)[start:stop]
        slices.append(Slice(name=name, kind=kind, full_shape=shape, start=start, tensor=piece))
    return slices


def save_all(
    run_dir: Path,
    step: int,
    whole: Whole,
    *,
    world_size: int = 2,
    incarnation: int = 1,
    keep: int = 3,
    reason: str = "interval",
    shards: Callable[[Whole, int, int], Iterable[Slice]] = shard,
    before_commit: Callable[[], None] | None = None,
) -> list[Path | BaseException]:
    """Each rank's call on a thread of its own; rank 0 comes last where something happens `before_commit`."""
    state = run_dir / f"checkpoints/.tmp-step-{step:08d}-inc{incarnation}/state"

    def one(rank: int) -> Path:
        if rank == 0 and before_commit is not None:
            while not all((state / f"rank-{k:05d}.json").exists() for k in range(1, world_size)):
                time.sleep(0.01)
            before_commit()
        return save(
            run_dir, step, shards(whole, rank, world_size), STATE, rank=rank, world_size=world_size,
            incarnation=incarnation, retention=Retention(newest=keep), adapter_json=ADAPTER_JSON,
            reason=reason, patience=Patience(timeout_s=20),
        )  # fmt: skip

    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(one, rank) for rank in range(world_size)]
        return [f.exception() or f.result() for f in futures]


def saved(run_dir: Path, step: int, whole: Whole, **options: int | str) -> Path:
    results = save_all(run_dir, step, whole, **options)  # type: ignore[arg-type]  # only numbers and a reason are passed
    paths = [r for r in results if isinstance(r, Path)]
    assert len(paths) == len(results), results
    return paths[0]


def failures(results: list[Path | BaseException]) -> list[RunFailed]:
    failed = [r for r in results if isinstance(r, RunFailed)]
    assert len(failed) == len(results), results
    return failed


def leftovers(run_dir: Path) -> list[str]:
    return sorted(p.name for p in (run_dir / "checkpoints").iterdir() if not p.name.startswith("step-"))


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def assert_same(path: Path, whole: Whole) -> None:
    opened = open_checkpoint(path)
    for (name, kind), tensor in whole.items():
        found = opened.read(name, kind)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), (name, kind)


def test_world_sizes_2_to_1_to_3_are_bit_equal(tmp_path: Path) -> None:
    whole = make_whole()
    source = saved(tmp_path / "w2", 100, whole, world_size=2)
    for world_size in (1, 3):
        checkpoint = open_checkpoint(source)

        def read(whole: Whole, rank: int, size: int, c: Checkpoint = checkpoint) -> Iterator[Slice]:
            for name, kind in whole:
                shape = c.shape(name, kind)
                start, stop = bounds(math.prod(shape), rank, size)
                piece = c.read_span(name, kind, start, stop)
                yield Slice(name=name, kind=kind, full_shape=shape, start=start, tensor=piece)

        results = save_all(tmp_path / f"w{world_size}", 100, whole, world_size=world_size, shards=read)
        assert all(isinstance(r, Path) for r in results), results
        source = Path(str(results[0]))
        assert len(list((source / "state").glob("*.safetensors"))) == world_size
    assert_same(source, whole)


def test_state_step_names_and_kinds_come_back(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved(tmp_path, 100, make_whole(), incarnation=4))
    assert (checkpoint.step, checkpoint.world_size, checkpoint.incarnation) == (100, 2, 4)
    assert checkpoint.state == STATE
    assert checkpoint.path.name == "step-00000100"
    assert checkpoint.names("exp_avg") == ("layers.0.q.A", "layers.0.q.B", "layers.0.q.b")
    assert checkpoint.kinds("head.weight") == ("exp_avg_q", "param")
    assert leftovers(tmp_path) == []
    assert sorted(p.name for p in checkpoint.path.iterdir()) == [
        "COMPLETE", "adapter.json", "adapter.safetensors", "manifest.json", "state",
    ]  # fmt: skip


def test_newest_valid_takes_what_save_wrote(tmp_path: Path) -> None:
    saved(tmp_path, 100, make_whole())
    newest = saved(tmp_path, 200, make_whole())
    assert newest_valid(tmp_path / "checkpoints") == (newest, [])


def test_a_checkpoint_is_an_adapter_with_whole_parameters(tmp_path: Path) -> None:
    whole = make_whole()
    tensors, description = load_adapter(saved(tmp_path, 100, whole, world_size=3))
    assert set(tensors) == {name for name, kind in whole if kind == "param"}
    assert all(torch.equal(t, whole[name, "param"]) for name, t in tensors.items())
    assert description.items() >= ADAPTER_JSON.items()


def test_a_part_of_a_tensor_reads_only_its_file(tmp_path: Path) -> None:
    whole = make_whole()
    checkpoint = open_checkpoint(saved(tmp_path, 100, whole, world_size=2))
    (checkpoint.path / "state/rank-00000.safetensors").unlink()
    found = checkpoint.read_span("layers.0.q.B", "param", 17, 29)
    assert torch.equal(found, whole["layers.0.q.B", "param"].view(-1)[17:29])


def test_unknown_tensor_and_wrong_span_are_told(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved(tmp_path, 100, make_whole()))
    with pytest.raises(CheckpointError, match="holds no exp_avg of head.weight"):
        checkpoint.read_span("head.weight", "exp_avg", 0, 1)
    with pytest.raises(CheckpointError, match=r"shape \(10, 3\), not the numbers 0..31"):
        checkpoint.read_span("layers.0.q.B", "param", 0, 31)


FILES = ("state/rank-00001.safetensors", "adapter.safetensors", "adapter.json", "manifest.json")


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, 100, make_whole())
    flip(path / name, (path / name).stat().st_size * 3 // 4)
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(path)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_found(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, 100, make_whole())
    os.truncate(path / name, (path / name).stat().st_size - 3)
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(path)


@pytest.mark.parametrize("name", (*FILES, "COMPLETE"))
def test_a_missing_file_is_found(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, 100, make_whole())
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(path)


def test_a_manifest_with_another_state_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path, 100, make_whole())
    manifest = (path / "manifest.json").read_text()
    assert manifest.count('"sample": 640') == 1
    (path / "manifest.json").write_text(manifest.replace('"sample": 640', '"sample": 641'))
    with pytest.raises(CheckpointError, match="manifest.json is damaged"):
        open_checkpoint(path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, 100, make_whole())
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "version": 3}))
    with pytest.raises(CheckpointError, match="newer decompft"):
        open_checkpoint(path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        open_checkpoint(path / "nothing")


@pytest.mark.parametrize(
    ("starts", "message"),
    [((0, 5), "numbers 4 to 4 of 8 are missing"), ((0, 3), "numbers 3 to 3 of 8 are given twice"),
     ((0, 0), "numbers 0 to 3 of 8 are given twice"), ((1, 5), "numbers 0 to 0 of 8 are missing")],
)  # fmt: skip
def test_spans_that_do_not_cover_a_tensor_are_not_saved(
    tmp_path: Path, starts: tuple[int, int], message: str
) -> None:
    def shards(_: Whole, rank: int, __: int) -> list[Slice]:
        return [Slice(name="A", kind="param", full_shape=(4, 2), start=starts[rank], tensor=torch.zeros(4))]

    first, second = failures(save_all(tmp_path, 100, {}, shards=shards))
    assert message in first.message
    assert "another rank" in second.message
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_ranks_that_disagree_about_a_shape_are_not_saved(tmp_path: Path) -> None:
    def shards(_: Whole, rank: int, __: int) -> list[Slice]:
        rows = 4 + rank
        return [Slice(name="A", kind="param", full_shape=(rows, 2), start=0, tensor=torch.zeros(rows * 2))]

    assert "disagree" in failures(save_all(tmp_path, 100, {}, shards=shards))[0].message


def test_what_does_not_read_back_is_not_committed(tmp_path: Path) -> None:
    good = saved(tmp_path, 100, make_whole())
    state = tmp_path / "checkpoints/.tmp-step-00000200-inc1/state/rank-00001.safetensors"
    first, _ = failures(save_all(tmp_path, 200, make_whole(), keep=1, before_commit=lambda: flip(state, -1)))
    assert "does not read back" in first.message and "rank-00001" in first.message
    assert list((tmp_path / "checkpoints").iterdir()) == [good]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    can_mount = os.geteuid() == 0 and shutil.which("mount") is not None
    if not can_mount or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_rank_whose_folder_the_leader_has_cleared_blames_another(tmp_path: Path) -> None:
    def slices() -> Iterator[Slice]:
        shutil.rmtree(tmp_path / "checkpoints/.tmp-step-00000100-inc1")
        yield from shard(make_whole(), 1, 2)

    with pytest.raises(AnotherRankFailed, match="step-00000100: not saved"):
        save(
            tmp_path, 100, slices(), STATE, rank=1, world_size=2, incarnation=1, retention=Retention(newest=3),
            adapter_json=ADAPTER_JSON, reason="interval", patience=Patience(timeout_s=20),
        )  # fmt: skip


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill proves nothing of a power cut: what a process wrote outlives it in the kernel's memory."""
    flushed: list[Path] = []
    missing: dict[str, set[str]] = {}
    fsync, rename = os.fsync, Path.rename

    def remembering(handle: int) -> None:
        fsync(handle)
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")))

    def checking(path: Path, target: Path) -> Path:
        if path.is_dir():
            inside = {p for p in (path, *path.rglob("*")) if p not in flushed}
            missing[Path(target).name] = {str(p.relative_to(path)) for p in inside}
        moved = rename(path, target)
        flushed.extend([m for m in (Path(target),) if path in flushed])
        return moved

    monkeypatch.setattr(os, "fsync", remembering)
    monkeypatch.setattr(Path, "rename", checking)
    final = saved(tmp_path, 100, make_whole())
    assert missing == {final.name: set()}
    assert final.parent in flushed[flushed.index(final) :]  # and the name itself


def test_a_full_disk_fails_every_rank_and_keeps_the_old(small_disk: Path) -> None:
    good = saved(small_disk, 100, make_whole())
    whole = {("A", "param"): torch.zeros(1000, 100)}  # 400 kB
    failed = failures(save_all(small_disk, 200, whole, world_size=3))
    assert any("No space left on device" in f.message for f in failed)
    assert all("not saved" in f.message and "step-00000200" in f.message for f in failed)
    # a rank that fails while rank 0 clears the folder may leave a word in it, which the next save clears
    assert list_checkpoints(small_disk / "checkpoints") == [good]
    assert_same(good, make_whole())


def test_a_disk_that_fills_at_commit_fails_every_rank(small_disk: Path) -> None:
    # the state fits (128 kB), the assembled adapter beside it (128 kB more) does not
    whole = {("A", "param"): torch.zeros(320, 100)}
    failed = failures(save_all(small_disk, 200, whole))
    assert "No space left on device" in failed[0].message
    assert list((small_disk / "checkpoints").iterdir()) == []


def test_a_read_only_disk_is_told(small_disk: Path) -> None:
    good = saved(small_disk, 100, make_whole())
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "Read-only file system" in failures(save_all(small_disk, 200, make_whole()))[0].message
    assert_same(good, make_whole())


def test_what_a_killed_save_left_is_cleaned_by_the_next(tmp_path: Path) -> None:
    good = saved(tmp_path, 100, make_whole())
    # killed after the last byte and before the rename
    shutil.copytree(good, good.with_name(".tmp-step-00000200-inc1"))
    assert newest_valid(tmp_path / "checkpoints")[0] == good
    saved(tmp_path, 200, make_whole(1), incarnation=2)
    assert leftovers(tmp_path) == []
    assert_same(tmp_path / "checkpoints/step-00000200", make_whole(1))


def test_the_same_step_again_replaces(tmp_path: Path) -> None:
    saved(tmp_path, 100, make_whole())
    again = saved(tmp_path, 100, make_whole(1), incarnation=2)
    assert_same(again, make_whole(1))
    assert open_checkpoint(again).incarnation == 2
    assert leftovers(tmp_path) == []


def test_a_replacement_that_was_cut_short_gives_the_old_one_back(tmp_path: Path) -> None:
    old = saved(tmp_path, 100, make_whole())
    old.rename(old.with_name(".old-step-00000100"))
    new = saved(tmp_path, 200, make_whole(1), incarnation=2)
    assert list_checkpoints(tmp_path / "checkpoints") == [old, new]
    assert_same(old, make_whole())
    assert leftovers(tmp_path) == []


def test_keep_2_keeps_the_newest_two(tmp_path: Path) -> None:
    paths = [saved(tmp_path, step, make_whole(step), keep=2) for step in (100, 200, 300, 1000)]
    assert list_checkpoints(tmp_path / "checkpoints") == paths[-2:]


def test_rotation_does_not_count_damaged_checkpoints(tmp_path: Path) -> None:
    good = saved(tmp_path, 100, make_whole(), keep=2)
    broken = saved(tmp_path, 200, make_whole(), keep=2)
    os.truncate(broken / "state/rank-00001.safetensors", 10)
    new = saved(tmp_path, 300, make_whole(), keep=2)
    assert list_checkpoints(tmp_path / "checkpoints") == [good, new]


def test_a_failed_save_deletes_nothing_even_with_keep_1(tmp_path: Path) -> None:
    good = saved(tmp_path, 100, make_whole(), keep=1)

    def shards(whole: Whole, rank: int, world_size: int) -> list[Slice]:
        return shard(whole, rank, world_size)[: 3 if rank else None]

    failures(save_all(tmp_path, 200, make_whole(), keep=1, shards=shards))
    assert newest_valid(tmp_path / "checkpoints") == (good, [])


def test_checkpoints_after_the_resumed_step_are_set_aside(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        saved(tmp_path, step, make_whole(step))
    new = saved(tmp_path, 150, make_whole(150), incarnation=2)  # resumed from step 100
    assert newest_valid(tmp_path / "checkpoints") == (new, [])
    assert leftovers(tmp_path) == ["abandoned-step-00000200-inc2", "abandoned-step-00000300-inc2"]
    assert_same(tmp_path / "checkpoints/abandoned-step-00000300-inc2", make_whole(300))
