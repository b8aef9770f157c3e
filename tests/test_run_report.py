"""`decompft report`: what a page shows of a run, alive or dead; of several runs, and the verb: test_report_verb.py."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reporting import (
    GIB,
    SVG,
    T0,
    event,
    figures,
    finish,
    make_run,
    of_class,
    report,
    row,
    shown,
    start,
    words,
    write_lines,
)
from test_runs import RECIPE, make_plan

from decompft.launcher.outcome import Outcome, write_rank
from decompft.launcher.report_data import read_run
from decompft.launcher.runs import RunDir

# -- one run --


def test_a_finished_run_shows_every_plot(tmp_path: Path) -> None:
    saves = [
        event("save", s, step=s, save_s=2.0, stall_s=0.01, bytes=10 * 2**20, reason="interval")
        for s in (5, 10)
    ]
    run = make_run(
        tmp_path / "r",
        [row(step) for step in range(1, 11)],
        [
            start(0, 1), event("eval", 1, step=0, loss=5.5, num_tokens=9), *saves,
            event("eval", 11, step=10, loss=4.25, num_tokens=9),
            event("memory", 12, step=10, measured=2 * GIB, forecast=GIB), event("end", 13, step=10, result="finished"),
        ],
    )  # fmt: skip
    finish(run, Outcome(result="finished", step=10))
    _, tree = report(run)
    assert shown(tree, "good") == "finished at step 10 of 10"
    assert list(figures(tree)) == [
        "Loss", "What happened when", "Speed", "Learning rate", "Gradient norm", "Memory: forecast and measured",
        "Memory by step", "Saves",
    ]  # fmt: skip
    assert all(len(list(figure.iter(f"{SVG}svg"))) == 1 for figure in figures(tree).values())
    assert (
        "llama from its config (1.0k parameters), nf4 base, map, rank 16 (10 trained), single on 1 CPU process"
        in (words(tree))
    )
    dots = of_class(figures(tree)["Loss"], "dot")
    assert [words(dot) for dot in dots] == ["evaluation: 5.5 at step 0", "evaluation: 4.25 at step 10"]
    assert "2.00 GiB (the forecast is -50.0 % off)" in words(figures(tree)["Memory: forecast and measured"])
    pauses = [words(dot) for dot in of_class(figures(tree)["Saves"], "dot")]
    assert "pause of training: 0.01 at step 5" in pauses and "save, begin to rename: 2 at step 10" in pauses
    assert "best evaluation 4.25 at step 10, 5.5 before training" in words(tree)


def test_axes_name_what_they_count_and_in_which_unit(tmp_path: Path) -> None:
    _, tree = report(make_run(tmp_path / "r", [row(step) for step in range(1, 11)]))
    titles = {name: [words(t) for t in of_class(figure, "title")] for name, figure in figures(tree).items()}
    assert titles["Loss"] == ["optimizer step", "loss per trained token"]
    assert titles["Speed"] == ["optimizer step", "tokens/s, all ranks"]
    assert titles["Memory by step"] == ["optimizer step", "GiB, highest so far in this start"]


def test_a_step_that_was_trained_twice_counts_once_as_it_was_trained_last(tmp_path: Path) -> None:
    first = [row(step, loss=9.0) for step in range(1, 16)]
    again = [row(step, loss=2.0) for step in range(11, 14)]
    run = make_run(tmp_path / "r", [*first, *again])
    rows = read_run(run.path, T0).rows
    assert rows.steps == [*range(1, 14)]  # 14 and 15 have not been trained again yet
    assert rows.columns["loss"] == [9.0] * 10 + [2.0] * 3


def test_evaluations_of_steps_that_were_thrown_away_are_not_shown(tmp_path: Path) -> None:
    events = [
        start(0, 1), event("eval", 1, step=10, loss=4.0), event("eval", 2, step=15, loss=1.0),
        start(9, 2, step=12), event("eval", 10, 2, step=20, loss=3.0),
    ]  # fmt: skip
    assert read_run(make_run(tmp_path / "r", events=events).path, T0).evals == [(10, 4.0), (20, 3.0)]


def test_restarts_are_marked_where_they_took_up_again(tmp_path: Path) -> None:
    events = [start(0, 1), event("end", 9, 1, step=30, result="checkpointed"), start(20, 2, 30), start(40, 3, 30),
              start(60, 4, 70)]  # fmt: skip
    run = make_run(tmp_path / "r", [row(step) for step in range(1, 101)], events)
    _, tree = report(run)
    marks = [words(mark) for mark in of_class(figures(tree)["Loss"], "mark")]
    assert marks == ["start 2-3 at step 30", "start 4 at step 70"]
    bars = [words(span) for span in of_class(figures(tree)["What happened when"], "span")]
    assert [bar.partition(":")[0] for bar in bars] == ["start 1", "start 2", "start 3", "start 4"]


def test_hundreds_of_restarts_still_make_a_page(tmp_path: Path) -> None:
    events = [start(60 * n, n, 10 * (n - 1)) for n in range(1, 401)]
    run = make_run(tmp_path / "r", [row(step) for step in range(1, 4001)], events)
    html, tree = report(run)
    assert len(html) < 400_000
    assert "the last 60 of 400" in words(tree)
    # words that would lie on one another are left to the titles
    places = [float(t.get("x", "")) for t in of_class(figures(tree)["Loss"], "wait") if t.tag == f"{SVG}text"]
    assert 3 < len(places) < 30


def test_missing_rows_break_the_line_and_are_said(tmp_path: Path) -> None:
    steps = [*range(1, 31), *range(51, 81)]
    run = make_run(tmp_path / "r", [row(step) for step in steps])
    _, tree = report(run)
    loss = figures(tree)["Loss"]
    assert [words(hole) for hole in of_class(loss, "hole")] == ["no rows between step 30 and step 51"]
    (line,) = of_class(loss, "line")
    assert line.get("d", "").count("M") == 2


def test_a_loss_that_is_not_finite_is_a_gap_and_is_counted(tmp_path: Path) -> None:
    rows = [row(step) for step in range(1, 11)]
    rows[4]["loss"] = None
    _, tree = report(make_run(tmp_path / "r", rows))
    loss = figures(tree)["Loss"]
    assert "1 step without a finite loss" in words(loss)
    (line,) = of_class(loss, "line")
    assert line.get("d", "").count("M") == 2


def test_one_spike_does_not_flatten_the_rest(tmp_path: Path) -> None:
    rows = [row(step, loss=1.0 + 0.01 * (step % 7)) for step in range(1, 201)]
    rows[99]["loss"] = 500.0
    _, tree = report(make_run(tmp_path / "r", rows))
    loss = figures(tree)["Loss"]
    assert "arrows: 1 step above the plot, up to 500" in words(loss)
    (arrows,) = of_class(loss, "above")
    assert arrows.get("d", "").count("M") == 1
    ticks = [float(t.text or "") for t in of_class(loss, "end") if t.tag == f"{SVG}text"]
    assert max(ticks) < 1.2


# -- how it stands --


def test_a_running_run_with_half_a_row(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", [row(step) for step in range(1, 5)], [start(0, 1)])
    run.next_incarnation()
    with run.metrics_path.open("a") as file:
        file.write('{"step": 5, "loss": 4')
    _, tree = report(run)
    assert shown(tree, "plain").startswith("running at step 4 of 10; its last word came ")
    assert "could not be read" not in words(tree)


def test_a_damaged_row_in_the_middle_is_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", [row(1)])
    with run.metrics_path.open("a") as file:
        file.write(
            '{"step": 2, "lo\nnull\n[[]]\n{"step": -1}\n' + "[" * 100_000 + "\n" + json.dumps(row(3)) + "\n"
        )
    assert read_run(run.path, T0).rows.num_unreadable == 5
    assert "5 lines of metrics.jsonl could not be read" in report(run)[0]


def test_a_run_without_metrics(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    run.metrics_path.unlink()
    (run.path / "events.jsonl").unlink()
    _, tree = report(run)
    assert shown(tree, "plain") == "not started no rank was ever started"
    assert "no step was logged yet" in words(figures(tree)["Loss"])
    assert "forecast" in words(figures(tree)["Memory: forecast and measured"])


def test_a_held_lock_is_a_running_run_however_long_it_is_quiet(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", [row(1)], [start(0, 1)])
    run.next_incarnation()
    late = time.time() + 86400
    assert not read_run(run.path, late).is_held
    code = "import sys; from pathlib import Path; from decompft.launcher.runs import RunDir\n"
    code += "RunDir(Path(sys.argv[1])).lock(); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert read_run(run.path, late).is_held
        holder.communicate()


def test_a_run_that_fell_silent_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "r", [row(1)], [start(0, 1)])
    run.next_incarnation()
    now = time.time() + 7200
    monkeypatch.setattr(time, "time", lambda: now)
    _, tree = report(run)
    assert shown(tree, "bad").startswith("silent at step 1 of 10: no outcome was left")


def test_a_stopped_run_says_that_it_can_be_resumed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", [row(1)], [start(0, 1)])
    finish(run, Outcome(result="checkpointed", step=1, message="stopped in order after step 1 of 10"))
    _, tree = report(run)
    assert shown(tree, "wait") == (
        "checkpointed at step 1 of 10: stopped in order after step 1 of 10; its state is saved, it can be resumed"
    )


def test_steps_of_epochs_are_estimated_from_the_rows(tmp_path: Path) -> None:
    plan = make_plan(train={"max_steps": None, "epochs": 2.0})
    run = RunDir.create(tmp_path / "r", recipe_text=RECIPE, plan=plan)
    write_lines(run.metrics_path, [row(step) for step in range(1, 6)])  # ten steps an epoch
    write_lines(run.path / "events.jsonl", [start(0, 1)])
    assert "step 5 of about 20" in report(run)[0]


# -- a failure --


def test_a_failure_is_told_in_words(tmp_path: Path) -> None:
    told = {
        "rank": 1, "node": "gpu017", "step": 7, "cause": "out_of_memory_gpu", "meaning": "the GPU ran out of memory",
        "message": "CUDA out of memory. Tried to allocate 2 GiB", "evidence": "torch.OutOfMemoryError: CUDA",
        "hint": "lower train.micro_batch_size",
    }  # fmt: skip
    again = "decompft launch x.yaml --resume auto --run-dir runs/x"
    stack = ["train.py:3 in train: loss()", "loss.py:9 in loss: <logits>"]
    events = [
        start(0, 1), event("hang", 8, rank=1, stack=stack), event("end", 9, step=7, result="failed", rank=1),
        event("failure", 9, next=again, result="failed", **told),
    ]  # fmt: skip
    run = make_run(tmp_path / "r", [row(step) for step in range(1, 8)], events)
    finish(run, Outcome(result="failed", **told))
    for rank in (0, 1):
        write_rank(
            run.incarnation_dir(1),
            rank,
            Outcome(result="failed", step=7, rank=rank, traceback=f"line {rank}"),
        )
    run.rank_log(1, 1).write_text("before\nthe last line <of> rank 1\n")
    _, tree = report(run)
    assert shown(tree, "bad").startswith("failed at step 7 of 10: CUDA out of memory")
    (box,) = of_class(tree, "failure")
    lines = [words(line) for line in box.iter(f"{SVG}tr")]
    assert lines == [
        "first to fail rank 1 on gpu017", "last step 7", "what happened CUDA out of memory. Tried to allocate 2 GiB",
        "cause the GPU ran out of memory (out_of_memory_gpu)", "evidence torch.OutOfMemoryError: CUDA",
        "what to do lower train.micro_batch_size", "others that failed rank 0", f"next command {again}",
    ]  # fmt: skip
    folds = [words(fold) for fold in box.iter(f"{SVG}details")]
    assert folds == [
        "end of logs/incarnation-1/rank-1.log before the last line <of> rank 1",
        "where rank 1 stood still train.py:3 in train: loss() loss.py:9 in loss: <logits>",
        "traceback of rank 0 line 0", "traceback of rank 1 line 1",
    ]  # fmt: skip
    assert "failed at step 7" in [words(mark) for mark in of_class(figures(tree)["Loss"], "mark")]


def test_a_failure_that_was_resumed_from_is_a_mark_and_no_more(tmp_path: Path) -> None:
    events = [start(0, 1), event("end", 9, step=7, result="failed"), start(20, 2, 5)]
    run = make_run(tmp_path / "r", [row(step) for step in range(1, 10)], events)
    finish(run, Outcome(result="failed", step=7, message="died"))
    finish(run, Outcome(result="finished", step=10))
    _, tree = report(run)
    assert of_class(tree, "failure") == []
    marks = [words(mark) for mark in of_class(figures(tree)["Speed"], "mark")]
    assert marks == ["start 2 at step 5", "failed at step 7"]
    starts = [words(line) for line in tree.iter(f"{SVG}tr")]
    assert any(
        line.startswith("1 2026") and line.endswith("0 7 2 failed: died") for line in starts
    )  # 2 steps again
