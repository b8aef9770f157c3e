"""The run directory: what launch writes, and what it refuses; what --resume takes of it: test_resume_start.py."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from pathlib import Path

import pytest

from decompft.launcher.checkpoints import FORMAT_VERSION
from decompft.launcher.errors import UserError
from decompft.launcher.hangs import Reading, pulse_path, to_json
from decompft.launcher.outcome import Outcome, read_outcome, read_ranks, write_outcome, write_rank
from decompft.launcher.plan import Batch, Forecast, Plan, Term, World
from decompft.launcher.recipe import Recipe
from decompft.launcher.runs import RunDir, find_run

RECIPE = "# a comment is kept\nmodel: {config: {model_type: llama}, weights: random}\n"


def make_plan(*, ranks: int = 1, **sections: dict[str, object]) -> Plan:
    recipe = {
        "model": {"config": {"model_type": "llama"}, "weights": "random"},
        "data": {"train": [{"path": "/data/train.jsonl"}]},
        "train": {"max_steps": 10},
    }
    for section, values in sections.items():
        recipe[section] = recipe.get(section, {}) | values  # type: ignore[operator]
    return Plan(
        name="tiny",
        recipe=Recipe.model_validate(recipe),
        shape_source="config",
        model_dir=None,
        base_config={"model_type": "llama"},
        world=World(nodes=1, ranks_per_node=ranks, device="cpu"),
        strategy="single" if ranks == 1 else "ddp",
        strategy_reason="a test",
        recompute="none",
        batch=Batch(global_size=16, micro_size=16 // ranks, accumulation=1, tokens_per_step=16 * 2048),
        num_base_params=1000,
        num_adapter_params=10,
        forecast=Forecast(terms=(Term(name="base", num_bytes=2**30),), capacity_bytes=2**33),
    )


def make_checkpoint(run: Path, step: int, content: bytes = b"state", *, reason: str = "interval") -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}"
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "a.bin").write_bytes(content)
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    head = {"version": FORMAT_VERSION, "reason": reason, "step": step, "world_size": 1, "incarnation": 1}
    head |= {"state": {}, "tensors": {}}
    manifest = json.dumps({**head, "files": {"state/a.bin": entry}}).encode()
    (folder / "manifest.json").write_bytes(manifest)
    (folder / "COMPLETE").write_text(hashlib.sha256(manifest).hexdigest() + "\n")
    return folder


def test_create_writes_recipe_verbatim_and_a_plan_that_reads_back(tmp_path: Path) -> None:
    plan = make_plan()
    run = RunDir.create(tmp_path / "new", recipe_text=RECIPE, plan=plan)
    assert run.recipe_path.read_text() == RECIPE
    assert RunDir.open(run.path).read_plan() == plan
    text = run.plan_path.read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    assert "torch" in json.loads((run.path / "env.json").read_text())["packages"]


def test_an_existing_run_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    RunDir.create(tmp_path, recipe_text="old", plan=make_plan())
    with pytest.raises(UserError, match="exists already") as error:
        RunDir.create(tmp_path, recipe_text="new", plan=make_plan())
    assert "--resume auto" in error.value.hint
    assert (tmp_path / "recipe.yaml").read_text() == "old"


def test_incarnations_count_from_one_and_keep_their_plans(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, recipe_text=RECIPE, plan=make_plan())
    assert run.next_incarnation() == 1
    run.record(recipe_text=RECIPE, plan=make_plan(train={"max_steps": 99}))
    assert run.next_incarnation() == 2
    kept = [json.loads((run.incarnation_dir(n) / "plan.json").read_text()) for n in (1, 2)]
    assert [plan["recipe"]["train"]["max_steps"] for plan in kept] == [10, 99]


def test_a_run_in_use_is_refused(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, recipe_text=RECIPE, plan=make_plan())
    run.lock()
    with pytest.raises(UserError, match="another launch is running"):
        run.lock()


def test_a_launch_whose_launcher_is_gone_names_the_ranks_that_are_left(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", recipe_text=RECIPE, plan=make_plan())
    folder = run.incarnation_dir(run.next_incarnation())
    with subprocess.Popen(["true"]) as ended:
        pass
    for rank, (pid, node) in enumerate(
        [(os.getpid(), platform.node()), (ended.pid, platform.node()), (1, "else")]
    ):
        pulse_path(folder, rank).write_text(to_json(Reading(rank=rank, pid=pid, node=node)))
    handle = run.lock()
    with pytest.raises(UserError, match="another launch is running") as caught:
        run.lock()
    os.close(handle)
    assert f"(its ranks here: pid {os.getpid()})" in caught.value.message
    assert f"`kill {os.getpid()}`" in caught.value.hint


def test_a_run_is_named_by_a_path_or_under_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("work/runs/one/adapter", "work/runs/two", "work/two", "work/aside", "home/three"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found = {
        "one": "runs/one", "one/adapter": "runs/one/adapter", "two": "two", "~/three": tmp_path / "home/three",
        "nowhere": "nowhere", "../aside": "../aside", "~no-such-user/x": "~no-such-user/x",
    }  # fmt: skip
    assert {typed: find_run(typed) for typed in found} == {typed: Path(to) for typed, to in found.items()}


def test_an_unwritable_place_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        RunDir.create(tmp_path / "file" / "run", recipe_text=RECIPE, plan=make_plan())


def test_outcomes_read_back_and_choose_the_exit_code(tmp_path: Path) -> None:
    assert read_outcome(tmp_path) is None
    codes = {"finished": 0, "user_error": 2, "failed": 3, "checkpointed": 75}
    for result, code in codes.items():
        outcome = Outcome(result=result, step=7, message="m", hint="h", rank=1)  # type: ignore[arg-type]
        write_outcome(tmp_path, outcome)
        assert read_outcome(tmp_path) == outcome
        assert outcome.exit_code == code
    rows = json.loads((tmp_path / "outcome.json").read_text())
    assert sorted(rows) == ["hint", "message", "rank", "result", "step"]
    told = Outcome(result="failed", rank=12, time_s=1.5, traceback="Traceback ...")
    write_rank(tmp_path, 12, told)
    assert read_ranks(tmp_path) == {12: told}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["outcome.json", "rank-12.json"]
