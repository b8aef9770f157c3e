"""Runs of two ranks in hostile places: damaged checkpoints, another base, another recipe; disks: test_disks.py.

Each is named in words, the older checkpoints stay as they were, and the run goes on once the place is a good one.
The ranks are the worker's own main in forked processes; one test goes through the whole of `decompft launch`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hostile import (
    FSDP,
    all_whole,
    assert_words,
    content,
    copied,
    go_on,
    is_plain,
    local_model,
    name,
    train_two_ranks,
)
from safetensors.torch import load_file, save_file
from test_checkpoint import flip
from test_launch_end_to_end import TWO, Launch
from tiny import LLAMA, make_run
from workers import run_worker

from decompft.launcher.checkpoints import FORMAT_VERSION, list_checkpoints
from decompft.launcher.cli import main
from decompft.launcher.runs import RunDir
from decompft.launcher.worker.tokenizers import byte_tokenizer, save_tokenizer
from decompft.launcher.worker.tools import prepare

pytestmark = pytest.mark.usefixtures("on_a_cpu")

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Never changed."""
    return train_two_ranks(tmp_path_factory.mktemp("trained"))


# -- damaged checkpoints --


def lose_a_shard(checkpoint: Path) -> None:
    (checkpoint / "state/rank-00001.safetensors").unlink()


def flip_a_bit(checkpoint: Path) -> None:
    shard = checkpoint / "state/rank-00000.safetensors"
    flip(shard, shard.stat().st_size * 3 // 4)


def write_newer(checkpoint: Path) -> None:
    """As a later version of decompft would: sealed, and of another format."""
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    text = json.dumps({**manifest, "version": FORMAT_VERSION + 1}).encode()
    (checkpoint / "manifest.json").write_bytes(text)
    (checkpoint / "COMPLETE").write_text(hashlib.sha256(text).hexdigest() + "\n")


def cut_short(checkpoint: Path) -> None:
    (checkpoint / "COMPLETE").unlink()


def fail_to_read(checkpoint: Path) -> None:
    """A folder in a file's place: any error of reading, where no medium can be made to fail."""
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "manifest.json").mkdir()


DAMAGES = {
    lose_a_shard: "state/rank-00001.safetensors is missing",
    flip_a_bit: "state/rank-00000.safetensors is damaged: its sha256 is not the manifest's",
    write_newer: f"it was written by a newer version of decompft (format {FORMAT_VERSION + 1})",
    cut_short: "it has no COMPLETE file: the save was cut short",
    fail_to_read: "manifest.json cannot be read from the disk (Is a directory)",
}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_resume_auto_names_each_damaged_checkpoint_and_goes_on_from_the_one_before(
    tmp_path: Path, capsys: Capture
) -> None:
    launch = Launch(tmp_path)
    words = [*TWO, "train.max_steps=14", "checkpoint.every_steps=2", "checkpoint.keep=99"]
    assert launch(*words, "train.stop_after_steps=12") == 75
    first = {row["step"]: row["loss"] for row in launch.rows()}
    checkpoints = launch.run.checkpoints_dir
    oldest = content(checkpoints / name(2))
    steps = dict(zip(DAMAGES, (12, 10, 8, 6, 4), strict=True))
    for damage, step in steps.items():
        damage(checkpoints / name(step))
    assert main(["inspect", "checkpoint", str(launch.run.path)]) == 3
    shown = capsys.readouterr().out
    assert launch(*words, "--resume", "auto") == 0
    for damage, why in DAMAGES.items():
        assert f"skipped checkpoint {name(steps[damage])}: {why}" in launch.text
        assert f"{name(steps[damage])}: " in shown and why in shown
    assert (
        f"resuming from run/checkpoints/{name(2)}" in launch.text
        and f"newest whole one is {name(2)}" in shown
    )
    # the lost steps again, bit for bit, and the rest
    losses = {row["step"]: row["loss"] for row in launch.rows()}
    assert list(losses) == list(range(1, 15))
    assert {step: losses[step] for step in first} == first
    assert content(checkpoints / name(2)) == oldest
    assert all_whole(launch.run) == [name(step) for step in range(2, 15, 2)]


