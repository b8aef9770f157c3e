"""The thin branches of the members of one autograd node: y_m += q_m up_m h_m, h_m = down_m x_d, for all m at once.

Shapes: T tokens, I in, O out of a member, R its rank, K the sum of the members' ranks. Of h and of what comes back
through the ups there is one array (T, K) each, of which a member has columns; the downs are stacked to (K, I).

Numbers are rounded where the formula of one linear says so: h, q h and what comes back to it are in the compute dtype,
scales multiply in float32 or better, and gradients of factors leave in float32 or better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from decompft.adapters.frozen.factors import Factors
from decompft.adapters.frozen.rounded import copy_of, stacked_copy_of
from decompft.adapters.kernels import visit
from decompft.adapters.kernels.columns import dot_columns, times_columns
from decompft.adapters.kernels.combine import Product, add_product_, product


class Added(NamedTuple):
    """What `add_thin` leaves for `thin_back`."""

    scale: float  # q where it is one number for all members; h is scaled already
    h_TK: Tensor | None = None  # None where no member has a thin branch
    scale_K: Tensor | None = None  # q of each column; (1,) of one member; None where it is `scale`
    down_KI: Tensor | None = None  # in the compute dtype, where it need not be made again
    ups: tuple[Tensor | None, ...] = ()  # likewise

    def tensors(self) -> tuple[Tensor | None, ...]:
        return () if self.h_TK is None else (self.h_TK, self.scale_K, self.down_KI, *self.ups)


class Later:
    """Branches that are not added to their y here: whoever reads the ys adds h up^T to each, in float32.

    In the backward pass he may write over the ys, and has to leave `dots` where `wants_dots`.

    Args:
        takes: whether he can add a branch, of a member's h (T, R), scaled already, and up (O, R).
    """

    def __init__(self, takes: Callable[[Tensor, Tensor], bool], num_members: int) -> None:
        self.takes = takes
        self.branches: list[Product | None] = [None] * num_members
        self.wants_dots = [False] * num_members
        # of each member the sums (O,) over tokens of y times what comes back to it, float32
        self.dots: list[Tensor | None] = [None] * num_members

    def take_dots(self, place: int) -> Tensor | None:
        """A member's, which are not held here any longer."""
        dots, self.dots[place] = self.dots[place], None
        return dots


class Back:
    """Gradients of the factors, and the slope of x_d, which is a product that nobody may need."""

    def __init__(self, num_members: int) -> None:
        # up (O, R), down (R, I) and q (1,) of each member
        self.grads: list[tuple[Tensor | None, Tensor | None, Tensor | None]] = [(None,) * 3] * num_members
        self.gq_TK: Tensor | None = None
        self.down_KI: Tensor | None = None

    def add_to(self, dx_TI: Tensor | None) -> None:
        """dx += the slope, in place."""
        if dx_TI is not None and self.gq_TK is not None and self.down_KI is not None:
            dx_TI.addmm_(self.gq_TK, self.down_KI)

    def factors(self) -> Product | None:
        """What the slope is a product of."""
        return None if self.gq_TK is None or self.down_KI is None else (self.gq_TK, self.down_KI)

    def slope(self) -> Tensor | None:
        return None if self.gq_TK is None or self.down_KI is None else product(self.gq_TK, self.down_KI)


