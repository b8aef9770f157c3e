"""One autograd node for the frozen linears that read one x, and all that their adapters add to them.

y_m = row_m * (W_m (col_m * x)) + q_m up_m h_m + bias_m + added_m,    h_m = down_m x_d, or relu(down_m x_d)

Shapes, with the tokens of all leading dimensions as T: x, x_d (T, in), W (out, in), y (T, out), `Factors`, and K, the
sum of the members' ranks. x_d is x, or x after dropout; then there is one member. The factors are functions of the
adapter's trained tensors (`Thin`); they are computed inside, and their gradients carried back to those tensors, because
what costs is the number of launches and of autograd nodes. Members are what decompft.adapters.joint puts together (q, k
and v; gate and up), else one linear alone. Of several, the downs are one matrix (K, in): x is read once for all h, once
for all gradients of the downs, and the thin branches are added to dx by one product. The weights stay apart: one is
dequantized, used and freed before the next.

What is thin is written first where it can be, and the product with W added onto it: a multiplication takes in what
lies there on its way out, where a thin product added later would read and write all of y, or dx, for itself. It also
rounds once less at y's size.

Saved for backward: x, x_d, h (T, K), the trained tensors, and the packed weight, which is dequantized again. No
gradient of W is made. A format may round x inside its product (int8 with an outlier threshold): the backward pass is
that of the dequantized weight all the same. Gradients of the scales need no further pass over the weight:
- a scalar `row`: d row = <dy, W x> = <W^T dy, x>, and W^T dy is computed for dx anyway, by itself: as the difference
  between <dx, x> after it and before, of a dx that is rounded, it would be less exact. Where kernels/combine.py runs,
  one pass makes dx of all that, and these dots. d q = <up^T dy, h>; `col` likewise, by columns.
- a vector `row` that multiplies the weight while it is dequantized: with Y the output without bias, kept by
  reference, d row_o = (sum_t dY_to Y_to - sum_k up_ok (dup)_ok) / row_o, as the thin part of Y has the slope dup;
  without the second sum where the branch was left out of Y (`Later`).
- a vector `row` over a dense bfloat16 weight, which scaled and rounded again would be what it was for every scale
  nearer to 1 than 1/512: W (col * x) is scaled instead, and saved. Like LoRA's addition, in bfloat16 that hides what
  is less than half a step of an output. A scalar scales a float32 product there.
Scales multiply in float32: rounded to bfloat16, a scale would bend its whole row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decompft.adapters.frozen.again import is_running_again
from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.frozen.factors import Factors, Grads, Thin
from decompft.adapters.frozen.slope import Slope
from decompft.adapters.frozen.thin import Later, add_thin, thin_back, wide
from decompft.adapters.kernels import combine
from decompft.adapters.kernels.columns import dot_columns, dot_columns_and_scale_, times_columns

# what a row's scale of exactly 0 is taken for: its slope is found by a division
_NEARLY_ZERO = 1e-20


class Member(NamedTuple):
    """One linear of a node."""

    base: FrozenLinear
    thin: Thin | None = None  # None for the bare base
    trained: tuple[Tensor, ...] = ()  # what `thin` makes its factors of, float32
    fixed: tuple[Tensor, ...] = ()  # its buffers


def frozen_linear(
    x: Tensor,
    base: FrozenLinear,
    *,
    dropped: Tensor | None = None,
    thin: Thin | None = None,
    trained: tuple[Tensor, ...] = (),
    fixed: tuple[Tensor, ...] = (),
) -> Tensor:
    """x (..., in) -> y (..., out) as in the module docstring, of one linear.

    Args:
        dropped: x after dropout, for the thin branch only; default x itself.
        thin, trained, fixed: see `Member`.
    """
    return frozen_linears(x, (Member(base, thin, trained, fixed),), dropped=dropped)[0]


def frozen_linears(
    x: Tensor, members: Sequence[Member], *, dropped: Tensor | None = None, later: Later | None = None
) -> tuple[Tensor, ...]:
    """x (..., in) -> y (..., out) of each member; `dropped` with one member only.

    Args:
        later: takes branches that are left out of y then; what comes back to y has to be as if they were in it.
    """
    assert dropped is None or len(members) == 1, "each member would have a mask of its own"
    parts, tensors = [], []
    for base, thin, trained, fixed in members:
        own = (trained, fixed, base.storage())
        parts.append(_Part(base, thin, tuple(map(len, own))))
        tensors += [t for group in own for t in group]
    found: tuple[Tensor, ...] = _FrozenLinears.apply(x, dropped, later, tuple(parts), *tensors)
    return found


class _Part(NamedTuple):
    """A member without its tensors, and how many it has of each kind."""

    base: FrozenLinear
    thin: Thin | None
    counts: tuple[int, ...]  # trained, fixed, storage


class _FrozenLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        later: Later | None,
        parts: tuple[_Part, ...],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        x_TI = x.reshape(-1, x.shape[-1])
        own = list(_split_each(tensors, [part.counts for part in parts]))
        is_read = len(parts) > 1 or not (parts[0].base.ends_block and is_running_again())
        passes = [_begin(x_TI, p, *groups, is_read=is_read) for p, groups in zip(parts, own, strict=True)]
        d_TI = x_TI if dropped is None else dropped.reshape(x_TI.shape)
        ctx.set_materialize_grads(False)
        begun = [p.y_TO for p in passes]
        thin = add_thin(d_TI, [p.f for p in passes], begun, are_read=passes[0].is_read, later=later)
        left_out = [None] * len(parts) if later is None else later.branches
        for part, found, y_TO, (_, _, storage) in zip(parts, passes, begun, own, strict=True):
            if not found.is_read:
                found.y_TO = x_TI.new_full((len(x_TI), part.base.out_features), torch.nan)
            elif found.y_TO is None:
                _multiply(x_TI, part.base, storage, found, into_TO=y_TO)
        saved: list[Tensor | None] = [x, dropped, *thin.tensors()]
        ctx.scale, ctx.counts, ctx.facts = thin.scale, [], []
        ys: list[Tensor] = []
        for k, (part, found, (trained, fixed, storage)) in enumerate(zip(parts, passes, own, strict=True)):
            f, (y_TO, kept_TO) = found.f, _add_biases(part.base, found)
            if later is not None and kept_TO is y_TO:
                later.wants_dots[k], kept_TO = True, None
            ys.append(y_TO)
            q, number = (f.q, 1.0) if isinstance(f.q, Tensor) else (None, f.q)
            groups = (
                (kept_TO, f.up, f.down, q, f.row, f.col, f.bias),
                trained,
                fixed,
                storage,
                found.noted,
                f.keep,
            )
            ctx.counts.append(tuple(map(len, groups)))
            ctx.facts.append((part.base, part.thin, number, f.relu, found.folds, left_out[k] is None))
            saved += [t for group in groups for t in group]
        ctx.num_thin, ctx.later = len(thin.tensors()), later
        ctx.save_for_backward(*saved)
        return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        x, dropped, *rest = ctx.saved_tensors
        thin_tensors, rest = rest[: ctx.num_thin], rest[ctx.num_thin :]
        needs_dx, needs_dropped = ctx.needs_input_grad[:2]
        x_TI = x.reshape(-1, x.shape[-1])
        d_TI = x_TI if dropped is None else dropped.reshape(x_TI.shape)
        gs = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in dys]
        own = list(_split_each(rest, ctx.counts))
        factors = [_factors(*facts[2:4], *groups) for facts, groups in zip(ctx.facts, own, strict=True)]
        thin = thin_back(gs, d_TI, factors, thin_tensors, ctx.scale)
        live = [(facts[0], f) for facts, f, g in zip(ctx.facts, factors, gs, strict=True) if g is not None]
        thin_first = needs_dx and dropped is None and not any(_needs_own(*member) for member in live)
        thin_last = dropped is None and not thin_first
        in_one_pass = thin_last and all(f.col is None for _, f in live) and combine.fits(x_TI, thin.factors())
        dx = Slope(x_TI, needs_dx, thin.slope() if thin_first else None, in_one_pass=in_one_pass)
        d_trained: list[Grads] = [(None,) * len(trained) for _, trained, *_ in own]

        def pull_back(k: int, g_TO: Tensor, found: _Found) -> None:
            _, adapter, _, _, folds, is_whole = ctx.facts[k]
            _, trained, fixed, _, noted, _ = own[k]
            if adapter is not None:
                grads = _finished(g_TO, factors[k], folds, is_whole, thin.grads[k], found, dx.dots)
                d_trained[k] = adapter.pull_back(trained, (*fixed, *noted), factors[k], grads, found.weight)

        waiting: list[tuple[int, Tensor, _Found]] = []
        for k, ((base, adapter, _, _, folds, _), g_TO) in enumerate(zip(ctx.facts, gs, strict=True)):
            if g_TO is None:
                continue
            pulls = adapter is not None and adapter.pulls_through_weight
            kept_TO, storage, row = own[k][0][0], own[k][3], None
            if _is_vector(base, factors[k]):
                row = ctx.later.take_dots(k) if kept_TO is None else dot_columns(g_TO, kept_TO)
            found = _back_through_base(g_TO, dx, base, storage, factors[k], row, folds, pulls)
            if pulls:
                pull_back(k, g_TO, found)
            else:
                waiting.append((k, g_TO, found))
            del found  # one dense weight at a time
        dx.finish(thin if thin_last else None)
        for k, g_TO, found in waiting:
            pull_back(k, g_TO, found)
        d_tensors: list[Tensor | None] = []
        for d_own, (_, _, fixed, storage, *_) in zip(d_trained, own, strict=True):
            d_tensors += (*d_own, *[None] * (len(fixed) + len(storage)))
        dd_TI = thin.slope() if dropped is not None and needs_dropped else None
        d_dropped = None if dd_TI is None else dd_TI.view(dropped.shape)
        dx_TI = None if dx.sum_TI is None else dx.sum_TI.view(x.shape)
        return (dx_TI, d_dropped, None, None, *d_tensors)


@dataclass(slots=True)
class _Pass:
    """A member's forward pass so far."""

    f: Factors
    noted: tuple[Tensor, ...]
    folds: bool  # a row's scale is multiplied into the weight
    scales_output: bool  # or into the product
    is_read: bool = True  # y; else only what is saved counts
    y_TO: Tensor | None = None  # without thin branch and bias; None: its product is added to the thin branch
    kept_TO: Tensor | None = None

    @property
    def scale(self) -> Tensor | None:
        """What multiplies the weight."""
        if self.f.row is None or self.scales_output:
            return None
        return self.f.row.view(-1, 1) if self.folds else self.f.row


