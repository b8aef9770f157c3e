"""One autograd node for a frozen linear and all that an adapter adds to it.

y = row * (W (col * x)) + q up h + bias + added,    h = down x_d, or relu(down x_d)

Shapes, with the tokens of all leading dimensions as T: x, x_d (T, in), W (out, in), y (T, out), and `Factors`.
x_d is x, or x after dropout. The factors are functions of the adapter's trained tensors (`Thin`); they are
computed inside, and their gradients carried back to those tensors, because what costs is the number of
launches and of autograd nodes, of which a model has one per linear layer.

Saved for backward: x, x_d, h (T, k), the trained tensors, and the packed weight, which is dequantized again. No
gradient of W is made. A format may round x inside its product (int8 with an outlier threshold): the backward pass is
that of the dequantized weight all the same. Gradients of the scales need no further pass over the weight:
- a scalar `row`: d row = <dy, W x> = <W^T dy, x>, and W^T dy is computed for dx anyway; d q = <up^T dy, h>; `col`
  likewise, by columns.
- a vector `row` that multiplies the weight while it is dequantized: with Y the output without bias, kept by
  reference, d row_o = (sum_t dY_to Y_to - sum_k up_ok (dup)_ok) / row_o, as the thin part of Y has the slope dup.
- a vector `row` over a dense bfloat16 weight, which scaled and rounded again would be what it was for every scale
  nearer to 1 than 1/512: W (col * x) is scaled instead, and saved. Like LoRA's addition, in bfloat16 that hides what
  is less than half a step of an output. A scalar scales a float32 product there.
Scales multiply in float32: rounded to bfloat16, a scale would bend its whole row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.kernels.columns import dot, dot_columns, dot_columns_and_scale_, times_columns

# what a row's scale of exactly 0 is taken for: its slope is found by a division
_NEARLY_ZERO = 1e-20

Grads = tuple[Tensor | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """W* = diag(row) W diag(col) + q up down; None stands for what is not there."""

    up: Tensor | None = None  # (out, k)
    down: Tensor | None = None  # (k, in)
    q: Tensor | float = 1.0  # a number, or (1,)
    row: Tensor | None = None  # (1,) or (out,)
    col: Tensor | None = None  # (in,)
    bias: Tensor | None = None  # (out,), added to the base's
    relu: bool = False  # between down and up: then there is no W*
    keep: tuple[Tensor, ...] = ()  # for `pull_back` of the same pass


class Thin(Protocol):
    """What an adapter gives the node; see decompft.adapters.base.Adapter."""

    reads_weight: bool
    pulls_through_weight: bool

    def factors(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Factors: ...

    def note(
        self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...], weight: Tensor
    ) -> tuple[Tensor, ...]: ...

    def pull_back(
        self,
        trained: tuple[Tensor, ...],
        fixed: tuple[Tensor, ...],
        found: Factors,
        grads: Factors,
        weight: Tensor | None,
    ) -> Grads: ...


def frozen_linear(
    x: Tensor,
    base: FrozenLinear,
    *,
    dropped: Tensor | None = None,
    thin: Thin | None = None,
    trained: tuple[Tensor, ...] = (),
    fixed: tuple[Tensor, ...] = (),
) -> Tensor:
    """x (..., in) -> y (..., out) as in the module docstring.

    Args:
        dropped: x after dropout, for the thin branch only; default x itself.
        thin: None for the bare base.
        trained: what `thin` makes its factors of, float32.
        fixed: its buffers.
    """
    storage = base.storage()
    counts = (len(trained), len(fixed), len(storage))
    return _FrozenLinear.apply(x, dropped, base, thin, counts, *trained, *fixed, *storage)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        base: FrozenLinear,
        thin: Thin | None,
        counts: tuple[int, int, int],
        *tensors: Tensor,
    ) -> Tensor:
        trained, fixed, storage = _split(tensors, counts)
        x_TI = x.reshape(-1, base.in_features)
        weight: Tensor | None = None
        noted: tuple[Tensor, ...] = ()
        if thin is not None and thin.reads_weight:
            weight = base.unpack(storage, x.dtype)
            noted = thin.note(trained, fixed, weight)
        f = Factors() if thin is None else thin.factors(trained, (*fixed, *noted))
        if f.col is not None:
            x_TI = times_columns(x_TI, f.col)
        row, kept_TO = f.row, None
        is_vector = row is not None and (row.numel() > 1 or base.out_features == 1)
        folds = is_vector and base.folds(storage)
        if row is not None and folds:
            row = row.masked_fill(row == 0, _NEARLY_ZERO)
            weight = None  # freed before the scaled one is made: one at a time
            y_TO = base.product(x_TI, storage, row.view(-1, 1))
        elif row is not None and is_vector:
            kept_TO = base.product(x_TI, storage, None, weight)
            y_TO = times_columns(kept_TO, row)
        else:
            y_TO = base.product(x_TI, storage, row, weight)
        h_TR = None
        if f.up is not None and f.down is not None:
            d_TI = (x if dropped is None else dropped).reshape(-1, base.in_features)
            h_TR = d_TI @ f.down.to(x.dtype).T
            if f.relu:
                h_TR.relu_()
            hq_TR = h_TR if isinstance(f.q, float) and f.q == 1.0 else (h_TR * f.q).to(x.dtype)
            y_TO.addmm_(hq_TR, f.up.to(x.dtype).T)
        biases = [b for b in (base.bias, f.bias) if b is not None]
        if folds:  # by reference where nothing else writes to it
            kept_TO = y_TO.clone() if biases or base.output_is_overwritten else y_TO
        for bias in biases:
            y_TO += bias.to(x.dtype)
        q, ctx.q = (f.q, 1.0) if isinstance(f.q, Tensor) else (None, f.q)
        found = (f.up, f.down, q, row, f.col, f.bias)
        ctx.save_for_backward(x, dropped, h_TR, kept_TO, *found, *trained, *fixed, *storage, *noted, *f.keep)
        ctx.base, ctx.thin, ctx.relu, ctx.folds = base, thin, f.relu, folds
        ctx.counts = (*counts, len(noted), len(f.keep))
        return y_TO.view(*x.shape[:-1], base.out_features)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        (dy,) = grads
        x, dropped, h_TR, kept_TO, up, down, q, row, col, bias, *rest = ctx.saved_tensors
        trained, fixed, storage, noted, keep = _split(rest, ctx.counts)
        base: FrozenLinear = ctx.base
        thin: Thin | None = ctx.thin
        q = ctx.q if q is None else q
        f = Factors(up=up, down=down, q=q, row=row, col=col, bias=bias, relu=ctx.relu, keep=keep)
        g_TO = dy.reshape(-1, base.out_features)
        needs_dx = ctx.needs_input_grad[0]
        pulls = thin is not None and thin.pulls_through_weight
        dx, weight, row, col = _through_base(g_TO, x, base, storage, f, kept_TO, ctx.folds, needs_dx, pulls)
        d_trained: Grads = ()
        dd = None
        if thin is not None:
            up, down, q, dd = _through_thin(g_TO, x, dropped, h_TR, f, dx, ctx.needs_input_grad[1])
            if ctx.folds and row is not None and f.row is not None:
                if up is not None and f.up is not None:
                    row -= torch.linalg.vecdot(up, f.up)
                row /= f.row
            bias = None if f.bias is None else g_TO.sum(0, dtype=torch.float32)
            found = Factors(up=up, down=down, q=q, row=row, col=col, bias=bias)  # type: ignore[arg-type]
            d_trained = thin.pull_back(trained, (*fixed, *noted), f, found, weight)
        d_x = dx.view(x.shape) if needs_dx and dx is not None else None
        d_dropped = None if dd is None or dropped is None else dd.view(dropped.shape)
        return (d_x, d_dropped, None, None, None, *d_trained, *[None] * (ctx.counts[1] + ctx.counts[2]))


def _through_base(
    g_TO: Tensor,
    x: Tensor,
    base: FrozenLinear,
    storage: tuple[Tensor, ...],
    f: Factors,
    kept_TO: Tensor | None,
    folds: bool,
    needs_dx: bool,
    pulls: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx (T, in) of the base's product, the weight if it was asked for, and the gradients of row and col.

    Where the row's scale is folded into the weight, its gradient is still to be finished: see the module docstring.
    """
    row = col = scale = None
    if kept_TO is not None and f.row is not None:
        row = dot_columns(g_TO, kept_TO)
        if pulls or not folds:
            g_TO = times_columns(g_TO, f.row)
        else:
            scale = f.row.view(-1, 1)
    elif f.row is not None:
        scale = f.row
    if not (needs_dx or f.col is not None or pulls or (scale is not None and kept_TO is None)):
        return None, None, row, col
    assert not pulls or scale is None, (
        "pull_back wants the bare weight: its method's row is a vector, or None"
    )
    weight = base.unpack(storage, g_TO.dtype) if pulls else None
    dx_TI = base.product_back(g_TO, storage, scale, weight)
    if f.col is not None:
        col = dot_columns_and_scale_(x.reshape(-1, base.in_features), dx_TI, f.col)
    if scale is not None and kept_TO is None:
        # products summed in float32. dx holds row W^T dy: at row == 0 exactly the quotient is NaN and stops the
        # run, in words
        row = (dot(x.reshape(-1, base.in_features), dx_TI) / scale).reshape(1)
    return dx_TI, weight, row, col


