"""How many blocks `train.recompute: selective` runs again: as few as fit, or those that the recipe says."""

from __future__ import annotations

from typing import Any

import pytest
from planning import GIB, gpus, make
from pydantic import ValidationError

from decompft.launcher import planner
from decompft.launcher.errors import PlanError
from decompft.launcher.fit import Budget


def test_auto_runs_as_few_mlps_again_as_fit() -> None:
    def need(some: int | None) -> int:
        train = {"micro_batch_size": 4, "recompute": "selective", "recompute_blocks": some}
        return make(gpus(1, 80), train=train).forecast.total_bytes

    plan = make(gpus(1, 24), train={"micro_batch_size": 4})
    some = plan.recompute_blocks
    assert plan.recompute == "selective" and some is not None and 1 < some < 32
    assert f"{some} blocks" in plan.strategy_reason
    room = 24 * GIB * (1 - Budget.HEADROOM - planner.FILLED)
    assert need(some) <= room < need(some - 1) and need(32) == need(None) < need(some)
    asked = {"micro_batch_size": 4, "recompute": "selective"}
    assert make(gpus(1, 24), train=asked).recompute_blocks is None, "all, where it was asked for"


def test_more_blocks_than_there_are_is_an_error() -> None:
    asked: dict[str, Any] = {"recompute": "selective", "recompute_blocks": 33}
    with pytest.raises(PlanError, match="the model has 32 blocks"):
        make(gpus(1, 80), train=asked)


def test_blocks_are_selectives_alone() -> None:
    with pytest.raises(ValidationError, match="selective alone"):
        make(gpus(1, 80), train={"recompute": "full", "recompute_blocks": 3})


def test_the_faster_choice_that_is_named_is_another_mode() -> None:
    """Selective at a larger micro batch, which did not fit either, is the mode that was taken."""
    plan = make(gpus(1, 12))
    assert plan.recompute == "selective" and plan.recompute_blocks is not None
    assert "; single with recomputation of norms would need" in plan.strategy_reason
