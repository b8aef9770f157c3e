"""What a user gets wrong, or a disk does: words, exit code 2 or 3, no traceback, and nothing lost.

In the order in which it is found: by `launch` before it starts anything, by `prepare`, by the ranks (which
are forked: marked `dist`). Disks: test_disks.py.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import (
    GOOD,
    Sections,
    content,
    is_plain,
    local_model,
    planned,
    run_on,
    write_recipe,
)
from safetensors.torch import load_file, save_file
from tiny import LLAMA, losses, make_run
from workers import run_worker

from decompft.launcher.checkpoints import newest_valid
from decompft.launcher.cli import main
from decompft.launcher.runs import RunDir
from decompft.launcher.worker.tokenizers import byte_tokenizer, save_tokenizer
from decompft.launcher.worker.tools import prepare
from decompft.launcher.worker.tools.main import run_tool

pytestmark = pytest.mark.usefixtures("on_a_cpu")

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real checkpoint of the tiny model; copied before it is spoilt."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "llama"
    config = LlamaConfig(**{key: value for key, value in LLAMA.items() if key != "model_type"})
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(byte_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run of four steps with checkpoints after two and four; never changed."""
    run = planned(tmp_path_factory.mktemp("trained"), checkpoint={"every_steps": 2})
    prepare.main([str(run.path)])
    assert run_worker(run).outcome.exit_code == 0
    return run


# -- found before anything is started --


def no_data(folder: Path, _: Path) -> Sections:
    return {"data": {"train": [{"path": str(folder / "nowhere.jsonl")}]}}


def empty_data(folder: Path, _: Path) -> Sections:
    (folder / "empty.jsonl").write_text("\n")
    return {"data": {"train": [{"path": str(folder / "empty.jsonl")}]}}


def unknown_model_type(_: Path, __: Path) -> Sections:
    return {"model": {"config": {**LLAMA, "model_type": "llamma"}}}


def wrong_dtype(_: Path, __: Path) -> Sections:
    return {"quantization": {"compute": "float16"}}


def too_little_memory(_: Path, __: Path) -> Sections:
    return {"parallel": {"gpu_memory_gib": 0.25}}


def truncated_weights(folder: Path, model_dir: Path) -> Sections:
    copy, sections = local_model(folder, model_dir)
    os.truncate(copy / "model.safetensors", 100_000)
    return sections