def _begin(
    x_TI: Tensor,
    part: _Part,
    trained: tuple[Tensor, ...],
    fixed: tuple[Tensor, ...],
    storage: tuple[Tensor, ...],
    *,
    is_read: bool,
) -> _Pass:
    """The factors; and the product already, where it cannot be added to the thin branch."""
    base, thin = part.base, part.thin
    noted: tuple[Tensor, ...] = ()
    if thin is not None and thin.reads_weight:
        noted = thin.note(trained, fixed, lambda A: base.times(storage, A, x_TI.dtype))
    f = Factors() if thin is None else thin.factors(trained, (*fixed, *noted))
    is_vector = _is_vector(base, f)
    folds = is_vector and base.folds(storage)
    if folds and f.row is not None:
        f = replace(f, row=f.row.masked_fill(f.row == 0, _NEARLY_ZERO))
    # a vector's slope reads y
    found = _Pass(f, noted, folds, scales_output=is_vector and not folds, is_read=is_read or is_vector)
    if not found.is_read:
        return found
    has_branch = f.up is not None and f.down is not None
    if not has_branch or found.scales_output or not base.adds(storage, found.scale):
        _multiply(x_TI, base, storage, found)
    return found


def _multiply(
    x_TI: Tensor,
    base: FrozenLinear,
    storage: tuple[Tensor, ...],
    found: _Pass,
    into_TO: Tensor | None = None,
) -> None:
    """y = row W (col x), added to `into_TO` if there is one."""
    if found.f.col is not None:
        x_TI = times_columns(x_TI, found.f.col)
    y_TO = base.product(x_TI, storage, found.scale, into_TO=into_TO)
    if found.scales_output and found.f.row is not None:
        found.kept_TO, y_TO = y_TO, times_columns(y_TO, found.f.row)
    found.y_TO = y_TO


