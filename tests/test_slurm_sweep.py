"""A sweep as a job array, or one task after the other; its folders, and its table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fake_sbatch import FakeSbatch
from fake_slurm import FakeSlurm, recorded
from slurmed import job_env, json_lines
from watched import end, failed, make_run, start, submit, train

from decompft.launcher import cli
from decompft.launcher.outcome import Outcome
from decompft.launcher.runs import RunDir
from decompft.slurm.frozen import read_frozen

pytestmark = pytest.mark.dist

WORDS = ("--run-dir", "run", "train.max_steps=2")
FOLDERS = [
    "000-rank_4-learning_rate_0.005", "001-rank_4-learning_rate_0.02",
    "002-rank_8-learning_rate_0.005", "003-rank_8-learning_rate_0.02",
]  # fmt: skip


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSbatch:
    return FakeSbatch(tmp_path, monkeypatch)


def launch(*words: str) -> int:
    return cli.main(["launch", "tiny_sweep", "--slurm", *WORDS, *words])


def finish(name: str, *, eval_loss: float) -> None:
    run = RunDir(Path("run") / name)
    train(run, 1, 2)
    run.append_event("eval", step=2, loss=eval_loss, num_tokens=9)
    end(run, start(run), Outcome(result="finished", step=2))


def test_one_array_of_frozen_runs_is_submitted(slurm: FakeSbatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch() == 0
    (array,) = slurm.submitted
    assert "#SBATCH --array=0-3%2\n" in array.text
    assert array.argv[1] == "--output=run/logs/sweep-%A-%a.out"
    assert sorted(path.name for path in Path("run").glob("0*")) == FOLDERS
    ranks = [read_frozen(RunDir(Path("run") / name))[0].adapter.rank for name in FOLDERS]
    assert ranks == [4, 4, 8, 8]
    assert json_lines(Path("run/slurm/jobs.jsonl"))[0]["array"] == 4
    of_task = json_lines(Path("run") / FOLDERS[2] / "slurm/jobs.jsonl")
    assert [(row["job_id"], row["kind"], row["array"]) for row in of_task] == [("1_2", "sweep", None)]
    # of its own, to continue this task alone
    script = (Path("run") / FOLDERS[2] / "slurm/train.sbatch").read_text()
    assert f"run=run/{FOLDERS[2]}\n" in script and "--array" not in script
    assert "job 1: 4 tasks of tiny_sweep, 2 at a time, in run\n" in capsys.readouterr().out


def test_prepare_comes_first_and_reads_each_data_set_once(slurm: FakeSbatch) -> None:
    assert launch("--chain", "prepare,train") == 0
    prepare, array = slurm.submitted
    assert prepare.text.count("worker.tools.prepare") == 1 and array.dependency == "afterok:1"


def test_what_follows_a_training_follows_no_sweep(
    slurm: FakeSbatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("--chain", "train,merge") == 2
    assert "merge needs one adapter, a sweep makes 4" in capsys.readouterr().err
    assert slurm.submitted == [] and not Path("run").exists()


def test_a_wrong_combination_submits_nothing(slurm: FakeSbatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("sweep.parameters={train.micro_batch_size: [2, 3]}") == 2
    assert "in task 1 of the sweep: train.micro_batch_size=3" in capsys.readouterr().err
    assert slurm.submitted == [] and not Path("run").exists()


def test_only_tasks_that_have_not_finished_are_submitted_again(
    slurm: FakeSbatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("sweep.throttle=null") == 0
    assert launch() == 2
    assert "exists already" in capsys.readouterr().err
    finish(FOLDERS[1], eval_loss=5.0)
    assert launch("--resume", "auto") == 0
    assert "#SBATCH --array=0,2-3%2\n" in slurm.submitted[-1].text
    slurm.live("2 3")
    assert launch("--resume", "auto") == 2
    assert "job 2_3 of this run is queued or running" in capsys.readouterr().err


def test_a_sweep_is_not_printed_for_sbatch(slurm: FakeSbatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sbatch", "tiny_sweep"]) == 2
    assert "a sweep is submitted by decompft" in capsys.readouterr().err
    assert launch("--dry-run") == 0
    assert "#SBATCH --array=0-3%2" in capsys.readouterr().out
    assert not Path("run").exists()


def test_the_table_has_the_best_first(slurm: FakeSbatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch() == 0
    finish(FOLDERS[0], eval_loss=5.25)
    finish(FOLDERS[2], eval_loss=4.5)
    broken = RunDir(Path("run") / FOLDERS[3])
    train(broken, 1)
    end(broken, start(broken), failed(1))
    capsys.readouterr()
    assert cli.main(["status", "run", "--json"]) == 3  # task 1 is gone from the queue, and left nothing
    told = json.loads(capsys.readouterr().out)
    assert [(task["task"], task["state"], task["eval_loss"]) for task in told["tasks"]] == [
        (2, "finished", 4.5), (0, "finished", 5.25), (3, "failed", None), (1, "failed", None),
    ]  # fmt: skip
    assert told["tasks"][0]["parameters"] == {"adapter.rank": 8, "train.learning_rate": 0.005}
    assert cli.main(["runs", "run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "run: 2 failed, 2 finished"
    assert lines[1].split("  ")[0:3] == ["task", "adapter.rank", "train.learning_rate"]
    assert lines[2].split() == ["2", "8", "0.005", "finished", "2", "of", "2", "2.98", "4.5", "12,346"]
    assert lines[-1] == f"next: decompft status run/{FOLDERS[3]}"
    assert cli.main(["logs", "run"]) == 2
    assert "name the run of a task" in capsys.readouterr().err


def test_what_waits_of_a_sweep_is_cancelled_before_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm = FakeSlurm(tmp_path, monkeypatch)
    names = ["000-a", "001-b", "002-c"]
    rows = [{"index": i, "parameters": {"a.b": i}, "folder": name} for i, name in enumerate(names)]
    for number, name in enumerate(names):
        submit(make_run(tmp_path / "run" / name), f"27_{number}", kind="sweep")
    (tmp_path / "run/sweep.json").write_text(json.dumps({"tasks": rows}))
    living = [
        recorded("squeue", "running", "27_0"),
        *(recorded("squeue", "priority", f"27_{i}") for i in (1, 2)),
    ]
    slurm.say("squeue", *(line for lines in living for line in lines))
    slurm.scancel_does(
        'rows = open(folder + "/squeue").read().splitlines()\n'
        'open(folder + "/squeue", "w").write("\\n".join(r for r in rows if r.split("|")[0] != argv[-1]))'
    )
    assert cli.main(["cancel", str(tmp_path / "run"), "--now"]) == 0
    assert [words[-1] for words in slurm.calls("scancel")] in (
        ["27_1", "27_2", "27_0"],
        ["27_2", "27_1", "27_0"],
    )
    assert cli.main(["cancel", str(tmp_path / "run")]) == 0
    assert "nothing of it is queued or running" in capsys.readouterr().out


def test_here_the_tasks_run_one_after_the_other(tmp_path: Path) -> None:
    words = ["sweep.parameters={adapter.rank: [2, 4]}", "train.max_steps=1", "logging.tensorboard=false"]
    argv = [sys.executable, "-m", "decompft.launcher.cli", "launch", "tiny_sweep", "--run-dir", "run"]
    done = subprocess.run(
        [*argv, *words], cwd=tmp_path, env=job_env(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "task 2 of 2: adapter.rank=4" in done.stdout
    assert "run: 2 finished" in done.stdout.splitlines()
    assert len([*tmp_path.glob("run/00*/adapter/adapter.safetensors")]) == 2
    again = subprocess.run(
        [*argv, *words, "--resume", "auto"],
        cwd=tmp_path,
        env=job_env(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert again.returncode == 2 and "every task of this sweep has finished" in again.stderr
