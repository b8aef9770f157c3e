"""silu(gate(x)) * up(x) in two nodes of autograd, of which the second adds the thin branches of the first.

The node of linear.py that computes gate and up leaves out their branches, whose h it has; swiglu.py adds them where it
reads the arrays anyway. Of that the first node need not know in its backward pass: what comes back to an output is what
would come back to it with its branch added, and all its gradients follow from that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from decompft.adapters.frozen.linear import Member, frozen_linears
from decompft.adapters.frozen.thin import Later
from decompft.adapters.kernels import swiglu as kernel


def gated(x: Tensor, members: Sequence[Member]) -> tuple[Tensor, Callable[[], Tensor]]:
    """x (..., in) -> silu(y_gate) * y_up (..., out) of the members gate and up, and how to make it again.

    Only where the kernel `fits` x. It is made again of what the second node saves, so before that node's backward pass.
    """
    later = Later(kernel.takes, len(members))
    gate, up = frozen_linears(x, members, later=later)
    of_gate, of_up = later.branches
    # both nodes hold `later` for as long as the graph is there: from here on these are saved tensors as all others,
    # which a recomputation lets go of and a backward pass frees
    later.branches = []
    factors = (*(of_gate or (None, None)), *(of_up or (None, None)))
    y: Tensor = _SwiGlu.apply(gate, up, later, *factors)
    # without their nodes, or what holds this would keep itself
    given = gate.detach(), up.detach()
    return y, lambda: _activation(*given, factors)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, later: Later, *factors: Tensor | None) -> Tensor:
        ctx.later = later
        ctx.save_for_backward(gate, up, *factors)
        return _activation(gate, up, factors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        gate, up, *factors = ctx.saved_tensors
        wanted = tuple(ctx.later.wants_dots)
        # gate and up become what comes back to them: nobody reads them after this
        found = kernel.backward(_flat(dy).contiguous(), _flat(gate), _flat(up), *_branches(factors), wanted)
        # a kernel's writes are not counted by autograd: a second walk through this graph is to be an error, not wrong
        increment_version((gate, up))
        ctx.later.dots = list(found)
        return gate, up, None, *[None] * len(factors)


def _activation(gate: Tensor, up: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    return kernel.forward(_flat(gate), _flat(up), *_branches(factors)).view(gate.shape)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _branches(factors: Sequence[Tensor | None]) -> tuple[kernel.Branch | None, kernel.Branch | None]:
    gate_h, gate_w, up_h, up_w = factors
    return (
        None if gate_h is None or gate_w is None else (gate_h, gate_w),
        None if up_h is None or up_w is None else (up_h, up_w),
    )
