"""One autograd node for a frozen linear, the thin product of its adapter, and the scalars that weigh them.

y = p (W x) + q B (A x_d) + bias

Shapes, with the tokens of all leading dimensions as T: x, x_d (T, in), W (out, in), A (rank, in),
B (out, rank), y (T, out); p and q are scalars (1,) in float32 that may depend on A, B and further
trained tensors (`Thin`). x_d is x, or x after dropout.

Saved for backward: x, x_d, A x_d (T, rank) and the packed weight, which is dequantized again.
No gradient of W is made. A format may round x inside its product (int8 with an outlier threshold):
the backward pass is that of the dequantized weight all the same. Gradients of the scalars need no
further pass over the weight: dp = <dy, W x> = <W^T dy, x>, and W^T dy is computed for dx anyway;
dq = <B^T dy, A x_d>.
Scalars and factors live in one node because their arithmetic is rank x rank: what costs is the
number of launches and of autograd nodes, of which a model has one per linear layer.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from decompft.adapters.frozen.base import FrozenLinear

Grads = tuple[Tensor | None, ...]


class Thin(Protocol):
    """What an adapter gives the node: its scalars, and how their gradients reach the trained tensors."""

    def scales(self, *trained: Tensor) -> tuple[Tensor | None, Tensor | float, tuple[Tensor, ...]]:
        """p (None: 1, and not trained), q, and what `scales_backward` needs."""
        ...

    def scales_backward(self, saved: tuple[Tensor, ...], dp: Tensor, dq: Tensor) -> Grads:
        """Gradients of all trained tensors through p and q; not called where q is a float."""
        ...


def frozen_linear(
    x: Tensor,
    base: FrozenLinear,
    *,
    dropped: Tensor | None = None,
    thin: Thin | None = None,
    trained: tuple[Tensor, ...] = (),
) -> Tensor:
    """x (..., in) -> y (..., out) as in the module docstring.

    Args:
        dropped: x after dropout, for the thin branch only; default x itself.
        thin: None for the bare base.
        trained: A, B and what else `thin` scales with, float32.
    """
    return _FrozenLinear.apply(x, dropped, base, thin, len(trained), *trained, *base.storage())


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        base: FrozenLinear,
        thin: Thin | None,
        num_trained: int,
        *tensors: Tensor,
    ) -> Tensor:
        trained, storage = tensors[:num_trained], tensors[num_trained:]
        p, q, scales = (None, 1.0, ()) if thin is None else thin.scales(*trained)
        x_TI = x.reshape(-1, base.in_features)
        y_TO = base.product(x_TI, storage, p)
        h_TR = None
        if thin is not None:
            A, B = trained[:2]
            d_TI = x_TI if dropped is None else dropped.reshape(-1, base.in_features)
            h_TR = d_TI @ A.to(x.dtype).T
            y_TO.addmm_((h_TR * q).to(x.dtype), B.to(x.dtype).T)
        if base.bias is not None:
            y_TO += base.bias.to(x.dtype)
        q_tensor, ctx.q = (q, None) if isinstance(q, Tensor) else (None, q)
        ctx.save_for_backward(x, dropped, h_TR, p, q_tensor, *trained, *storage, *scales)
        ctx.base, ctx.thin, ctx.counts = base, thin, (num_trained, len(storage))
        return y_TO.view(*x.shape[:-1], base.out_features)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        (dy,) = grads
        x, dropped, h_TR, p, q_tensor, *rest = ctx.saved_tensors
        num_trained, num_storage = ctx.counts
        trained, rest = rest[:num_trained], rest[num_trained:]
        storage, scales = tuple(rest[:num_storage]), tuple(rest[num_storage:])
        base: FrozenLinear = ctx.base
        dtype = dy.dtype
        g_TO = dy.reshape(-1, base.out_features)
        dx_TI = dd_TI = None
        d_trained: Grads = (None,) * num_trained
        if ctx.needs_input_grad[0] or p is not None:
            dx_TI = g_TO @ base.unpack(storage, dtype, p)  # p W^T dy
        if num_trained:
            A, B = trained[:2]
            x_TI = x.reshape(-1, base.in_features)
            d_TI = x_TI if dropped is None else dropped.reshape(-1, base.in_features)
            gB_TR = g_TO @ B.to(dtype)
            q = ctx.q if q_tensor is None else q_tensor
            gBq_TR = (gB_TR * q).to(dtype)
            dA, dB = (gBq_TR.T @ d_TI).float(), (g_TO.T @ (h_TR * q).to(dtype)).float()
            d_trained = (dA, dB)
            if q_tensor is not None:
                # products are rounded once to the compute dtype, then summed in float32. dx holds
                # p W^T dy: at p == 0 exactly the quotient is NaN and stops the run, in words
                dp = torch.sum(x_TI * dx_TI, dtype=torch.float32) / p
                dq = torch.sum(gB_TR * h_TR, dtype=torch.float32)
                through = ctx.thin.scales_backward(scales, dp, dq)
                d_trained = (dA.add_(through[0]), dB.add_(through[1]), *through[2:])
            if dropped is not None and ctx.needs_input_grad[1]:
                dd_TI = (gBq_TR @ A.to(dtype)).view(dropped.shape)
            elif ctx.needs_input_grad[0] and dx_TI is not None:
                dx_TI.addmm_(gBq_TR, A.to(dtype))
        dx = dx_TI.view(x.shape) if ctx.needs_input_grad[0] and dx_TI is not None else None
        return (dx, dd_TI, None, None, None, *d_trained, *(None for _ in storage))
