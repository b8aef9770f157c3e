"""Runs made as `launch` makes them, to be spoilt, and looked at afterwards: for tests."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny import CPU, recipe_data
from workers import Ended, run_worker

from decompft.launcher.checkpoints import find_problem, list_checkpoints
from decompft.launcher.planner import make
from decompft.launcher.resume import choose_start
from decompft.launcher.runs import RunDir
from decompft.launcher.source import load
from decompft.launcher.worker.tools import prepare

GOOD = {"prompt": "one", "completion": "two"}  # a record
Sections = dict[str, dict[str, Any]]
FSDP = {"strategy": "fsdp", "gpus_per_node": 2}


def write_recipe(folder: Path, **sections: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe_data(folder, **sections)))
    return path


def planned(folder: Path, **sections: dict[str, Any]) -> RunDir:
    """A run directory as `launch` makes it from folder/recipe.yaml, not yet prepared."""
    path = write_recipe(folder, **sections)
    return RunDir.create(folder / "run", recipe_text=path.read_text(), plan=make(load(path), machine=CPU))


def train_two_ranks(folder: Path) -> RunDir:
    """A run of two ranks, each with its shard, saved at steps 2, 4 and 6 and stopped there."""
    train = {"max_steps": 8, "stop_after_steps": 6}
    run = planned(folder, parallel=FSDP, train=train, checkpoint={"every_steps": 2, "keep": 9})
    prepare.main([str(run.path)])
    assert run_worker(run).outcome.exit_code == 75
    assert all_whole(run) == [name(2), name(4), name(6)]
    return run


def local_model(folder: Path, model_dir: Path) -> tuple[Path, Sections]:
    copy = shutil.copytree(model_dir, folder / "model")
    # from `config` to `id`: null is what a key that is not given is
    return copy, {"model": {"config": None, "weights": "checkpoint", "id": str(copy), "tokenizer": None}}


def run_on(folder: Path, records: list[dict[str, str]], **data: Any) -> RunDir:
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    section = {"train": [{"path": str(path), "format": "completion"}], "sequence_length": 64, **data}
    return planned(folder, data=section)


def copied(run: RunDir, folder: Path) -> RunDir:
    return RunDir(shutil.copytree(run.path, folder / "run"))


def go_on(run: RunDir) -> Ended:
    """What `--resume auto` does, from where it would."""
    start = choose_start(run.read_plan(), run_dir=run.path, resume="auto")
    assert start.checkpoint is not None
    return run_worker(run, resume=start.checkpoint)


def until(is_true: Callable[[], Any], *, patience_s: float = 60) -> None:
    end = time.monotonic() + patience_s
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.01)


def name(step: int) -> str:
    return f"step-{step:08d}"


def all_whole(run: RunDir) -> list[str]:
    """The names of the run's checkpoints, each of which is as it was written."""
    found = list_checkpoints(run.checkpoints_dir)
    assert {path.name: find_problem(path) for path in found} == {path.name: None for path in found}
    return [path.name for path in found]


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def is_plain(text: str) -> bool:
    """No traceback, nor the end of one."""
    return "Traceback" not in text and 'File "' not in text


def assert_words(ended: Ended, *words: str) -> None:
    assert all(each in ended.said for each in words), ended.said
    assert is_plain(ended.said + ended.screen), ended.said + ended.screen
