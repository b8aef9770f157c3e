"""`inspect data` shows what is trained, in training order, with the counts of the whole set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from decompft.launcher.worker.tools.inspect_data import main

RECIPE = """
model: {{config: {{model_type: llama}}, weights: random}}
data:
  train: [{{path: train.jsonl, format: completion}}]
  sequence_length: 64
  shuffle: false
  cache_dir: {cache}
train: {{max_steps: 4, global_batch_size: 4}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    records = [{"prompt": f"say {i}: ", "completion": "\u4f60\u597d" if i == 0 else "no"} for i in range(5)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    path = tmp_path / "my.yaml"
    path.write_text(RECIPE.format(cache=tmp_path / "cache"))
    return path


def test_trained_tokens_are_in_brackets_without_colour(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(recipe), "--num=2"])
    out = capsys.readouterr().out
    assert "say 0: [[\u4f60\u597d</s>]]" in out
    assert "say 1: [[no</s>]]" in out and "say 2" not in out
    assert "14 tokens, 7 targets with loss, document 1 of" in out
    assert "rows" in out and "% full" in out


def test_overrides_and_streams_are_shown_too(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(recipe), "data.streaming=true", "data.packing=false", "--num=1"])
    out = capsys.readouterr().out
    assert "document 1 of 1 in row 0" in out and "streamed" in out
