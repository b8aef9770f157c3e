"""The sum of cross-entropies over trained tokens, without ever holding all logits.

The head is applied to chunks of tokens, and the gradient of the hidden states is made in the
forward pass, so that one chunk of logits is the most that lives (the idea of cut cross-entropy,
Wijmans et al., 2024, arXiv:2411.09009, in plain torch).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 1024


def token_loss_sum(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None
) -> Tensor:
    """Sum over tokens of -log p(target), float32 scalar.

    Args:
        hidden: (T, H) final hidden states of the tokens that have a target.
        weight: (V, H) of the head; its gradient is made only if it trains.
        bias: (V,) or None.
        targets: (T,) int64.
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2), None for none.
    """
    if not torch.is_grad_enabled():  # a Function is told of the tensors, not of the mode
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    loss: Tensor = _TokenLoss.apply(hidden, weight, bias, targets, softcap)
    return loss


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """(T, H) -> float32 logits (T, V)."""
    logits = (hidden @ weight.to(hidden.dtype).T).float()
    if bias is not None:
        logits += bias.float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None
    ) -> Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None
        total = hidden.new_zeros((), dtype=torch.float32)
        cast = weight.to(hidden.dtype)
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            h_TH = hidden[start : start + CHUNK_TOKENS]
            target_T1 = targets[start : start + CHUNK_TOKENS, None]
            logits_TV = head_logits(h_TH, cast, bias, softcap)
            norm_T1 = torch.logsumexp(logits_TV, dim=1, keepdim=True)
            total += torch.sum(norm_T1 - logits_TV.gather(1, target_T1))
            if not any((need_hidden, need_weight, need_bias)):
                continue
            slope = None if softcap is None else 1 - (logits_TV / softcap) ** 2
            d_TV = logits_TV.sub_(norm_T1).exp_()
            d_TV.scatter_add_(1, target_T1, torch.full_like(norm_T1, -1.0))
            if slope is not None:
                d_TV *= slope
            if d_bias is not None:
                d_bias += d_TV.sum(0)
            d_TV = d_TV.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_TV, cast, out=d_hidden[start : start + CHUNK_TOKENS])
            if d_weight is not None:
                d_weight += d_TV.T @ h_TH
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grads
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        if d_hidden is not None:
            # in float32 and rounded once: a rounded divisor would rescale every gradient by the same 0.4 %
            d_hidden = torch.mul(d_hidden, scale.view(1, 1), out=torch.empty_like(d_hidden))
        d_weight = None if d_weight is None else d_weight * scale
        d_bias = None if d_bias is None else d_bias * scale
        return d_hidden, d_weight, d_bias, None, None
