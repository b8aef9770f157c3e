"""How long a step takes: known where it was measured, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
from test_forecast import layout, work

from decompft.launcher.recompute import MODES
from decompft.launcher.speed import known_speed


@pytest.mark.parametrize("recompute, tokens_per_s", [("none", 15_516), ("full", 11_128)])
def test_speed_is_the_measured_one_on_its_own_shape(recompute: str, tokens_per_s: int) -> None:
    w = work("meta-llama/Llama-2-7b-hf")
    # 1 %: the table's 28.0 GFLOP a token is rounded
    speed = known_speed(w, layout(recompute=recompute), "NVIDIA H200")
    assert speed == pytest.approx(tokens_per_s, rel=0.01)
    two = known_speed(w, layout(recompute=recompute, strategy="ddp", world_size=2), "NVIDIA H200")
    assert two is not None and speed is not None and 1.8 * speed < two < 2 * speed


def test_estimates_lie_between_what_was_measured() -> None:
    w = work("meta-llama/Llama-2-7b-hf")
    none, selective, full, offloaded = (known_speed(w, layout(recompute=m), "NVIDIA H200") for m in MODES)
    assert none and selective and full and offloaded
    # gate's and up's products again, of those of a block
    linears = {x.name.rpartition(".")[2]: x.num_weights for x in w.shape.linears}
    share = (linears["gate_proj"] + linears["up_proj"]) / sum(linears.values())
    assert 1 / selective == pytest.approx(1 / none + share * (1 / full - 1 / none), rel=1e-3)
    assert offloaded == pytest.approx(0.97 * full)


@pytest.mark.parametrize("changes, gpu", [({}, "NVIDIA A100"), ({}, None), ({"device": "cpu"}, None)])
def test_speed_is_unknown_where_nothing_was_measured(changes: dict[str, Any], gpu: str | None) -> None:
    assert known_speed(work("meta-llama/Llama-2-7b-hf"), layout(**changes), gpu) is None


def test_speed_of_a_small_model_is_unknown() -> None:
    assert known_speed(work(), layout(), "NVIDIA H200") is None
