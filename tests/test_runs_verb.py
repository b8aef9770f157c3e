"""`decompft runs`: every run of a folder, how it stands, with one question to Slurm."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm, recorded
from watched import age, end, failed, make_run, start, stopped, submit, train

from decompft.launcher import cli
from decompft.launcher.outcome import Outcome
from decompft.slurm.run_list import list_runs

pytestmark = pytest.mark.dist


def test_runs_of_all_kinds_in_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    slurm = FakeSlurm(tmp_path, monkeypatch)
    runs = {
        name: make_run(tmp_path / "runs" / name)
        for name in ("local", "queued", "works", "done", "dead", "new")
    }
    end(runs["local"], start(runs["local"]), stopped(4))
    train(runs["local"], 3, 4)
    submit(runs["queued"], "22")
    submit(runs["works"], "23")
    start(runs["works"], job_id="23", nodes=("vn-1",))
    train(runs["works"], 1, 2)
    submit(runs["done"], "24")
    end(runs["done"], start(runs["done"], job_id="24"), Outcome(result="finished", step=10))
    submit(runs["dead"], "25")
    end(runs["dead"], start(runs["dead"], job_id="25"), failed(3))
    (tmp_path / "runs/notes.txt").write_text("not a run")
    (tmp_path / "runs/empty").mkdir()
    slurm.say("squeue", *recorded("squeue", "priority", "22"), *recorded("squeue", "running", "23"))
    age(runs["local"], 3 * 3600)
    assert cli.main(["runs", "--json"]) == 0
    rows = {Path(row["run"]).name: row for row in json.loads(capsys.readouterr().out)}
    states = {name: (row["state"], row["step"], row["job_id"]) for name, row in rows.items()}
    assert states == {
        "local": ("stopped", 4, None), "queued": ("queued", 0, "22"), "works": ("running", 2, "23"),
        "done": ("finished", 10, "24"), "dead": ("failed", 3, "25"), "new": ("not started", 0, None),
    }  # fmt: skip
    mine, asked = slurm.calls("squeue")
    assert "--me" in mine and "24" not in asked[asked.index("-j") + 1].split(",")
    assert slurm.calls("sacct") == []
    assert cli.main(["runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "state", "step", "loss", "job", "age"]
    assert lines[-1].split()[0] in ("new", "local") and "3 h" in next(
        x for x in lines if x.startswith("local")
    )


def test_local_runs_ask_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm here
    for number in range(3):
        make_run(tmp_path / f"runs/{number}")
    found = list_runs(tmp_path / "runs")
    assert len(found.rows) == 3 and found.note == ""


def test_without_slurm_the_files_speak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    run = make_run(tmp_path / "runs/a")
    submit(run, "23")
    end(run, start(run, job_id="23"), stopped(4))
    assert cli.main(["runs", str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    assert "stopped" in out and "note: Slurm could not be asked: squeue: no such program" in out


def test_a_folder_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"
    assert cli.main(["runs", str(tmp_path / "absent")]) == 2


def test_a_hundred_runs_take_about_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = FakeSlurm(tmp_path, monkeypatch)
    slurm.answer("running")
    for number in range(100):
        run = make_run(tmp_path / f"runs/{number}")
        submit(run, str(100 + number))
        start(run, job_id=str(100 + number))
        train(run, *range(1, 11))
    began = time.process_time()
    assert len(list_runs(tmp_path / "runs").rows) == 100
    # 10 ms a run on a slow core; a reader of whole files, or a call of squeue for each, would take far more
    assert time.process_time() - began < 5
    assert len(slurm.calls("squeue")) == 2