def _add_biases(base: FrozenLinear, found: _Pass) -> tuple[Tensor, Tensor | None]:
    """Add them to y in place; returns y and what is kept for the slope of a row's scale."""
    y_TO, kept_TO = found.y_TO, found.kept_TO
    assert y_TO is not None
    biases = [b for b in (base.bias, found.f.bias) if b is not None]
    if found.folds:  # by reference where nothing else writes to it
        kept_TO = y_TO.clone() if biases or base.output_is_overwritten else y_TO
    for bias in biases:
        y_TO += bias.to(y_TO.dtype)
    return y_TO, kept_TO


def _factors(number: float, relu: bool, own: tuple[Any, ...], *groups: tuple[Tensor, ...]) -> Factors:
    """As they were in the forward pass."""
    _, up, down, q, row, col, bias = own
    q = number if q is None else q
    return Factors(up=up, down=down, q=q, row=row, col=col, bias=bias, relu=relu, keep=groups[-1])


def _is_vector(base: FrozenLinear, f: Factors) -> bool:
    """Whether rows have scales of their own."""
    return f.row is not None and (f.row.numel() > 1 or base.out_features == 1)


def _needs_own(base: FrozenLinear, f: Factors) -> bool:
    """Whether a member's part of dx is wanted by itself, or is made before it is added."""
    return not base.adds_back or f.col is not None or (f.row is not None and not _is_vector(base, f))


