"""Steps of an epoch, known before tokenizing where rows are lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from decompft.launcher.epochs import steps_per_epoch
from decompft.launcher.source import parse


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"instruction": "a", "output": "b"}] * 30
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    return tmp_path


def recipe(folder: Path, source: dict | None = None, **data):
    text = {
        "model": {"id": "x/y"},
        "data": {"train": [{"path": "a.jsonl", **(source or {})}], "packing": False, **data},
        "train": {"epochs": 1, "global_batch_size": 4},
    }
    return parse(json.dumps(text), where="test", base_dir=folder)


def test_lines_over_the_global_batch(folder: Path) -> None:
    assert steps_per_epoch(recipe(folder)) == 30 / 4


@pytest.mark.parametrize(
    "source, rows", [({"weight": 2.0}, 60), ({"weight": 0.5}, 15), ({"max_records": 8}, 8)]
)
def test_weights_and_limits_count(folder: Path, source: dict, rows: int) -> None:
    assert steps_per_epoch(recipe(folder, source)) == rows / 4


@pytest.mark.parametrize("data", [{"packing": True}, {"eval_fraction": 0.1}, {"too_long": "drop"}])
def test_unknown_where_rows_are_not_lines(folder: Path, data: dict) -> None:
    assert steps_per_epoch(recipe(folder, **data)) is None
    assert steps_per_epoch(recipe(folder, {"path": "missing.jsonl"})) is None
