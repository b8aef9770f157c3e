"""One autograd node for a frozen linear and the thin product of its adapter.

y = p (W x) + q B (A x_d) + bias

Shapes, with the tokens of all leading dimensions as T: x, x_d (T, in), W (out, in), A (rank, in),
B (out, rank), y (T, out); p and q are scalars (1,) in float32. x_d is x, or x after dropout.

Saved for backward: x, x_d, A x_d (T, rank) and the packed weight, which is dequantized again.
No gradient of W is made. Gradients of the scalars need no further pass over the weight:
dp = <dy, W x> = <W^T dy, x>, and W^T dy is computed for dx anyway; dq = <B^T dy, A x_d>.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from decompft.adapters.frozen.base import FrozenLinear


def frozen_linear(
    x: Tensor,
    base: FrozenLinear,
    *,
    dropped: Tensor | None = None,
    A: Tensor | None = None,
    B: Tensor | None = None,
    base_scale: Tensor | None = None,
    thin_scale: Tensor | float = 1.0,
) -> Tensor:
    """x (..., in) -> y (..., out) as in the module docstring.

    Args:
        dropped: x after dropout, for the thin branch only; default x itself.
        A, B: the adapter's factors in float32; both or none.
        base_scale: p, or None for 1.
        thin_scale: q; a tensor takes part in autograd.
    """
    return _FrozenLinear.apply(x, dropped, A, B, base_scale, thin_scale, base, *base.storage())


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        p: Tensor | None,
        q: Tensor | float,
        base: FrozenLinear,
        *storage: Tensor,
    ) -> Tensor:
        x_TI = x.reshape(-1, base.in_features)
        y_TO = x_TI @ base.unpack(storage, x.dtype, p).T
        h_TR = None
        if A is not None and B is not None:
            d_TI = x_TI if dropped is None else dropped.reshape(-1, base.in_features)
            h_TR = d_TI @ A.to(x.dtype).T
            y_TO.addmm_(h_TR, (B * q).to(x.dtype).T)
        if base.bias is not None:
            y_TO += base.bias.to(x.dtype)
        q_tensor = q if isinstance(q, Tensor) else None
        ctx.save_for_backward(x, dropped, h_TR, A, B, p, q_tensor, *storage)
        ctx.base, ctx.q = base, (None if q_tensor is not None else q)
        return y_TO.view(*x.shape[:-1], base.out_features)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, dropped, h_TR, A, B, p, q_tensor, *storage = ctx.saved_tensors
        base: FrozenLinear = ctx.base
        need_x, need_d, need_A, need_B, need_p, need_q = ctx.needs_input_grad[:6]
        q = ctx.q if q_tensor is None else q_tensor
        g_TO = dy.reshape(-1, base.out_features)
        x_TI = x.reshape(-1, base.in_features)
        dx = dd = dA = dB = dp = dq = None
        if need_x or need_p:
            dx = g_TO @ base.unpack(tuple(storage), g_TO.dtype, p)  # p W^T dy
        if need_p:
            # dx holds p W^T dy; at p == 0 exactly the slope is lost and 0 stands for it
            slope = torch.sum(x_TI * dx, dtype=torch.float32)
            dp = torch.where(p == 0, torch.zeros_like(p), slope / p)
        if A is not None:
            gB_TR = g_TO @ B.to(g_TO.dtype)
            d_TI = x_TI if dropped is None else dropped.reshape(-1, base.in_features)
            if need_A:
                dA = (gB_TR.T @ d_TI).float() * q
            if need_B:
                dB = (g_TO.T @ h_TR).float() * q
            if need_q:
                dq = torch.sum(gB_TR.float() * h_TR.float()).reshape(q_tensor.shape)
            if dropped is not None and need_d:
                dd = (gB_TR @ (A * q).to(g_TO.dtype)).view(dropped.shape)
            elif need_x:
                dx.addmm_(gB_TR, (A * q).to(g_TO.dtype))
        dx = dx.view(x.shape) if need_x else None
        return (dx, dd, dA, dB, dp, dq, None, *(None for _ in storage))

