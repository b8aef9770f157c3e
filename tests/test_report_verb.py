"""`decompft report`: the page of several runs, where it lies, and what is an error in words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from reporting import (
    GIB,
    SVG,
    event,
    figures,
    finish,
    make_run,
    of_class,
    report,
    row,
    start,
    words,
    write_lines,
)
from test_runs import RECIPE, make_plan

from decompft.launcher.cli import main
from decompft.launcher.errors import UserError
from decompft.launcher.outcome import Outcome
from decompft.launcher.report import write_report
from decompft.launcher.runs import RunDir

# -- several runs --


def test_several_runs_are_compared_in_one_plot_and_one_table(tmp_path: Path) -> None:
    one = make_run(
        tmp_path / "one", [row(step, loss=3.0) for step in range(1, 11)],
        [start(0, 1), event("eval", 1, step=10, loss=2.5), event("memory", 2, step=10, measured=3 * GIB, forecast=GIB)],
    )  # fmt: skip
    finish(one, Outcome(result="finished", step=10))
    two = RunDir.create(
        tmp_path / "two", recipe_text=RECIPE, plan=make_plan(adapter={"method": "lora", "rank": 4})
    )
    write_lines(two.metrics_path, [row(step, loss=4.0) for step in range(1, 6)])
    write_lines(two.path / "events.jsonl", [start(0, 1)])
    finish(two, Outcome(result="failed", step=5, message="no"))
    three = make_run(tmp_path / "three")
    _, tree = report(one, two, three)
    loss = figures(tree)["Losses"]
    assert [words(key) for key in of_class(loss, "key")] == ["one", "two", "three"]
    assert sorted(words(line) for line in of_class(loss, "line")) == ["one", "two"]
    runs, recipes, _ = tree.iter(f"{SVG}table")
    lines = [[words(cell) for cell in line] for line in runs.iter(f"{SVG}tr")]
    assert lines[0][:8] == [
        "run",
        "outcome",
        "steps",
        "final loss",
        "best eval",
        "at step",
        "tokens/s",
        "peak memory",
    ]
    assert lines[1][:8] == ["one", "finished", "10 of 10", "3", "2.5", "10", "905.5", "3.00 GiB"]
    assert lines[2][:8] == ["two", "failed", "5 of 10", "4", "-", "-", "903", "1.00 GiB"]
    assert lines[3][:8] == ["three", "not started", "0 of 10", "-", "-", "-", "-", "-"]
    differing = [[words(cell) for cell in line] for line in recipes.iter(f"{SVG}tr")]
    assert ["adapter.method", '"map"', '"lora"', '"map"'] in differing
    assert all(len(set(line[1:])) > 1 for line in differing)


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / place / "same", [row(1)]) for place in ("a", "b")]
    _, tree = report(*runs)
    assert [words(key) for key in of_class(tree, "key")] == [str(run.path) for run in runs]


# -- the verb --


def test_the_page_lies_in_the_run_or_for_several_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "one", [row(1)])
    make_run(tmp_path / "runs" / "two", [row(1)])
    assert main(["report", "one"]) == 0
    assert capsys.readouterr().out == "runs/one/report.html\n"
    assert main(["report", "runs/one", "two"]) == 0
    assert capsys.readouterr().out == "report.html\n"
    assert main(["report", "one", "two", "--out", "x.html"]) == 0
    assert [p.exists() for p in (Path("runs/one/report.html"), Path("report.html"), Path("x.html"))] == [
        True
    ] * 3


@pytest.mark.parametrize(
    ("name", "message"),
    [("none", "none: no such run"), (".", ".: not a run directory"), ("file", "file: not a run directory")],
)
def test_what_is_no_run_is_an_error_in_words(
    name: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert main(["report", name]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and "\n  hint: " in error


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"[" * 5000, b"null"])
def test_a_damaged_plan_is_an_error_in_words(content: bytes, tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    run.plan_path.write_bytes(content)
    with pytest.raises(UserError, match="plan.json"):
        write_report([str(run.path)])


@pytest.mark.parametrize("content", [b"", None])
def test_without_its_plan_a_run_is_reported_from_an_incarnations_copy(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "r", [row(1)])
    run.next_incarnation()
    run.plan_path.unlink()
    if content is not None:
        run.plan_path.write_bytes(content)
    assert write_report([str(run.path)]).exists()
    assert "plan.json" in (err := capsys.readouterr().err) and "its copy is used" in err


def test_a_place_that_cannot_be_written_is_an_error_in_words(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    with pytest.raises(UserError, match="cannot be written") as error:
        write_report([str(run.path)], tmp_path / "none" / "x.html")
    assert "--out" in error.value.hint


def test_reports_need_no_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", [row(1)])
    code = "import sys; from decompft.launcher.cli import main; main(['report', sys.argv[1]])\n"
    code += "print([n for n in ('torch', 'numpy', 'matplotlib', 'transformers', 'rich') if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
