"""One autograd node for a frozen linear and all that an adapter adds to it.

y = row * (W (col * x)) + q up h + bias + added,    h = down x_d, or relu(down x_d)

Shapes, with the tokens of all leading dimensions as T: x, x_d (T, in), W (out, in), y (T, out), and `Factors`.
x_d is x, or x after dropout. The factors are functions of the adapter's trained tensors (`Thin`); they are
computed inside, and their gradients carried back to those tensors, because what costs is the number of
launches and of autograd nodes, of which a model has one per linear layer.

Saved for backward: x, x_d, h (T, k), the trained tensors, and the packed weight, which is dequantized again;
W (col * x) only where `row` is a vector, whose gradient needs it. No gradient of W is made. A format may
round x inside its product (int8 with an outlier threshold): the backward pass is that of the dequantized
weight all the same. The gradient of a scalar `row` needs no further pass over the weight:
d row = <dy, W x> = <W^T dy, x>, and W^T dy is computed for dx anyway. d q = <up^T dy, h>.
Scales multiply in float32: rounded to bfloat16, a scale would bend its whole row. A scalar over a dense bfloat16
weight scales a float32 product, because that weight, scaled and rounded again, would be what it was for every scale
nearer to 1 than 1/512. A vector scales W (col * x) as it was rounded: like LoRA's addition, in bfloat16 it hides what
is less than half a step of an output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from decompft.adapters.frozen.base import FrozenLinear

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
        # of one output, too: what `row` is 0 of has a slope there, which the scalar's way divides by it
        is_vector = f.row is not None and (f.row.numel() > 1 or base.out_features == 1)
        scale = None if is_vector else f.row
        y_TO = base.product(_times(x_TI, f.col), storage, scale, weight)
        y0_TO = None
        if is_vector:
            y0_TO, y_TO = y_TO, _times(y_TO, f.row)
        h_TR = None
        if f.up is not None and f.down is not None:
            d_TI = x_TI if dropped is None else dropped.reshape(-1, base.in_features)
            h_TR = d_TI @ f.down.to(x.dtype).T
            if f.relu:
                h_TR.relu_()
            hq_TR = h_TR if isinstance(f.q, float) and f.q == 1.0 else (h_TR * f.q).to(x.dtype)
            y_TO.addmm_(hq_TR, f.up.to(x.dtype).T)
        if base.bias is not None:
            y_TO += base.bias.to(x.dtype)
        if f.bias is not None:
            y_TO += f.bias.to(x.dtype)
        q, ctx.q = (f.q, 1.0) if isinstance(f.q, Tensor) else (None, f.q)
        found = (f.up, f.down, q, f.row, f.col, f.bias)
        ctx.save_for_backward(x, dropped, h_TR, y0_TO, *found, *trained, *fixed, *storage, *noted, *f.keep)
        ctx.base, ctx.thin, ctx.relu, ctx.counts = base, thin, f.relu, (*counts, len(noted), len(f.keep))
        return y_TO.view(*x.shape[:-1], base.out_features)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        (dy,) = grads
        x, dropped, h_TR, y0_TO, up, down, q, row, col, bias, *rest = ctx.saved_tensors
        trained, fixed, storage, noted, keep = _split(rest, ctx.counts)
        base: FrozenLinear = ctx.base
        thin: Thin | None = ctx.thin
        q = ctx.q if q is None else q
        f = Factors(up=up, down=down, q=q, row=row, col=col, bias=bias, relu=ctx.relu, keep=keep)
        g_TO = dy.reshape(-1, base.out_features)
        needs_dx = ctx.needs_input_grad[0]
        dx, weight, row, col = _through_base(g_TO, x, base, storage, f, y0_TO, needs_dx, _reads(thin))
        d_trained: Grads = ()
        dd = None
        if thin is not None:
            up, down, q, dd = _through_thin(g_TO, x, dropped, h_TR, f, dx, ctx.needs_input_grad[1])
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
    y0_TO: Tensor | None,
    needs_dx: bool,
    reads_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx (T, in) of the base's product, the weight if it was asked for, and the gradients of row and col."""
    row = col = None
    scale = f.row if y0_TO is None else None
    if y0_TO is not None:
        row = torch.sum(g_TO * y0_TO, 0, dtype=torch.float32)
        g_TO = _times(g_TO, f.row)
    weight = base.unpack(storage, g_TO.dtype, None if reads_weight else scale) if (
        needs_dx or scale is not None or f.col is not None or reads_weight) else None  # fmt: skip
    if weight is None:
        return None, None, row, col
    if reads_weight and scale is not None:
        g_TO = _times(g_TO, scale)
    dx_TI = g_TO @ weight
    x_TI = x.reshape(-1, base.in_features)
    if f.col is not None:
        col = torch.sum(x_TI * dx_TI, 0, dtype=torch.float32)
        dx_TI.mul_(f.col)
    if scale is not None:
        # products are rounded once to the compute dtype, then summed in float32. dx holds
        # row W^T dy: at row == 0 exactly the quotient is NaN and stops the run, in words
        row = (torch.sum(x_TI * dx_TI, dtype=torch.float32) / scale).reshape(1)
    return dx_TI, weight if reads_weight else None, row, col


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


def _times(x: Tensor, scale: Tensor | None) -> Tensor:
    """x * scale in float32, rounded once to x's dtype; x itself without a scale."""
    if scale is None:
        return x
    return torch.mul(x, scale, out=torch.empty_like(x)) if x.dtype != torch.float64 else x * scale


def _reads(thin: Thin | None) -> bool:
    return thin is not None and thin.reads_weight


def _split(tensors: Any, counts: tuple[int, ...]) -> tuple[tuple[Tensor, ...], ...]:
    parts, at = [], 0
    for count in counts:
        parts.append(tuple(tensors[at : at + count]))
        at += count
    return tuple(parts)
