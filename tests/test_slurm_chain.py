"""`decompft launch --slurm --chain`: what is submitted after what, by a sbatch that counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_sbatch import FakeSbatch
from slurmed import json_lines
from test_runs import make_plan

from decompft.launcher import cli
from decompft.launcher.errors import UserError
from decompft.launcher.runs import RunDir
from decompft.slurm import batch
from decompft.slurm.chain import read_chain
from decompft.slurm.profile import Profile
from decompft.slurm.submit import Submission, append, read_submissions

pytestmark = pytest.mark.dist


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSbatch:
    return FakeSbatch(tmp_path, monkeypatch)


def launch(*words: str) -> int:
    return cli.main(["launch", "tiny_map", "--run-dir", "run", *words])


def test_each_step_waits_for_the_one_before(slurm: FakeSbatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("tasks.jsonl").write_text("{}\n")
    steps = "prepare,train,merge,eval"
    assert (
        launch("--slurm", "--chain", steps, "--chain-merge", "dequantized", "--chain-eval", "tasks.jsonl")
        == 0
    )
    assert [(s.kind, s.dependency) for s in slurm.submitted] == [
        ("prepare", ""), ("train", "afterok:1"), ("merge", "afterok:2"), ("eval", "afterok:3"),
    ]  # fmt: skip
    assert all(s.kills_on_invalid == bool(s.dependency) for s in slurm.submitted)
    commands = {s.kind: s.text.splitlines()[-1] for s in slurm.submitted}
    assert commands["prepare"] == '"${here[@]}" -m decompft.launcher.worker.tools.prepare run || exit'
    assert "merge run/adapter --into=dequantized --out=run/merged ||" in commands["merge"]
    assert "eval run/adapter --task tasks.jsonl ||" in commands["eval"]
    rows = json_lines(Path("run/slurm/jobs.jsonl"))
    assert [(row["job_id"], row["kind"], row["after"], row["script"]) for row in rows] == [
        ("1", "prepare", [], "slurm/prepare.sbatch"), ("2", "train", ["1"], "slurm/train.sbatch"),
        ("3", "merge", ["2"], "slurm/merge.sbatch"), ("4", "eval", ["3"], "slurm/eval.sbatch"),
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert "job 2: tiny_map on 1 nodes, in run, after job 1\njob 3: merge, after job 2\n" in out


def test_a_profile_can_put_prepare_first_by_itself(slurm: FakeSbatch) -> None:
    Path("site.yaml").write_text("prepare: {partition: cpu, cpus: 8}\n")
    assert launch("--slurm", "site.yaml") == 0
    assert [s.kind for s in slurm.submitted] == ["prepare", "train"]
    assert "#SBATCH --partition=cpu\n#SBATCH --cpus-per-task=8\n" in slurm.submitted[0].text


def test_a_run_alone_is_one_job(slurm: FakeSbatch) -> None:
    assert launch("--slurm") == 0
    assert [(s.kind, s.dependency) for s in slurm.submitted] == [("train", "")]


def test_half_a_chain_is_taken_back(slurm: FakeSbatch, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.refuse("merge")
    assert launch("--slurm", "--chain", "prepare,train,merge") == 2
    assert "no merge today" in capsys.readouterr().err
    assert slurm.cancelled == ["2", "1"]


def test_a_merged_folder_is_not_merged_into(slurm: FakeSbatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run/merged").mkdir(parents=True)
    assert launch("--slurm", "--chain", "train,merge") == 2
    assert "run/merged: exists already" in capsys.readouterr().err
    assert slurm.submitted == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--chain", "merge"], "train must be in it"),
        (["--chain", "train,prepare"], "the order is fixed"),
        (["--chain", "train,train"], "the order is fixed"),
        (["--chain", "train,mrge"], "'mrge' is no step"),
        (["--chain", "train,eval"], "eval needs a file"),
        (["--chain", "train,eval", "--chain-eval", "nix"], "nix: no such file"),
        (["--chain-merge", "dense"], "no merge in the chain"),
        (["--chain-eval", "nix"], "no eval in the chain"),
    ],
)
def test_a_chain_that_makes_no_sense_is_refused(
    slurm: FakeSbatch, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("--slurm", *words) == 2
    assert told in capsys.readouterr().err
    assert slurm.submitted == [] and not Path("run").exists()


def test_a_chain_needs_slurm(slurm: FakeSbatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--chain", "train,merge") == 2
    assert "add --slurm" in capsys.readouterr().err
    with pytest.raises(UserError):
        read_chain("", Profile(), merge_into=None, eval_tasks=())


def row(job_id: str, kind: str, *after: str) -> Submission:
    return Submission(job_id=job_id, cluster="", kind=kind, script="s", sha256="", after=after)


def test_a_successor_takes_over_what_waited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir.create(tmp_path / "run", recipe_text="", plan=make_plan())
    (run.path / "slurm").mkdir()
    (run.path / "slurm/train.sbatch").write_text("#!/bin/bash\n")
    for one in (row("1", "prepare"), row("2", "train", "1"), row("3", "merge", "2"), row("4", "eval", "3")):
        append(run, one)
    for old, new in (("2", "8"), ("8", "9")):
        assert batch.main(["succeed", str(run.path), f"--job={old}", f"--next={new}"]) == 0
        assert capsys.readouterr().out == "3\n"
    newest = {s.job_id: s for s in read_submissions(run)}
    assert (newest["9"].kind, newest["9"].after, newest["3"].after) == ("train", ("1",), ("9",))


def test_a_successor_of_a_job_submitted_by_hand_is_written_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir.create(tmp_path / "run", recipe_text="", plan=make_plan())
    (run.path / "slurm").mkdir()
    (run.path / "slurm/train.sbatch").write_text("#!/bin/bash\n")
    assert batch.main(["succeed", str(run.path), "--job=5", "--next=6"]) == 0
    assert capsys.readouterr().out == "\n"
    rows = json_lines(run.path / "slurm/jobs.jsonl")
    assert [(r["job_id"], r["kind"]) for r in rows] == [("6", "train")] and json.dumps(rows)
