"""benchmarks/scaling.py: its cells are recipes that plan, each with a name of its own, and the page draws them."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from scaling import SETTINGS, Cell, cells, overrides
from scaling_page import constants, draw, plan_of, simulated, table


def rows(device: str) -> list[dict[str, object]]:
    """As a finished sweep leaves them, each as fast as every other."""
    from dataclasses import asdict

    setting = SETTINGS[device]
    words = {
        cell.name: [w.replace(".bench/", "/x/") for w in overrides(cell, setting)] for cell in cells(setting)
    }
    found = []
    for cell in cells(setting):
        quoted = " ".join(f"'{word}'" for word in words[cell.name])
        command = f"decompft launch benchmarks/{setting.recipe.name} {quoted}"
        found.append({**asdict(cell), "name": cell.name, "command": command, "tokens_per_s": 1000.0})
    return found


@pytest.mark.parametrize("device", SETTINGS)
def test_every_cell_plans_as_it_is_named(device: str) -> None:
    found = rows(device)
    assert len({row["name"] for row in found}) == len(found) >= 15
    for row in found:
        plan = plan_of(row, device)
        assert plan.strategy == row["strategy"] and plan.world.size == row["ranks"]
        assert plan.batch.micro_size == row["micro_batch"]
        assert plan.recipe.data.sequence_length == row["sequence_length"]


@pytest.mark.parametrize("device", SETTINGS)
def test_page_draws_points_and_the_simulators_line(device: str) -> None:
    found = rows(device)
    rates, joined = constants(device, found, None)
    for row in found:
        row["simulated"] = simulated(row, device, rates, joined)
        assert row["simulated"] > 0
    assert len(ElementTree.fromstring(draw(found)).findall(".//{*}circle")) == len(found)
    assert table(found).count("\n") == len(found) + 2


def test_names_tell_cells_of_a_sweep_apart() -> None:
    given = {"strategy": "single", "sequence_length": 8, "adapter_rank": 4, "layers": 1, "micro_batch": 1}
    assert Cell(sweep="ranks", ranks=1, **given).name != Cell(sweep="ranks", ranks=2, **given).name  # type: ignore[arg-type]