def wrong_shape(folder: Path, model_dir: Path) -> Sections:
    copy, sections = local_model(folder, model_dir)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(64, 64)
    save_file(tensors, copy / "model.safetensors")
    return sections


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_data, "nowhere.jsonl: no such file"),
        (empty_data, "empty.jsonl: the data set is empty"),
        (unknown_model_type, "did you mean llama?"),
        (wrong_dtype, "quantization.compute: found the text 'float16', expected one of bfloat16, float32"),
        (too_little_memory, "needs 0.6 GiB a rank, this machine's memory has 0.2 GiB"),
        (truncated_weights, "model.safetensors: truncated: 100000 bytes, the header promises "),
        (wrong_shape, "model.layers.1.mlp.up_proj.weight has shape [64, 64], the model's config says ["),
    ],
)
def test_what_can_be_known_before_the_start_is_refused_there(
    spoil: Any, words: str, tmp_path: Path, model_dir: Path, capsys: Capture
) -> None:
    recipe = write_recipe(tmp_path, **spoil(tmp_path, model_dir))
    before = content(tmp_path)
    assert main(["launch", str(recipe), "--run-dir", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "\n  hint: " in err, err
    assert words in err
    assert is_plain(err)
    assert content(tmp_path) == before, "something was written"


def test_a_plan_for_gpus_is_not_launched_where_there_are_none(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DECOMPFT_DEVICE")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    recipe = write_recipe(tmp_path, parallel={"gpu_memory_gib": 80.0})
    assert main(["plan", str(recipe)]) == 0  # a login node may plan for them
    assert main(["launch", str(recipe), "--run-dir", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert "error: parallel.gpu_memory_gib: the plan is for GPUs, and this machine has none" in err
    assert "decompft sbatch" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.dist
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "this run directory exists already"),
        (["--resume", "auto", "train.learning_rate=0.5"], "train.learning_rate: was 0.01, now 0.5"),
        (
            ["--resume", "auto", "model.config={model_type: llama}"],
            "model.config.hidden_size: was 64, now absent",
        ),
    ],
    ids=["exists", "other_recipe", "other_model"],
)
def test_a_run_that_exists_is_refused_and_left_as_it_was(
    options: list[str], words: str, trained: RunDir, capsys: Capture
) -> None:
    before = content(trained.path)
    recipe = trained.path.parent / "recipe.yaml"
    assert main(["launch", str(recipe), "--run-dir", str(trained.path), *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and words in err and "\n  hint: " in err and is_plain(err)
    assert content(trained.path) == before


@pytest.mark.dist
def test_a_damaged_checkpoint_is_not_forked(trained: RunDir, tmp_path: Path, capsys: Capture) -> None:
    copy = RunDir(shutil.copytree(trained.path, tmp_path / "copy"))
    newest = copy.checkpoints_dir / "step-00000004"
    os.truncate(newest / "adapter.safetensors", 1000)
    recipe = trained.path.parent / "recipe.yaml"
    argv = ["launch", str(recipe), "--run-dir", str(tmp_path / "new")]
    assert main([*argv, "--resume", str(newest)]) == 2
    err = capsys.readouterr().err
    assert "step-00000004: adapter.safetensors has 1000 bytes, the manifest says" in err
    assert not (tmp_path / "new").exists()
    assert main([*argv, "--resume", str(copy.path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "skipped checkpoint step-00000004" in out and "at step-00000002" in out


# -- found while the data is read --


def refused(run: RunDir, capsys: Capture) -> str:
    """What `prepare` says of a user's mistake."""
    with pytest.raises(SystemExit) as caught:
        run_tool(prepare.main, [str(run.path)])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and not (run.path / "prepared.json").exists()
    assert "error: " in err and "\n  hint: " in err and is_plain(err)
    return err


LONG = {"prompt": "one", "completion": "two" * 40}


@pytest.mark.parametrize(
    ("records", "data", "words"),
    [
        ([GOOD, LONG], {}, "mine.jsonl:2: 124 tokens, but data.sequence_length is 64"),
        ([LONG, LONG], {"too_long": "drop"}, "all 2 records are longer than data.sequence_length"),
        (
            [GOOD, {"prompt": "one" * 40, "completion": "two"}],
            {"too_long": "truncate"},
            "mine.jsonl:2: no trained token: its prompt alone fills the 64 tokens",
        ),
        ([GOOD, {"prompt": "one"}], {}, "mine.jsonl:2: no field 'completion'"),
    ],
    ids=["too_long", "all_dropped", "no_trained_token", "a_later_record"],
)
def test_what_a_full_read_finds_is_named_with_file_and_line(
    records: list[dict[str, str]], data: dict[str, Any], words: str, tmp_path: Path, capsys: Capture
) -> None:
    assert words in refused(run_on(tmp_path, records, **data), capsys)


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    run = run_on(tmp_path, [GOOD], cache_dir=None)
    monkeypatch.setenv("DECOMPFT_CACHE", str(tmp_path / "file"))
    err = refused(run, capsys)
    assert f"error: {tmp_path}/file/data: tokenized data cannot be kept there: Not a directory" in err
    assert "set DECOMPFT_CACHE or data.cache_dir to a folder that can be written" in err


# -- found by the ranks --


@pytest.mark.dist
def test_weights_that_are_not_finite_stop_before_the_first_step(tmp_path: Path, model_dir: Path) -> None:
    copy, sections = local_model(tmp_path, model_dir)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    run = make_run(tmp_path, **sections)
    ended = run_worker(run)
    assert ended.outcome.exit_code == 3
    assert "run failed: rank 0: step 1: the loss is nan" in ended.said
    assert "the optimizer step was not taken and there is no checkpoint" in ended.said
    assert "last step: none" in ended.said and is_plain(ended.said + ended.screen)
    assert newest_valid(run.checkpoints_dir) == (None, [])


@pytest.mark.dist
def test_a_loss_that_becomes_nan_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    train = {"max_steps": 9, "learning_rate": 1e30, "warmup_steps": 3, "schedule": "constant_with_warmup"}
    run = make_run(tmp_path, train=train, checkpoint={"every_steps": 1})
    ended = run_worker(run)
    assert ended.outcome.exit_code == 3
    last = ended.outcome.step
    assert f"the checkpoint of step {last} has the state before it, marked as suspect" in ended.said
    # its step was saved before, when nobody knew
    kept, skipped = newest_valid(run.checkpoints_dir)
    assert kept is not None and kept.name == f"step-{last - 1:08d}"
    assert len(skipped) == 1 and skipped[0].startswith(f"step-{last:08d}: suspect: ")
    assert "lower train.learning_rate" in ended.said and is_plain(ended.said)
    assert len(losses(run)) == ended.outcome.step, "a step that was not taken was logged"


@pytest.mark.dist
def test_a_checkpoint_over_other_weights_is_refused(tmp_path: Path, model_dir: Path) -> None:
    copy, sections = local_model(tmp_path, model_dir)
    train = {"max_steps": 4, "stop_after_steps": 2}
    first = make_run(tmp_path, "first", train=train, **sections)
    assert run_worker(first).outcome.exit_code == 75
    before = content(first.path)
    tensors = load_file(copy / "model.safetensors")
    save_file({name: t + 1 for name, t in tensors.items()}, copy / "model.safetensors")
    second = make_run(tmp_path, "second", train=train, **sections)  # the same recipe: only the ranks can tell
    checkpoint = newest_valid(first.checkpoints_dir)[0]
    ended = run_worker(second, resume=checkpoint)
    assert ended.outcome.exit_code == 2
    assert f"cannot train: rank 0: {checkpoint}: was trained over another base: sha256 was" in ended.said
    assert "hint: " in ended.said and is_plain(ended.said + ended.screen)
    assert content(first.path) == before and losses_if_any(second) == []


@pytest.mark.dist
def test_weights_of_another_shape_than_the_config_are_refused(tmp_path: Path, model_dir: Path) -> None:
    ended = run_worker(make_run(tmp_path, **wrong_shape(tmp_path, model_dir)))
    assert ended.outcome.exit_code == 2
    assert "model.layers.1.mlp.up_proj.weight has shape [64, 64] in the checkpoint" in ended.said
    assert is_plain(ended.said + ended.screen)


def losses_if_any(run: RunDir) -> list[float]:
    return losses(run) if run.metrics_path.exists() else []
