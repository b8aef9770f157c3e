"""Metrics: rows that survive kills and resumes, lines that stay aligned, trackers only when asked for."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from decompft.launcher.errors import RunFailed, UserError
from decompft.launcher.recipe import LoggingSection, MlflowSection, WandbSection
from decompft.launcher.worker.console import Console
from decompft.launcher.worker.metrics import Metrics, StepRow
from decompft.launcher.worker.trackers import open_trackers

ROW = StepRow(
    step=1, epoch=0.01, loss=2.5, learning_rate=2e-4, grad_norm=0.5, tokens_per_s=12345.6,
    trained_tokens=700, peak_mem_bytes=3 * 2**30, step_s=2.0, samples=7,
)  # fmt: skip
QUIET = LoggingSection(tensorboard=False)


def open_metrics(run_dir: Path, **changes: Any) -> Metrics:  # whatever Metrics takes
    options: dict[str, Any] = {
        "rank": 0, "incarnation": 1, "logging": QUIET, "start_step": 0, "total_steps": 10,
        "stream": io.StringIO(),
    }  # fmt: skip
    return Metrics(run_dir, **{**options, **changes})


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_out_at_once_with_units_in_their_keys(tmp_path: Path) -> None:
    metrics = open_metrics(tmp_path)
    metrics.step(ROW)
    (row,) = rows_of(tmp_path / "metrics.jsonl")  # not closed, not flushed
    assert row == {
        "step": 1, "epoch": 0.01, "loss": 2.5, "learning_rate": 2e-4, "grad_norm": 0.5,
        "tokens_per_s": 12345.6, "trained_tokens": 700, "peak_mem_bytes": 3 * 2**30, "step_s": 2.0,
        "samples": 7,
    }  # fmt: skip
    metrics.event("save", step=1, path="checkpoints/step-00000001")
    (event,) = rows_of(tmp_path / "events.jsonl")
    assert event.pop("time_s") > 0
    assert event == {"event": "save", "step": 1, "incarnation": 1, "path": "checkpoints/step-00000001"}


def test_resume_cuts_rows_that_will_be_written_again(tmp_path: Path) -> None:
    with metrics_of_steps(tmp_path, 1, 8) as first:
        first.event("start", step=0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # killed while writing
    second = open_metrics(tmp_path, incarnation=2, start_step=5)
    assert [r["step"] for r in rows_of(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    second.event("resume", step=5)
    for step in (6, 7):
        second.step(replace(ROW, step=step, loss=1.0))
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [r["loss"] for r in rows] == [2.5] * 5 + [1.0] * 2
    assert [e["incarnation"] for e in rows_of(tmp_path / "events.jsonl")] == [1, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["events.jsonl", "metrics.jsonl"]


def metrics_of_steps(run_dir: Path, first: int, last: int) -> Metrics:
    metrics = open_metrics(run_dir)
    for step in range(first, last + 1):
        metrics.step(replace(ROW, step=step))
    return metrics


def test_half_an_event_of_a_killed_run_does_not_spoil_the_next(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "start"}\n{"event": "sa')
    open_metrics(tmp_path).event("resume", step=5)
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[2])["event"] == "resume"


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    stream = io.StringIO()
    with open_metrics(tmp_path, rank=1, stream=stream, logging=LoggingSection()) as metrics:
        metrics.step(ROW)
        metrics.event("save", step=1)
        metrics.evaluation(1, 2.0, num_tokens=5)
        metrics.message("hello")
    assert list(tmp_path.iterdir()) == [] and stream.getvalue() == ""


def test_rows_are_json_even_when_a_number_is_not_finite(tmp_path: Path) -> None:
    open_metrics(tmp_path).step(replace(ROW, grad_norm=float("inf")))
    assert rows_of(tmp_path / "metrics.jsonl")[0]["grad_norm"] is None


def test_a_full_disk_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunFailed, match="events.jsonl: cannot be written: No space left on device"):
        open_metrics(tmp_path).event("start", step=0)


def test_plain_lines_are_aligned_and_also_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="decompft")
    stream = io.StringIO()
    metrics = open_metrics(tmp_path, stream=stream, total_steps=1000)
    rows = [
        ROW,
        replace(ROW, step=37, loss=0.0312, learning_rate=0.0, grad_norm=1234.5, step_s=300.0),
        replace(ROW, step=1000, loss=11.25, grad_norm=1e-7, tokens_per_s=1_234_567.0),
        replace(ROW, step=1000, tokens_per_s=987.0, peak_mem_bytes=130 * 2**30),
    ]
    for row in rows:
        metrics.step(row)
    lines = stream.getvalue().splitlines()
    assert lines[0] == (
        "step    1/1000  loss   2.5000  lr 2.00e-04  grad       0.5  "
        "   12,346 tok/s    3.00 GiB  left  0:33:18"
    )
    assert lines[2].endswith("left  0:00:00")
    assert len({len(line) for line in lines}) == 1
    for word in ("loss", "lr", "grad", "tok/s", "GiB", "left"):
        assert len({line.index(word) for line in lines}) == 1, word
    assert [r.getMessage() for r in caplog.records] == lines


def test_messages_and_evaluations_stand_between_the_lines(tmp_path: Path) -> None:
    stream = io.StringIO()
    metrics = open_metrics(tmp_path, stream=stream)
    metrics.evaluation(0, 3.25, num_tokens=12_000)
    metrics.step(ROW)
    metrics.message("saved checkpoints/step-00000001")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "eval at step 0: loss 3.2500 over 12,000 tokens"
    assert lines[1].startswith("step  1/10") and lines[2] == "saved checkpoints/step-00000001"
    assert rows_of(tmp_path / "events.jsonl")[0]["loss"] == 3.25
    assert len(rows_of(tmp_path / "metrics.jsonl")) == 1


def test_a_terminal_shows_one_bar_with_messages_above(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    main, side = pty.openpty()
    with ThreadPoolExecutor(1) as pool, os.fdopen(side, "w") as stream:
        reader = pool.submit(read_all, main)
        console = Console(stream, total_steps=200, start_step=100)
        for step in range(101, 201):
            console.step(replace(ROW, step=step))
        console.message("saved [step] 200")  # no markup
        console.close()
        stream.close()
        shown = reader.result()
    assert "step 200/200" in shown and "loss   2.5000" in shown and "\x1b[" in shown
    assert "saved [step] 200\r\n" in shown
    assert shown.count("loss") < 50  # drawn by the clock, not by each of the 100 steps


def read_all(terminal: int) -> str:
    """What a terminal is sent until the other side closes it; a pty holds only 4 KiB by itself."""
    shown = b""
    with os.fdopen(terminal, "rb", buffering=0) as file, suppress(OSError):  # Linux ends a pty with EIO
        while chunk := file.read(1 << 16):
            shown += chunk
    return shown.decode()


def test_a_closed_pipe_does_not_end_the_run(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    metrics = open_metrics(tmp_path, stream=stream)
    metrics.step(ROW)
    metrics.step(replace(ROW, step=2))
    assert len(rows_of(tmp_path / "metrics.jsonl")) == 2
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_tensorboard_gets_every_number_and_forgets_what_a_resume_repeats(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    for incarnation, start, last in ((1, 0, 4), (2, 2, 3)):
        loss = float(incarnation)
        options = {"incarnation": incarnation, "start_step": start, "logging": LoggingSection()}
        with open_metrics(tmp_path, **options) as metrics:
            for step in range(start + 1, last + 1):
                metrics.step(replace(ROW, step=step, loss=loss))
            metrics.evaluation(last, 0.5, num_tokens=9)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert {"train/learning_rate", "train/tokens_per_s", "eval/loss"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("section", [
    LoggingSection(tensorboard=False, wandb=WandbSection(project="p")),
    LoggingSection(tensorboard=False, mlflow=MlflowSection(tracking_uri="file:x", experiment="e")),
    LoggingSection(),
])  # fmt: skip
def test_a_missing_tracker_says_what_to_install(
    tmp_path: Path, section: LoggingSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "wandb" if section.wandb else "mlflow" if section.mlflow else "tensorboard"
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(UserError, match=f"logging.{name}: the package {name} is not installed") as error:
        open_trackers(section, tmp_path, start_step=0)
    assert "pip install" in error.value.hint


def test_trackers_are_not_imported_with_the_module() -> None:
    code = (
        "import sys, decompft.launcher.worker.metrics; "
        "print([m for m in ('wandb', 'mlflow', 'tensorboard', 'rich') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
