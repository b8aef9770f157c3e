"""The sum of cross-entropies over trained tokens, without ever holding all logits.

The head is applied to chunks of tokens, and the gradient of the hidden states is made in the
forward pass, so that one chunk of logits is the most that lives (the idea of cut cross-entropy,
Wijmans et al., 2024, arXiv:2411.09009). On a GPU a plain head's slopes are written over the logits by one kernel of
ours, in the product's dtype; all else is plain torch on float32 logits. Both round a slope once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decompft.adapters.kernels import cross_entropy
from decompft.adapters.token_rows import column_logits, with_columns
from decompft.launcher.worker.data.batches import IGNORE

CHUNK_TOKENS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedRows:
    """Rows of the head that train instead of its own, or past them."""

    rows: Tensor  # (n, H) float32
    ids: Tensor  # (n,) int64, ascending
    num_new: int  # how many ids are past the head's own rows: the last ones

    @property
    def known_ids(self) -> Tensor:
        """Those that the head has rows of."""
        return self.ids[: len(self.ids) - self.num_new]


def token_loss_sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    trained: TrainedRows | None = None,
    *,
    has_ignored: bool = False,
) -> Tensor:
    """Sum over tokens of -log p(target), float32 scalar.

    Args:
        hidden: (T, H) final hidden states of the tokens that have a target.
        weight: (V, H) of the head; its gradient is made only if it trains.
        bias: (V,) or None.
        targets: (T,) int64.
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2), None for none.
        trained: rows that stand for some of the weight's, and past them.
        has_ignored: some targets may be -100: they add 0, and the shapes do not depend on how many they are.
    """
    rows = None if trained is None else trained.rows
    if not torch.is_grad_enabled():  # a Function is told of the tensors, not of the mode
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
        rows = None if rows is None else rows.detach()
    loss: Tensor = _TokenLoss.apply(hidden, weight, bias, targets, softcap, rows, trained, has_ignored)
    return loss


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    trained: TrainedRows | None = None,
) -> Tensor:
    """(T, H) -> float32 logits (T, V), wider by the ids past the weight's rows."""
    logits = (hidden @ weight.to(hidden.dtype).T).float()
    if bias is not None:
        logits += bias.float()
    if trained is not None:
        columns = column_logits(hidden, trained.rows, trained.ids, bias)
        logits = with_columns(logits, columns, trained.ids, trained.num_new)
    return _capped(logits, softcap)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        rows: Tensor | None,
        trained: TrainedRows | None,
        has_ignored: bool,
    ) -> Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None
        need_rows = ctx.needs_input_grad[5]
        d_rows = torch.zeros_like(rows) if need_rows and rows is not None else None
        total = hidden.new_zeros((), dtype=torch.float32)
        cast = weight.to(hidden.dtype)
        is_plain = bias is None and softcap is None and trained is None
        in_kernel = is_plain and cross_entropy.fits(hidden, targets)
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            h_TH = hidden[start : start + CHUNK_TOKENS]
            if in_kernel:
                d_TV, slopes = h_TH @ cast.T, any(ctx.needs_input_grad)
                target_T = targets[start : start + CHUNK_TOKENS]
                total += torch.sum(cross_entropy.losses_(d_TV, target_T, IGNORE, slopes=slopes))
                if d_hidden is not None:
                    torch.mm(d_TV, cast, out=d_hidden[start : start + CHUNK_TOKENS])
                if d_weight is not None:
                    d_weight += d_TV.T @ h_TH
                continue
            target_T1 = targets[start : start + CHUNK_TOKENS, None]
            logits_TV = head_logits(h_TH, cast, bias, softcap)
            columns = None
            if trained is not None and rows is not None:
                columns = _Columns.of(h_TH, rows, trained, bias, target_T1, softcap)
                logits_TV.index_fill_(1, trained.known_ids, -math.inf)
                target_T1 = target_T1.masked_fill(columns.is_target_T1, 0)
            norm_T1 = torch.logsumexp(logits_TV, dim=1, keepdim=True)
            is_ignored_T1 = target_T1 == IGNORE if has_ignored else None
            if is_ignored_T1 is not None:
                target_T1 = target_T1.masked_fill(is_ignored_T1, 0)
            chosen_T1, one_T1 = logits_TV.gather(1, target_T1), torch.ones_like(norm_T1)
            if columns is not None:
                norm_T1 = torch.logaddexp(norm_T1, torch.logsumexp(columns.logits_Tn, dim=1, keepdim=True))
                chosen_T1 = torch.where(columns.is_target_T1, columns.chosen_T1, chosen_T1)
                one_T1 = one_T1.masked_fill(columns.is_target_T1, 0.0)
            loss_T1 = norm_T1 - chosen_T1
            if is_ignored_T1 is not None:
                loss_T1 = loss_T1.masked_fill(is_ignored_T1, 0.0)
                # exp(logit - inf) is 0: no further pass over the logits
                norm_T1 = norm_T1.masked_fill(is_ignored_T1, math.inf)
                one_T1 = one_T1.masked_fill(is_ignored_T1, 0.0)
            total += torch.sum(loss_T1)
            if not any(ctx.needs_input_grad):
                continue
            slope = None if softcap is None else 1 - (logits_TV / softcap) ** 2
            if slope is not None and trained is not None:
                slope.index_fill_(1, trained.known_ids, 0.0)  # there it is infinite
            d_TV = logits_TV.sub_(norm_T1).exp_()
            d_TV.scatter_add_(1, target_T1, -one_T1)
            if slope is not None:
                d_TV *= slope
            if d_bias is not None:
                d_bias += d_TV.sum(0)
            d_TV = d_TV.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_TV, cast, out=d_hidden[start : start + CHUNK_TOKENS])
            if d_weight is not None:
                d_weight += d_TV.T @ h_TH
            if columns is not None and rows is not None:
                d_Tn = columns.slope(norm_T1, softcap)
                if d_hidden is not None:
                    d_hidden[start : start + CHUNK_TOKENS] += d_Tn.to(hidden.dtype) @ rows.to(hidden.dtype)
                if d_rows is not None:
                    d_rows += d_Tn.T @ h_TH.float()
        ctx.save_for_backward(d_hidden, d_weight, d_bias, d_rows)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grads
        d_hidden, d_weight, d_bias, d_rows = ctx.saved_tensors
        if d_hidden is not None:
            # in float32 and rounded once: a rounded divisor would rescale every gradient by the same 0.4 %
            d_hidden = torch.mul(d_hidden, scale.view(1, 1), out=torch.empty_like(d_hidden))
        d_weight = None if d_weight is None else d_weight * scale
        d_bias = None if d_bias is None else d_bias * scale
        d_rows = None if d_rows is None else d_rows * scale
        return d_hidden, d_weight, d_bias, None, None, d_rows, None, None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Columns:
    """The logits of trained ids, beside those of the frozen weight: no second tensor of T x V is made."""

    logits_Tn: Tensor
    place_T1: Tensor  # of the target among the trained ids; any, where it is none of them
    is_target_T1: Tensor  # whether the target is one of them

    @classmethod
    def of(
        cls,
        h_TH: Tensor,
        rows: Tensor,
        trained: TrainedRows,
        bias: Tensor | None,
        target_T1: Tensor,
        softcap: float | None,
    ) -> _Columns:
        logits_Tn = _capped(column_logits(h_TH, rows, trained.ids, bias).float(), softcap)
        place_T1 = torch.searchsorted(trained.ids, target_T1).clamp_(max=len(trained.ids) - 1)
        return cls(logits_Tn=logits_Tn, place_T1=place_T1, is_target_T1=trained.ids[place_T1] == target_T1)

    @property
    def chosen_T1(self) -> Tensor:
        return self.logits_Tn.gather(1, self.place_T1)

    def slope(self, norm_T1: Tensor, softcap: float | None) -> Tensor:
        """(T, n) of the loss by these logits before their cap."""
        d_Tn = (self.logits_Tn - norm_T1).exp()
        d_Tn.scatter_add_(1, self.place_T1, -self.is_target_T1.float())
        return d_Tn if softcap is None else d_Tn * (1 - (self.logits_Tn / softcap) ** 2)