def add_thin(
    d_TI: Tensor,
    factors: Sequence[Factors],
    ys: list[Tensor | None],
    *,
    are_read: bool = True,
    later: Later | None = None,
) -> Added:
    """Add the thin branch of each member that has one to its y (T, O), in place; where y is None, it becomes y.

    Args:
        are_read: the ys; else they stay as they are.
        later: takes what it can instead.
    """
    places, thin, downs, ups = _thin(factors)
    if not places:
        return Added(1.0)
    dtype = d_TI.dtype
    down_copy = stacked_copy_of(downs, dtype)
    up_copies = tuple(copy_of(up, dtype) for up in ups)
    h_TK = d_TI @ (_stacked(downs, dtype) if down_copy is None else down_copy).T
    widths = [down.shape[0] for down in downs]
    for f, h_TR in zip(thin, h_TK.split_with_sizes(widths, 1), strict=True):
        if f.relu:
            h_TR.relu_()
    scale, scale_K = _scales(thin, widths)
    if scale != 1.0:
        h_TK.mul_(scale)
    if not are_read:
        return Added(scale, h_TK, scale_K, down_copy, up_copies)
    hq_TK = h_TK if scale_K is None else _times(h_TK, scale_K)
    for place, up, copy, hq_TR in zip(places, ups, up_copies, hq_TK.split_with_sizes(widths, 1), strict=True):
        up_OR, y_TO = up.to(dtype) if copy is None else copy, ys[place]
        if later is not None and later.takes(hq_TR, up_OR):
            later.branches[place] = hq_TR, up_OR
            continue
        up_RO = up_OR.T
        ys[place] = product(hq_TR, up_RO) if y_TO is None else add_product_(y_TO, hq_TR, up_RO)
    return Added(scale, h_TK, scale_K, down_copy, up_copies)


def thin_back(
    gs: Sequence[Tensor | None],
    d_TI: Tensor,
    factors: Sequence[Factors],
    tensors: Sequence[Tensor | None],
    scale: float,
) -> Back:
    """The backward pass of `add_thin`.

    Args:
        gs: the gradient (T, O) of each member's y; None where y was not used.
        factors: those of the forward pass.
        tensors: `Added.tensors` of the forward pass.
        scale: `Added.scale`.
    """
    back = Back(len(gs))
    places, thin, downs, ups = _thin(factors)
    places = [p for p in places if gs[p] is not None] and places
    if not places:
        return back
    h_TK, scale_K, down_copy, *up_copies = tensors
    assert h_TK is not None
    dtype, widths = d_TI.dtype, [down.shape[0] for down in downs]
    g_TOs = [gs[p] for p in places]
    up_ORs = [up.to(dtype) if copy is None else copy for up, copy in zip(ups, up_copies, strict=True)]
    hq_TK = h_TK if scale_K is None else _times(h_TK, scale_K)
    gq_TK, d_ups = _through_ups(g_TOs, up_ORs, h_TK, hq_TK, [f.relu for f in thin], scale)
    d_qs: Sequence[Tensor | None] = [None] * len(places)
    if scale_K is not None:
        d_qs = _sums(dot_columns(gq_TK, h_TK), widths)
        gq_TK = _times(gq_TK, scale_K)
    found = _gradients(g_TOs, d_TI, gq_TK, hq_TK, d_ups, widths)
    for place, g_TO, f, d_q, (d_up, d_down) in zip(places, g_TOs, thin, d_qs, found, strict=True):
        if g_TO is not None:
            back.grads[place] = d_up, d_down, d_q if isinstance(f.q, Tensor) else None
    back.gq_TK = gq_TK
    back.down_KI = _stacked(downs, dtype) if down_copy is None else down_copy
    return back


def _through_ups(
    g_TOs: Sequence[Tensor | None],
    up_ORs: Sequence[Tensor],
    h_TK: Tensor,
    hq_TK: Tensor,
    relus: Sequence[bool],
    scale: float,
) -> tuple[Tensor, list[Tensor | None]]:
    """What comes back through the ups (T, K), times `scale`; and d_ups, where one reading of g makes both."""
    widths = [up.shape[1] for up in up_ORs]
    gu_TK = torch.empty_like(h_TK)
    h_TRs, hq_TRs, gu_TRs = (a_TK.split_with_sizes(widths, 1) for a_TK in (h_TK, hq_TK, gu_TK))
    d_ups: list[Tensor | None] = [None] * len(widths)
    visits = all(g is None or visit.fits(g, up, hq) for g, up, hq in zip(g_TOs, up_ORs, hq_TRs, strict=True))
    for k, (g_TO, up_OR, gu_TR) in enumerate(zip(g_TOs, up_ORs, gu_TRs, strict=True)):
        if g_TO is None:
            gu_TR.zero_()
            continue
        if visits:
            d_ups[k] = visit.visit(g_TO, up_OR, hq_TRs[k], gu_TR, scale)
        else:
            torch.mm(g_TO, up_OR, out=gu_TR)
        if relus[k]:  # h is 0 where it was cut, scaled or not
            gu_TR.mul_(h_TRs[k] != 0)
    if scale != 1.0 and not visits:
        gu_TK.mul_(scale)
    return gu_TK, d_ups


