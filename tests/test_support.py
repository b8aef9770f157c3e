"""The pages that say what combines with what are what the planner says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from decompft.adapters.formats import FORMAT_SPECS
from decompft.adapters.spec import ADAPTER_SPECS
from decompft.launcher.strategies import STRATEGIES
from decompft.launcher.support import cell, gpu_rows, support_page, support_table

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "support.md"
README = ROOT / "README.md"
MARKS = ("<!-- support-table -->\n", "<!-- /support-table -->")
RESULTS = ROOT / "benchmarks" / "results" / "matrix.json"


def test_the_page_is_current(update_golden: bool) -> None:
    text = support_page(gpu_rows(RESULTS))
    if update_golden:
        PAGE.write_text(text, encoding="ascii")
    assert PAGE.read_text(encoding="ascii") == text, "run: pytest tests/test_support.py --update-golden"


def test_the_readme_table_is_current(update_golden: bool) -> None:
    before, _, rest = README.read_text().partition(MARKS[0])
    found, _, after = rest.partition(MARKS[1])
    if update_golden:
        found = support_table()
        README.write_text(before + MARKS[0] + found + MARKS[1] + after)
    assert found == support_table()


def test_the_table_names_every_format_and_adapter_and_has_a_column_a_strategy() -> None:
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in support_table().splitlines()]
    assert lines[0][1:] == list(STRATEGIES)
    names = [name for line in lines[2:] for name in line[0].split("`")[1::2]]
    assert sorted(names) == sorted([*FORMAT_SPECS, *ADAPTER_SPECS])
    assert {len(line) for line in lines} == {len(STRATEGIES) + 1}


def test_a_refused_cell_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    picky = dataclasses.replace(ADAPTER_SPECS["lora"], name="picky", forbids_engines=("zero2",))
    monkeypatch.setitem(ADAPTER_SPECS, "picky", picky)
    page = support_page({})
    assert "- `picky` under `zero2`: adapter.method: picky does not run under zero2; use" in page
    assert "adapters `picky` | yes | yes | yes | yes | yes | no | yes |" in support_table()
    assert "- `train.optimizer: adamw8bit` under `zero1`: train.optimizer: adamw8bit does not" in page
    assert "- `parallel.cpu_offload: true` under `ddp`: parallel.cpu_offload works with" in page


def test_cells_that_ran_on_gpus_are_marked(tmp_path: Path) -> None:
    rows = [
        {"format": "nf4", "strategy": "fsdp", "ranks": 2, "ok": True},
        {"format": "int8", "strategy": "zero3", "ranks": 2, "ok": False},
    ]
    (tmp_path / "matrix.json").write_text(json.dumps(rows))
    page = support_page(gpu_rows(tmp_path / "matrix.json"))
    assert "GPU: 2" in next(line for line in page.splitlines() if line.startswith("| `nf4`"))
    assert "GPU: failed" in next(line for line in page.splitlines() if line.startswith("| `int8`"))
    assert support_page(gpu_rows(tmp_path / "none.json")).count("GPU: not run") > 20


def test_a_format_needs_no_refusal() -> None:
    assert {cell(s, quantization={"format": f}) for s in STRATEGIES for f in FORMAT_SPECS} == {None}
