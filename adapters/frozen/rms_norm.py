"""RMSNorm with a frozen weight in autograd: it saves x and rstd, and makes no gradient of the weight.

x of a block's norms goes on as the residual, too, so that two slopes come back to it, which autograd adds in a pass of
its own. `rms_norm_and_residual` takes x's place instead: autograd is told that x was changed in place, so that
whoever holds that tensor goes on from this node, and both slopes arrive here. Nothing is written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from decompft.adapters.kernels import rms_norm as kernel


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """y of an x (..., H) that `kernels.rms_norm.fits` takes."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _forward(x, weight_H, eps)[0]
    y: Tensor = _Norm.apply(x, weight_H, eps)
    return y


def rms_norm_and_residual(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """The same, after which x itself is an output of this node where that can be.

    Whatever saved x for its own backward pass must have done so after this: autograd takes x for changed.
    """
    # autograd allows no change in place of a leaf; that of a view would be one of what it looks at
    if not (torch.is_grad_enabled() and x.requires_grad) or x.is_leaf or x._is_view():
        return rms_norm(x, weight_H, eps)
    y, same = _NormAndResidual.apply(x, weight_H, eps)
    assert same is x
    return y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        y, rstd_T = _forward(x, weight_H, eps)
        ctx.save_for_backward(x, weight_H, rstd_T)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _backward(dy, None, *ctx.saved_tensors), None, None


class _NormAndResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, rstd_T = _forward(x, weight_H, eps)
        ctx.mark_dirty(x)
        ctx.set_materialize_grads(False)
        # without its node: hooks on saved tensors would let the node keep itself alive
        ctx.save_for_backward(x.detach(), weight_H, rstd_T)
        return y, x

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dx: Tensor | None) -> tuple[Tensor | None, None, None]:
        return dx if dy is None else _backward(dy, dx, *ctx.saved_tensors), None, None


def _forward(x: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y_TH, rstd_T = kernel.forward(x.view(-1, x.shape[-1]), weight_H, eps)
    return y_TH.view(x.shape), rstd_T


def _backward(dy: Tensor, other: Tensor | None, x: Tensor, weight_H: Tensor, rstd_T: Tensor) -> Tensor:
    dy_TH, x_TH = (t.reshape(-1, x.shape[-1]).contiguous() for t in (dy, x))
    other_TH = None if other is None else other.reshape(x_TH.shape).contiguous()
    return kernel.backward(dy_TH, x_TH, weight_H, rstd_T, other_TH).view(x.shape)
