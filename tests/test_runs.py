"""The run directory: what launch writes, what --resume takes, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from decompft.launcher.again import next_command
from decompft.launcher.checkpoints import FORMAT_VERSION, completed_at, newest_valid, put_back
from decompft.launcher.errors import UserError
from decompft.launcher.hangs import Reading, pulse_path, to_json
from decompft.launcher.outcome import Outcome, read_outcome, read_ranks, write_outcome, write_rank
from decompft.launcher.plan import Batch, Forecast, Plan, Term, World
from decompft.launcher.recipe import Recipe
from decompft.launcher.resume import check_resume, choose_start
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


@pytest.mark.parametrize(
    "change",
    [
        {"parallel": {"gpus_per_node": 2}},
        {"checkpoint": {"keep": 7}},
        {"logging": {"every_steps": 5}},
        {"slurm": {"time": "1:00:00"}},
        {"train": {"max_steps": 20}},
        {"train": {"stop_after_steps": 5}},
        {"train": {"micro_batch_size": 2}},
        {"train": {"recompute": "selective"}},
    ],
    ids=str,
)
def test_resume_allows(change: dict[str, dict[str, object]]) -> None:
    new = make_plan(**change)
    assert new.recipe != make_plan().recipe
    check_resume(make_plan(), new)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"train": {"learning_rate": 0.5}}, "train.learning_rate: was 0.0002, now 0.5"),
        ({"train": {"seed": 3}}, "train.seed: was 0, now 3"),
        ({"adapter": {"options": {"eps": 0.1}}}, "adapter.options.eps: was 1e-06, now 0.1"),
        (
            {"data": {"train": [{"path": "/other.jsonl"}]}},
            'data.train[0].path: was "/data/train.jsonl", now "/other.jsonl"',
        ),
    ],
    ids=str,
)
def test_resume_refuses_by_name_with_both_values(change: dict[str, dict[str, object]], line: str) -> None:
    with pytest.raises(UserError) as error:
        check_resume(make_plan(), make_plan(**change))
    assert line in error.value.message


def test_newest_valid_skips_the_damaged_and_says_why(tmp_path: Path) -> None:
    good = make_checkpoint(tmp_path, 100)
    make_checkpoint(tmp_path, 200)
    (tmp_path / "checkpoints/step-00000200/state/a.bin").write_bytes(b"stale")  # same size
    make_checkpoint(tmp_path, 300)
    (tmp_path / "checkpoints/step-00000300/state/a.bin").write_bytes(b"stat")  # cut short
    make_checkpoint(tmp_path, 400)
    (tmp_path / "checkpoints/step-00000400/COMPLETE").unlink()
    make_checkpoint(tmp_path, 500)
    (tmp_path / "checkpoints/step-00000500/manifest.json").write_text("{")
    make_checkpoint(tmp_path, 600)
    (tmp_path / "checkpoints/step-00000600/state/a.bin").unlink()
    make_checkpoint(tmp_path, 700)
    (tmp_path / "checkpoints/step-00000700").rename(tmp_path / "checkpoints/.tmp-step-00000700")
    found, skipped = newest_valid(tmp_path / "checkpoints")
    assert found == good
    assert [line.split(":")[0] for line in skipped] == [f"step-00000{n}00" for n in (6, 5, 4, 3, 2)]
    assert "is missing" in skipped[0]
    assert "manifest.json is damaged" in skipped[1]
    assert "no COMPLETE" in skipped[2]
    assert "has 4 bytes, the manifest says 5" in skipped[3]
    assert "a.bin is damaged" in skipped[4]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 99999999)
    assert newest_valid(tmp_path / "checkpoints")[0] is not None
    newest = make_checkpoint(tmp_path, 100000000)
    assert newest_valid(tmp_path / "checkpoints")[0] == newest


def test_resume_auto_starts_continues_or_starts_afresh(tmp_path: Path) -> None:
    path = tmp_path / "run"
    first = choose_start(make_plan(), run_dir=path, resume="auto")
    assert (first.is_new, first.checkpoint) == (True, None)
    RunDir.create(path, recipe_text=RECIPE, plan=make_plan())
    # nothing trained yet, so even another recipe may be used
    afresh = choose_start(make_plan(train={"seed": 3}), run_dir=path, resume="auto")
    assert (afresh.is_new, afresh.checkpoint) == (False, None)
    checkpoint = make_checkpoint(path, 100)
    again = choose_start(make_plan(), run_dir=path, resume="auto")
    assert (again.is_new, again.checkpoint) == (False, checkpoint)
    with pytest.raises(UserError, match="train.seed"):
        choose_start(make_plan(train={"seed": 3}), run_dir=path, resume="auto")


def test_a_replacement_that_was_cut_short_is_undone_before_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "run"
    RunDir.create(path, recipe_text=RECIPE, plan=make_plan())
    make_checkpoint(path, 100)
    newest = make_checkpoint(path, 200)
    newest.rename(newest.with_name(".old-step-00000200"))
    put_back(path / "checkpoints")  # as a launch does once the run is its own
    assert choose_start(make_plan(), run_dir=path, resume="auto").checkpoint == newest


def test_whatever_happens_to_checkpoints_shows_in_when_they_were_completed(tmp_path: Path) -> None:
    seen = [completed_at(tmp_path / "checkpoints")]

    def note() -> None:
        seen.append(completed_at(tmp_path / "checkpoints"))
        assert seen[-1] not in seen[:-1]

    first, second = tmp_path / "checkpoints/step-00000004", tmp_path / "checkpoints/step-00000008"
    for folder in (first, second):
        folder.mkdir(parents=True)
        note()
        (folder / "COMPLETE").touch()
        note()
    os.utime(second / "COMPLETE", ns=(1, 1))  # replaced by another save of the same step
    note()
    assert completed_at(tmp_path / "checkpoints") == seen[-1]
    shutil.rmtree(first)
    note()
    second.rename(second.with_name(".old-step-00000008"))
    assert completed_at(tmp_path / "checkpoints") == {}
    put_back(tmp_path / "checkpoints")
    assert completed_at(tmp_path / "checkpoints") == seen[-1] != {}


def test_a_fork_that_died_before_its_first_checkpoint_begins_at_its_origin_again(tmp_path: Path) -> None:
    RunDir.create(tmp_path / "old", recipe_text=RECIPE, plan=make_plan())
    origin = make_checkpoint(tmp_path / "old", 100)
    fork = RunDir(tmp_path / "new")
    fork.path.mkdir()
    fork.write_origin(origin)
    fork.record(recipe_text=RECIPE, plan=make_plan())
    start = choose_start(make_plan(), run_dir=fork.path, resume="auto")
    assert (start.is_new, start.checkpoint) == (False, origin)
    with pytest.raises(UserError, match="train.seed"):
        choose_start(make_plan(train={"seed": 3}), run_dir=fork.path, resume="auto")
    # its first start was refused for another base, say: with the right one it begins, as a new fork would
    fork.record(recipe_text=RECIPE, plan=make_plan(train={"seed": 3}))
    assert choose_start(make_plan(), run_dir=fork.path, resume="auto").checkpoint == origin
    fork.record(recipe_text=RECIPE, plan=make_plan())
    own = make_checkpoint(fork.path, 200)
    assert choose_start(make_plan(), run_dir=fork.path, resume="auto").checkpoint == own
    shutil.rmtree(own)
    (origin / "COMPLETE").unlink()
    with pytest.raises(UserError, match="cut short"):  # rather than from step 0, silently
        choose_start(make_plan(), run_dir=fork.path, resume="auto")


def test_without_resume_an_existing_run_is_refused(tmp_path: Path) -> None:
    RunDir.create(tmp_path, recipe_text=RECIPE, plan=make_plan())
    with pytest.raises(UserError, match="exists already"):
        choose_start(make_plan(), run_dir=tmp_path, resume=None)


def test_a_fork_reads_the_old_run_and_takes_a_new_folder(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    RunDir.create(old, recipe_text=RECIPE, plan=make_plan())
    make_checkpoint(old, 100)
    newest = make_checkpoint(old, 200)
    before = sorted(p.relative_to(old) for p in old.rglob("*"))
    fork = choose_start(make_plan(), run_dir=new, resume=str(old))
    assert (fork.run.path, fork.is_new, fork.checkpoint) == (new, True, newest)
    older = old / "checkpoints/step-00000100"
    assert choose_start(make_plan(), run_dir=new, resume=str(older)).checkpoint == older
    assert sorted(p.relative_to(old) for p in old.rglob("*")) == before
    with pytest.raises(UserError, match="train.seed"):
        choose_start(make_plan(train={"seed": 3}), run_dir=new, resume=str(old))
    with pytest.raises(UserError, match="exists already"):
        choose_start(make_plan(), run_dir=old, resume=str(old))
    with pytest.raises(UserError, match="neither auto, nor a run"):
        choose_start(make_plan(), run_dir=new, resume=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="step-00000099: no such checkpoint") as error:
        choose_start(make_plan(), run_dir=new, resume=str(old / "checkpoints/step-00000099"))
    assert "step-00000100, step-00000200" in error.value.hint
    (older / "COMPLETE").unlink()
    with pytest.raises(UserError, match="no COMPLETE"):
        choose_start(make_plan(), run_dir=new, resume=str(older))


def test_resume_auto_goes_on_before_a_loss_that_was_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "run"
    RunDir.create(path, recipe_text=RECIPE, plan=make_plan())
    good = make_checkpoint(path, 6)
    make_checkpoint(path, 8, reason="non-finite")
    start = choose_start(make_plan(), run_dir=path, resume="auto")
    assert start.checkpoint == good
    assert start.notes[0].startswith("skipped checkpoint step-00000008: suspect: ")
    assert start.notes[-1] == f"resuming from {good}"
    shutil.rmtree(good)
    only = choose_start(make_plan(), run_dir=path, resume="auto")
    assert only.checkpoint == path / "checkpoints/step-00000008"
    assert "step-00000008 is suspect" in only.notes[0]


def test_a_fork_that_diverged_begins_at_its_origin_again(tmp_path: Path) -> None:
    RunDir.create(tmp_path / "old", recipe_text=RECIPE, plan=make_plan())
    origin = make_checkpoint(tmp_path / "old", 6)
    fork = RunDir(tmp_path / "new")
    fork.path.mkdir()
    fork.write_origin(origin)
    fork.record(recipe_text=RECIPE, plan=make_plan())
    make_checkpoint(fork.path, 9, reason="non-finite")
    start = choose_start(make_plan(), run_dir=fork.path, resume="auto")
    assert start.checkpoint == origin and "only suspect checkpoints of its own" in start.notes[-1]


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("learning_rate", 0.0001, "train.learning_rate: was 0.0002, now 0.0001"),
        ("warmup_steps", 5, "train.warmup_steps: was 0, now 5"),
        ("max_grad_norm", 0.5, "train.max_grad_norm: was 1.0, now 0.5"),
        ("schedule", "linear", 'train.schedule: was "cosine", now "linear"'),
    ],
)
def test_a_fork_may_change_what_makes_a_run_diverge_and_says_so(
    tmp_path: Path, key: str, value: object, line: str
) -> None:
    old, new = tmp_path / "old", make_plan(train={key: value})
    RunDir.create(old, recipe_text=RECIPE, plan=make_plan())
    checkpoint = make_checkpoint(old, 100)
    for resume in (str(old), str(checkpoint)):
        fork = choose_start(new, run_dir=tmp_path / "new", resume=resume)
        assert fork.checkpoint == checkpoint and f"changed by this fork: {line}" in fork.notes
    with pytest.raises(UserError) as error:
        choose_start(new, run_dir=old, resume="auto")
    assert line in error.value.message and "--resume RUN --run-dir NEW" in error.value.hint
    with pytest.raises(UserError) as error:  # what a fork may not change is still named, and alone
        choose_start(make_plan(train={key: value, "seed": 3}), run_dir=tmp_path / "new", resume=str(old))
    assert "train.seed: was 0, now 3" in error.value.message and line not in error.value.message


def test_after_a_divergence_the_next_command_is_a_fork_that_is_accepted(tmp_path: Path) -> None:
    plan = make_plan()
    run = RunDir.create(tmp_path / "run", recipe_text=RECIPE, plan=plan)
    (tmp_path / "run-2").mkdir()
    outcome = Outcome(result="failed", cause="non_finite", step=8)
    typed = ("tiny", "train.learning_rate=2e-4", "adapter.rank=8")
    head = ["decompft", "launch", "tiny", "adapter.rank=8", "train.learning_rate=0.0001"]
    tail = ["--run-dir", str(tmp_path / "run-3")]
    assert next_command(run, plan, typed, outcome).split() == [*head, *tail]
    make_checkpoint(run.path, 8, reason="non-finite")
    suspect = str(run.path / "checkpoints/step-00000008")
    assert next_command(run, plan, typed, outcome).split() == [*head, "--resume", suspect, *tail]
    good = make_checkpoint(run.path, 6)
    assert next_command(run, plan, typed, outcome).split() == [*head, "--resume", str(good), *tail]
    lower = make_plan(train={"learning_rate": 0.0001})
    assert choose_start(lower, run_dir=tmp_path / "run-3", resume=str(good)).checkpoint == good
    other = Outcome(result="failed", cause="disk", step=8)
    again = ["decompft", "launch", *typed, "--resume", "auto", "--run-dir", str(run.path)]
    assert next_command(run, plan, typed, other).split() == again


@pytest.mark.parametrize("resume", ["auto", None])
def test_a_run_without_its_plan_is_never_started_over(tmp_path: Path, resume: str | None) -> None:
    run = RunDir.create(tmp_path / "run", recipe_text=RECIPE, plan=make_plan())
    run.next_incarnation()
    newest = make_checkpoint(run.path, 9)
    run.plan_path.unlink()
    with pytest.raises(UserError, match=r"holds checkpoints, but no plan\.json") as error:
        choose_start(make_plan(), run_dir=run.path, resume=resume)
    assert error.value.exit_code == 2
    assert f"cp {run.path}/incarnations/1/plan.json {run.plan_path}" in error.value.hint
    assert f"--resume {newest} --run-dir NEW" in error.value.hint
    with pytest.raises(UserError, match=r"no plan\.json"):
        choose_start(make_plan(), run_dir=tmp_path / "new", resume=str(run.path))
    shutil.copy(run.incarnation_dir(1) / "plan.json", run.plan_path)  # as it says
    assert choose_start(make_plan(), run_dir=run.path, resume="auto").checkpoint == newest
    # also where its only checkpoint was being replaced
    run.plan_path.unlink()
    newest.rename(newest.with_name(f".old-{newest.name}"))
    with pytest.raises(UserError, match=r"no plan\.json"):
        choose_start(make_plan(), run_dir=run.path, resume=resume)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff\xfe"])
def test_a_plan_that_cannot_be_read_blocks_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    run = RunDir.create(tmp_path / "run", recipe_text=RECIPE, plan=make_plan())
    newest = make_checkpoint(run.path, 9)
    section = make_plan().recipe.adapter.model_dump(mode="json")
    (newest / "adapter.json").write_text(json.dumps({"adapter": section, "seed": 0}))
    run.plan_path.write_bytes(content)
    for run_dir, resume in ((run.path, "auto"), (tmp_path / "new", str(run.path))):
        with pytest.raises(UserError, match=r"its plan\.json cannot be read; nothing was started") as error:
            choose_start(make_plan(), run_dir=run_dir, resume=resume)
        assert f"--resume {newest} --run-dir NEW" in error.value.hint
    start = choose_start(make_plan(), run_dir=tmp_path / "new", resume=str(newest))  # as it says
    assert start.checkpoint == newest and "only the adapter and the seed" in start.notes[-1]


def test_a_run_whose_checkpoints_are_all_damaged_is_never_started_over(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", recipe_text=RECIPE, plan=make_plan())
    folders = [make_checkpoint(run.path, step) for step in (3, 6, 9)]
    for folder in folders:
        (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="all of its checkpoints are damaged") as error:
        choose_start(make_plan(), run_dir=run.path, resume="auto")
    assert error.value.exit_code == 2 and "--run-dir NEW" in error.value.hint
    assert all(f"{folder.name}: manifest.json is damaged" in error.value.message for folder in folders)
    # one that is being replaced will be put back once the run is this launch's
    folders[2].rename(run.checkpoints_dir / ".old-step-00000012")
    assert choose_start(make_plan(), run_dir=run.path, resume="auto").checkpoint is None
    put_back(run.checkpoints_dir)
    with pytest.raises(UserError, match="all of its checkpoints are damaged"):
        choose_start(make_plan(), run_dir=run.path, resume="auto")


def test_a_job_that_was_killed_before_or_in_its_first_save_starts_again(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", recipe_text=RECIPE, plan=make_plan())
    run.next_incarnation()
    (run.checkpoints_dir / ".tmp-step-00000003-inc1/state").mkdir(parents=True)
    start = choose_start(make_plan(), run_dir=run.path, resume="auto")
    assert (start.is_new, start.checkpoint) == (False, None)
    # and where a disk shows no more of the save than its folder
    (make_checkpoint(run.path, 3) / "COMPLETE").unlink()
    start = choose_start(make_plan(), run_dir=run.path, resume="auto")
    assert (start.is_new, start.checkpoint) == (False, None)
    assert (
        start.notes[0] == "skipped checkpoint step-00000003: it has no COMPLETE file: the save was cut short"
    )
    run.plan_path.unlink()  # prepared, and forgotten again
    assert choose_start(make_plan(), run_dir=run.path, resume="auto").is_new


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
