"""The quick step of AdamW is torch's, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decompft.launcher.worker.adamw import QuickAdamW

Make = Callable[..., torch.optim.AdamW]


def parameters() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=draw)) for size in ((4, 3), (5,), (1,), (2, 2, 2))]


def run(make: Make, num_steps: int, *, without: tuple[int, int] | None = None) -> tuple[list[Tensor], Any]:
    """Parameters and state after steps in two groups; `without`: (step, parameter) that has no gradient then."""
    params, draw = parameters(), torch.Generator().manual_seed(1)
    groups = [
        {"params": params[:3], "lr": 0.1, "weight_decay": 0.01},
        {"params": params[3:], "lr": 0.02, "weight_decay": 0.0},
    ]
    optimizer = make(groups, fused=True, betas=(0.8, 0.95), eps=1e-6)
    for step in range(num_steps):
        for k, p in enumerate(params):
            gradient = torch.randn(p.shape, generator=draw)
            p.grad = None if without == (step, k) else gradient
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        if step == 2:  # as a resume sets it
            state = optimizer.state[params[0]]
            optimizer.state[params[0]] = {n: t.clone() * 0.5 for n, t in state.items()}
        if isinstance(optimizer, QuickAdamW) and step % 2:
            optimizer.gather()
        optimizer.step()
    return [p.detach() for p in params], optimizer.state_dict()


@pytest.mark.parametrize("without", [None, (0, 1), (3, 2)], ids=["all", "not at first", "not once"])
def test_equals_torchs_own(without: tuple[int, int] | None) -> None:
    expected, state = run(torch.optim.AdamW, 5, without=without)
    found, found_state = run(QuickAdamW, 5, without=without)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert found_state["param_groups"] == state["param_groups"]
    for k, tensors in state["state"].items():
        assert all(torch.equal(found_state["state"][k][name], t) for name, t in tensors.items())


def test_only_the_first_step_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    original = QuickAdamW._init_group
    monkeypatch.setattr(
        QuickAdamW, "_init_group", lambda self, *a: (looked_at.append(1), original(self, *a))[1]
    )
    run(QuickAdamW, 5)
    assert len(looked_at) == 2, "one for each group"


@pytest.mark.parametrize("odd", [{"amsgrad": True}, {"maximize": True}])
def test_what_it_does_not_know_is_torchs(odd: dict[str, bool]) -> None:
    expected, _ = run(lambda *a, **k: torch.optim.AdamW(*a, **k, **odd), 3)
    found, _ = run(lambda *a, **k: QuickAdamW(*a, **k, **odd), 3)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_two_dtypes_are_torchs() -> None:
    def run_mixed(make: Make) -> list[Tensor]:
        params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float64))]
        optimizer = make(params, fused=True)
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        return [p.detach() for p in params]

    assert all(
        torch.equal(a, b) for a, b in zip(run_mixed(QuickAdamW), run_mixed(torch.optim.AdamW), strict=True)
    )
