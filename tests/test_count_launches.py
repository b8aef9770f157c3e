"""Joining a block's linears takes autograd nodes and operators away: counted on a CPU, never timed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from count_launches import ROWS, count  # noqa: E402


@pytest.mark.parametrize("method", ["lora", "map"])
def test_joined_linears_are_fewer_nodes_and_operators(method):
    alone, joined, rounded = (count(method, row) for row in ROWS)
    assert (alone["frozen_nodes"], joined["frozen_nodes"]) == (7, 4)  # qkv, o, gate and up, down
    # of three and of two linears one h, one gradient of the downs, one slope of x each: 3 products x (2 + 1)
    assert alone["products"] - joined["products"] == 9
    assert rounded["casts"] < joined["casts"] < alone["casts"]
    assert rounded["operators"] < joined["operators"] < alone["operators"]