def _gradients(
    g_TOs: Sequence[Tensor | None],
    d_TI: Tensor,
    gq_TK: Tensor,
    hq_TK: Tensor,
    d_ups: Sequence[Tensor | None],
    widths: list[int],
) -> list[tuple[Tensor, Tensor]]:
    """Of each member's up and down: pieces of one flat array, which is cast by one launch; `d_ups` are made already."""
    left = [g if d_up is None else None for g, d_up in zip(g_TOs, d_ups, strict=True)]
    shapes = [(0 if g is None else g.shape[1], w) for g, w in zip(left, widths, strict=True)]
    sizes = [gq_TK.shape[1] * d_TI.shape[1], *(o * r for o, r in shapes)]
    flat = torch.empty(sum(sizes), dtype=d_TI.dtype, device=d_TI.device)
    first, *others = flat.split_with_sizes(sizes)
    torch.mm(gq_TK.T, d_TI, out=first.view(-1, d_TI.shape[1]))
    for g_TO, hq_TR, piece, shape in zip(
        left, hq_TK.split_with_sizes(widths, 1), others, shapes, strict=True
    ):
        if g_TO is not None:
            torch.mm(g_TO.T, hq_TR, out=piece.view(shape))
    first, *others = flat.to(wide(flat.dtype)).split_with_sizes(sizes)
    made = [p.view(shape) if d is None else d for p, shape, d in zip(others, shapes, d_ups, strict=True)]
    return list(zip(made, first.view(-1, d_TI.shape[1]).split_with_sizes(widths), strict=True))


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32 or better, in which gradients of factors leave."""
    return dtype if dtype.itemsize > 2 else torch.float32


def _thin(factors: Sequence[Factors]) -> tuple[list[int], list[Factors], list[Tensor], list[Tensor]]:
    """The members that have a thin branch: places, factors, downs and ups."""
    places, thin, downs, ups = [], [], [], []
    for place, f in enumerate(factors):
        if f.up is not None and f.down is not None:
            places.append(place)
            thin.append(f)
            downs.append(f.down)
            ups.append(f.up)
    return places, thin, downs, ups


def _stacked(downs: list[Tensor], dtype: torch.dtype) -> Tensor:
    return (downs[0] if len(downs) == 1 else torch.cat(downs)).to(dtype)


def _scales(thin: Sequence[Factors], widths: list[int]) -> tuple[float, Tensor | None]:
    """One number for all columns, or 1 and a tensor: (K,), or (1,) of one member."""
    qs = [f.q for f in thin]
    first = qs[0]
    if isinstance(first, float) and all(isinstance(q, float) and q == first for q in qs):
        return first, None
    if len(qs) == 1:
        assert isinstance(first, Tensor)
        return 1.0, first
    like = next((q for q in qs if isinstance(q, Tensor)), None)
    if like is None:
        down = _down(thin[0])
        like = torch.empty(0, dtype=wide(down.dtype), device=down.device)
    columns = [
        q.expand(width) if isinstance(q, Tensor) else like.new_full((width,), q)
        for q, width in zip(qs, widths, strict=True)
    ]
    return 1.0, torch.cat(columns)


def _down(f: Factors) -> Tensor:
    assert f.down is not None
    return f.down


def _times(a_TK: Tensor, scale: Tensor) -> Tensor:
    """a * scale, rounded once to a's dtype; scale (K,) or (1,)."""
    if scale.numel() == a_TK.shape[1]:
        return times_columns(a_TK, scale)
    if a_TK.dtype == scale.dtype:
        return a_TK * scale
    return torch.mul(a_TK, scale, out=torch.empty_like(a_TK))


def _sums(of_K: Tensor, widths: list[int]) -> Sequence[Tensor]:
    """The sum over each member's columns, (1,) each."""
    if len(set(widths)) == 1:
        return of_K.view(len(widths), -1).sum(1).split(1)
    return [part.sum().reshape(1) for part in of_K.split(widths)]