class _Found(NamedTuple):
    """What a member's product with its base left for `_finished`."""

    weight: Tensor | None  # if it was asked for
    row: Tensor | None = None
    place: int | None = None  # among `Slope.dots`, of a row that is one number
    col: Tensor | None = None


def _back_through_base(
    g_TO: Tensor,
    dx: Slope,
    base: FrozenLinear,
    storage: tuple[Tensor, ...],
    f: Factors,
    row: Tensor | None,
    folds: bool,
    pulls: bool,
) -> _Found:
    """Adds this base's product to dx; finds the gradients of row and col.

    `row`, of a scale that is a vector: the dots of the columns of g and of what was kept.
    Where the row's scale is folded into the weight, its gradient is still to be finished: see `_finished`.
    """
    scale = None
    if row is not None and f.row is not None:
        if pulls or not folds:
            g_TO = times_columns(g_TO, f.row)
        else:
            scale = f.row.view(-1, 1)
    elif f.row is not None:
        scale = f.row
    assert not pulls or scale is None, (
        "pull_back wants the bare weight: its method's row is a vector, or None"
    )
    weight = base.unpack(storage, g_TO.dtype) if pulls else None

    def product(into_TI: Tensor | None) -> Tensor:
        return base.product_back(g_TO, storage, scale, weight, into_TI)

    scalar = scale if row is None else None
    if f.col is None and scalar is None:
        dx.add(product, adds=base.adds_back)
        return _Found(weight, row)
    own_TI, col = product(None), None
    if f.col is not None:
        col = dot_columns_and_scale_(dx.x_TI, own_TI, f.col)
    if scalar is not None:
        return _Found(weight, place=dx.dot_and_add(own_TI), col=col)
    dx.add_own(own_TI)
    return _Found(weight, row, col=col)


def _finished(
    g_TO: Tensor,
    f: Factors,
    folds: bool,
    is_whole: bool,
    thin: Grads,
    found: _Found,
    dots: Sequence[Tensor],
) -> Factors:
    """The gradients of all factors; `is_whole`: y was kept with its branch."""
    (up, down, q), row = thin, found.row
    if found.place is not None and f.row is not None:
        # products summed in float32 of what holds row W^T dy: at row == 0 exactly the quotient is NaN and stops the
        # run, in words
        row = (dots[found.place] / f.row).reshape(1)
    if folds and row is not None and f.row is not None:
        if is_whole and up is not None and f.up is not None:
            row -= torch.linalg.vecdot(up, f.up)
        row /= f.row
    bias = None if f.bias is None else g_TO.sum(0, dtype=wide(g_TO.dtype))
    return Factors(up=up, down=down, q=q, row=row, col=found.col, bias=bias)  # type: ignore[arg-type]


def _split_each(
    tensors: Sequence[Any], counts: Sequence[tuple[int, ...]]
) -> Iterator[tuple[tuple[Any, ...], ...]]:
    """A flat sequence -> for each member a tuple for each kind of its tensors."""
    at = 0
    for own in counts:
        groups = []
        for count in own:
            groups.append(tuple(tensors[at : at + count]))
            at += count
        yield tuple(groups)
