"""torch's fused AdamW, whose step costs the host a tenth.

Before its one kernel torch looks at every tensor several times: 896 tensors of MAP over 224 linears take 5 ms, for
which a GPU would wait that has just given the gradients' norm away. What it looks for cannot change between two steps
here, and what is left is done before (`gather`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

# a group, its parameters, gradients, both moments, steps
_Group = tuple[dict[str, Any], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
# those of a group that the quick step computes with
_FLAGS = ("amsgrad", "maximize", "differentiable", "capturable")


class QuickAdamW(torch.optim.AdamW):
    """AdamW(fused=True) bit for bit, with its state. The first step, or one that finds new tensors, is torch's own."""

    _is_plain: bool | None = None  # known after the first step, when the tensors are those of the engine
    _ready: list[_Group] | None = None

    def gather(self) -> None:
        """What the next `step` needs of the host, while the device is busy; gradients stay the tensors they are."""
        self._ready = self._gathered()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        found = None if closure is not None else self._ready or self._gathered()
        self._ready = None
        if found is None:
            return super().step(closure)
        for group, params, gradients, averages, squares, steps in found:
            beta1, beta2 = group["betas"]
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                params, gradients, averages, squares, [], steps, amsgrad=False, lr=group["lr"],
                beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip
        return None

    def _gathered(self) -> list[_Group] | None:
        """Of each group, tensors with a gradient and their states; None where torch's own step is wanted."""
        found = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            states = [self.state[p] for p in params]
            if not all(states):
                return None
            if params:
                averages, squares, steps = (
                    [s[kind] for s in states] for kind in ("exp_avg", "exp_avg_sq", "step")
                )
                gradients = [p.grad for p in params if p.grad is not None]
                found.append((group, params, gradients, averages, squares, steps))
        if self._is_plain is None:
            self._is_plain = self._all_plain()
        return found if self._is_plain else None

    def _all_plain(self) -> bool:
        """Of one kind, on one device, as one call of the kernel wants them."""
        params = [p for group in self.param_groups for p in group["params"]]
        kinds = {(p.device, p.dtype) for p in params}
        flags = any(group[flag] for group in self.param_groups for flag in _FLAGS)
        return len(kinds) == 1 and not flags and all(type(p) in (Tensor, torch.nn.Parameter) for p in params)
