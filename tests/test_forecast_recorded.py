"""What the forecast says of recorded passes."""

from __future__ import annotations

from typing import Any

from test_forecast import layout, run, sizes, work

from decompft.launcher.forecast import forecast
from decompft.launcher.forecast_fitted import RECORDED_BYTES, RECORDED_EVALUATION_BYTES
from decompft.launcher.plan import RECORDED, Forecast


def test_recorded_passes_reserve_what_no_tensor_shows_and_evaluations_more() -> None:
    def memory(strategy: str = "single", **data: Any) -> Forecast:
        wanted = work(train={"cuda_graph": True}, data=data)
        return forecast(wanted, layout(strategy=strategy, world_size=2), capacity_bytes=None)

    assert RECORDED not in run(work())
    alone, evaluated = memory(), memory(eval_fraction=0.1)
    assert sizes(alone)[RECORDED] == RECORDED_BYTES
    assert sizes(evaluated)[RECORDED] == RECORDED_BYTES + RECORDED_EVALUATION_BYTES
    assert alone.allocated_bytes == evaluated.allocated_bytes
    # on the way to a layout that can be, one that cannot be recorded is forecast as it would run
    assert RECORDED not in sizes(memory("fsdp"))
