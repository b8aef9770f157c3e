"""Where a resume starts: the checkpoint that it takes, the changes that it allows, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from test_runs import RECIPE, make_checkpoint, make_plan

from decompft.launcher.again import next_command
from decompft.launcher.checkpoints import completed_at, newest_valid, put_back
from decompft.launcher.errors import UserError
from decompft.launcher.outcome import Outcome
from decompft.launcher.resume import check_resume, choose_start
from decompft.launcher.runs import RunDir


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


def forked(folder: Path, step: int) -> tuple[RunDir, Path]:
    """A fork without checkpoints, and the checkpoint of another run at which it begins."""
    RunDir.create(folder / "old", recipe_text=RECIPE, plan=make_plan())
    origin = make_checkpoint(folder / "old", step)
    fork = RunDir(folder / "new")
    fork.path.mkdir()
    fork.write_origin(origin)
    fork.record(recipe_text=RECIPE, plan=make_plan())
    return fork, origin


def test_a_fork_that_died_before_its_first_checkpoint_begins_at_its_origin_again(tmp_path: Path) -> None:
    fork, origin = forked(tmp_path, 100)
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
    fork, origin = forked(tmp_path, 6)
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
