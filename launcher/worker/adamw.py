"""torch's fused AdamW, whose step costs the host a tenth.

Before its one kernel torch looks at every tensor several times: 896 tensors of MAP over 224 linears take 5 ms, in which
a GPU that has just given the gradients' norm away waits. What it looks for cannot change between two steps here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

# those of a group that the quick step computes with
_FLAGS = ("amsgrad", "maximize", "differentiable", "capturable")


class QuickAdamW(torch.optim.AdamW):
    """AdamW(fused=True) bit for bit, with its state. The first step, or one that finds new tensors, is torch's own."""

    _is_plain: bool | None = None  # known after the first step, when the tensors are those of the engine

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        found = None if closure is not None else self._gathered()
        if found is None:
            return super().step(closure)
        for group, params, states in found:
            steps = [s["step"] for s in states]
            beta1, beta2 = group["betas"]
            gradients = [p.grad for p in params if p.grad is not None]
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                params, gradients, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states],
                [], steps, amsgrad=False, lr=group["lr"], beta1=beta1, beta2=beta2,
                weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip
        return None

    def _gathered(self) -> list[tuple[dict[str, Any], list[Tensor], list[dict[str, Tensor]]]] | None:
        """Of each group, tensors with a gradient and their states; None where torch's own step is wanted."""
        found = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            states = [self.state[p] for p in params]
            if not all(states):
                return None
            if params:
                found.append((group, params, states))
        if self._is_plain is None:
            self._is_plain = self._all_plain()
        return found if self._is_plain else None

    def _all_plain(self) -> bool:
        """Of one kind, on one device, as one call of the kernel wants them."""
        params = [p for group in self.param_groups for p in group["params"]]
        kinds = {(p.device, p.dtype) for p in params}
        flags = any(group[flag] for group in self.param_groups for flag in _FLAGS)
        return len(kinds) == 1 and not flags and all(type(p) in (Tensor, torch.nn.Parameter) for p in params)