@pytest.mark.dist
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_that_was_asked_for_is_refused(
    damage: Callable[[Path], None], trained: RunDir, tmp_path: Path, capsys: Capture
) -> None:
    run = copied(trained, tmp_path)
    damage(run.checkpoints_dir / name(6))
    before = content(tmp_path)
    argv = ["launch", str(trained.path.parent / "recipe.yaml"), "--run-dir", str(tmp_path / "new")]
    assert main([*argv, "--resume", str(run.checkpoints_dir / name(6))]) == 2
    err = capsys.readouterr().err
    assert (
        f"{name(6)}: {DAMAGES[damage]}" in err and "hint: choose another checkpoint" in err and is_plain(err)
    )
    assert content(tmp_path) == before, "something was written"


@pytest.mark.dist
def test_where_nothing_is_whole_it_says_so_for_each_and_starts_nothing(
    trained: RunDir, tmp_path: Path, capsys: Capture
) -> None:
    run = copied(trained, tmp_path)
    for folder in list_checkpoints(run.checkpoints_dir):
        lose_a_shard(folder)
    before = content(run.path)
    argv = ["launch", str(trained.path.parent / "recipe.yaml"), "--run-dir", str(run.path)]
    assert main([*argv, "--resume", "auto"]) == 2
    err = capsys.readouterr().err
    assert all(f"{name(step)}: state/rank-00001" in err for step in (2, 4, 6))
    assert "all of its checkpoints are damaged" in err and "--run-dir NEW" in err and is_plain(err)
    (run.path / "lock").unlink(missing_ok=True)
    assert content(run.path) == before


def test_a_lost_plan_is_no_reason_to_train_over_what_was_saved(
    trained: RunDir, tmp_path: Path, capsys: Capture
) -> None:
    run = copied(trained, tmp_path)
    run.plan_path.unlink()
    before = content(run.path)
    argv = ["launch", str(trained.path.parent / "recipe.yaml"), "--run-dir"]
    assert main([*argv, str(run.path), "--resume", "auto"]) == 2
    err = capsys.readouterr().err
    newest = run.checkpoints_dir / name(6)
    assert "no plan.json" in err and f"--resume {newest} --run-dir NEW" in err and is_plain(err)
    assert content(run.path) == before
    assert main([*argv, str(tmp_path / "new"), "--resume", str(newest), "--dry-run"]) == 0  # as it says
    assert main(["report", str(run.path)]) == 0  # from the copy that its incarnation keeps
    assert f"its copy is used: {run.incarnation_dir(1)}/plan.json" in capsys.readouterr().err


def test_checkpoints_of_a_newer_version_are_not_trained_over(
    trained: RunDir, tmp_path: Path, capsys: Capture
) -> None:
    """Nothing is damaged, so nothing is started afresh beside them and nothing rotated away."""
    run = copied(trained, tmp_path)
    for folder in list_checkpoints(run.checkpoints_dir):
        manifest = json.loads((folder / "manifest.json").read_bytes())
        text = json.dumps({**manifest, "version": FORMAT_VERSION + 1}).encode()
        (folder / "manifest.json").write_bytes(text)
        (folder / "COMPLETE").write_text(hashlib.sha256(text).hexdigest())
    before = content(run.path)
    argv = [
        "launch",
        str(trained.path.parent / "recipe.yaml"),
        "--run-dir",
        str(run.path),
        "--resume",
        "auto",
    ]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert "nothing to resume from" in err and "newer version of decompft" in err and is_plain(err)
    assert content(run.path) == before