def _through_thin(
    g_TO: Tensor,
    x: Tensor,
    dropped: Tensor | None,
    h_TR: Tensor | None,
    f: Factors,
    dx_TI: Tensor | None,
    needs_dropped: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of up, down, q and x_d; that of x_d is added to dx where it is x itself."""
    if h_TR is None or f.up is None or f.down is None:
        return None, None, None, None
    dtype = g_TO.dtype
    d = x if dropped is None else dropped
    d_TI = d.reshape(-1, f.down.shape[1])
    gu_TR = g_TO @ f.up.to(dtype)
    is_one = isinstance(f.q, float) and f.q == 1.0
    gq_TR = gu_TR if is_one else (gu_TR * f.q).to(dtype)
    if f.relu:
        gq_TR = gq_TR * (h_TR > 0)
    hq_TR = h_TR if is_one else (h_TR * f.q).to(dtype)
    down, up = (gq_TR.T @ d_TI).float(), (g_TO.T @ hq_TR).float()
    q = torch.sum(gu_TR * h_TR, dtype=torch.float32).reshape(1) if isinstance(f.q, Tensor) else None
    dd_TI = None
    if dropped is not None:
        dd_TI = gq_TR @ f.down.to(dtype) if needs_dropped else None
    elif dx_TI is not None:
        dx_TI.addmm_(gq_TR, f.down.to(dtype))
    return up, down, q, dd_TI


def _split(tensors: Any, counts: tuple[int, ...]) -> tuple[tuple[Tensor, ...], ...]:
    parts, at = [], 0
    for count in counts:
        parts.append(tuple(tensors[at : at + count]))
        at += count
    return tuple(parts)
