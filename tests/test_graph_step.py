"""The script that times recorded passes, at toy size and with a stand-in for CUDA graphs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from recording import FakeRecorder
from tiny import LLAMA

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import graph_step  # noqa: E402

SIZES = ["data.sequence_length=32", "train.micro_batch_size=1", "train.global_batch_size=1"]


@pytest.mark.dist
def test_methods_are_timed_recorded_beside_plain(tmp_path, capsys):
    out = tmp_path / "table.json"
    sizes = ["--override", f"model.config={json.dumps(LLAMA)}", *SIZES, "quantization.compute=float32"]
    asked = ["--cases", "lora", "map", "--micro", "1", "2", "--steps", "2", "--out", str(out), *sizes]
    assert graph_step.main(asked, recorder=FakeRecorder) == 0
    rows = json.loads(out.read_text())
    assert [(row["case"], row["micro_batch"]) for row in rows] == [
        ("lora", 1),
        ("lora", 2),
        ("map", 1),
        ("map", 2),
    ]
    assert all(row["loss_difference"] < 1e-4 and row["recorded_over_plain"] > 0 for row in rows)
    assert all(len(row["recording"]) == 1 and not row["said"] for row in rows)
    assert "ms recorded, ratio" in capsys.readouterr().out