@pytest.mark.dist
def test_other_training_data_are_refused_and_a_fork_may_have_them(tmp_path: Path) -> None:
    run = make_run(tmp_path, train={"max_steps": 4, "stop_after_steps": 2})
    assert run_worker(run).outcome.result == "checkpointed"
    newest = list_checkpoints(run.checkpoints_dir)[-1]
    data = tmp_path / "data.jsonl"
    lines = data.read_text().splitlines()
    data.write_text("\n".join(reversed(lines)) + "\n")
    prepare.main([str(run.path)])
    ended = run_worker(run, resume=newest)
    assert ended.outcome.result == "user_error" and "data" in ended.outcome.message
    assert "put the data back" in ended.said
    fork = make_run(tmp_path, "fork", train={"max_steps": 4})
    assert run_worker(fork, resume=newest).outcome.result == "finished"


# -- another base, another recipe --


@pytest.mark.dist
def test_another_base_is_refused_by_two_ranks_and_the_right_one_goes_on(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**{key: value for key, value in LLAMA.items() if key != "model_type"})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    save_tokenizer(byte_tokenizer(), tmp_path / "llama")
    base, sections = local_model(tmp_path, tmp_path / "llama")
    train = {"max_steps": 6, "stop_after_steps": 4}
    run = make_run(tmp_path, train=train, parallel=FSDP, checkpoint={"every_steps": 2}, **sections)
    assert run_worker(run).outcome.exit_code == 75
    before = content(run.checkpoints_dir)
    right = (base / "model.safetensors").read_bytes()
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    prepare.main([str(run.path)])  # as launch does
    ended = go_on(run)
    assert ended.outcome.exit_code == 2
    assert_words(
        ended, "cannot train: rank ", f"{name(4)}: was trained over another base: sha256 was", "hint: "
    )
    assert content(run.checkpoints_dir) == before
    (base / "model.safetensors").write_bytes(right)
    prepare.main([str(run.path)])
    run.plan_path.write_text(
        run.plan_path.read_text().replace('"stop_after_steps": 4', '"stop_after_steps": null')
    )
    assert go_on(run).outcome.exit_code == 0
    assert all_whole(run) == [name(2), name(4), name(6)]


CHANGES = {
    "adapter.rank=8": "adapter.rank: was 4, now 8",
    "adapter.method=lora": 'adapter.method: was "map", now "lora"',
    "adapter.alpha=16": "adapter.alpha: was 8.0, now 16.0",
    "adapter.targets=[q_proj]": 'adapter.targets: was "all-linear", now absent',
    "train.seed=7": "train.seed: was 0, now 7",
}


@pytest.mark.dist
@pytest.mark.parametrize("change", [*CHANGES, "quantization.format=int8", "train.learning_rate=0.5"])
def test_another_recipe_is_refused_by_the_key_and_nothing_is_touched(
    change: str, trained: RunDir, capsys: Capture
) -> None:
    before = content(trained.path)
    recipe = str(trained.path.parent / "recipe.yaml")
    assert main(["launch", recipe, change, "--run-dir", str(trained.path), "--resume", "auto"]) == 2
    err = capsys.readouterr().err
    words = CHANGES.get(change, f"{change.partition('=')[0]}: was ")
    assert "cannot resume with another recipe" in err and words in err and is_plain(err)
    assert content(trained.path) == before


@pytest.mark.dist
@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_that_was_copied_out_of_its_run_still_refuses_another_adapter(
    change: str, trained: RunDir, tmp_path: Path, capsys: Capture
) -> None:
    bare = shutil.copytree(trained.checkpoints_dir / name(6), tmp_path / name(6))
    recipe = str(trained.path.parent / "recipe.yaml")
    argv = ["launch", recipe, "--run-dir", str(tmp_path / "new"), "--resume", str(bare), "--dry-run"]
    assert main([*argv[:2], change, *argv[2:]]) == 2
    err = capsys.readouterr().err
    assert CHANGES[change] in err and is_plain(err)
    assert main(argv) == 0
    assert f"forking {tmp_path} at {name(6)}" in capsys.readouterr().out
