"""LieRA (Si et al., 2025, arXiv:2504.00851) and HiRA: each weight times a factor of its own.

    first order:  W* = W o (1 + D)        exact:  W* = W o exp(D)        D = s B A

Rows of W are unpacked, multiplied and used tile by tile, in the forward pass and again in the backward pass, where
the gradient of D is

    dL/dD = (G^T X) o W     (exact: o W*)

one tile at a time, at the cost of a weight-gradient product. Nothing of the weight's size is made beside the tile in
hand. Over a 4-bit base on a GPU the tile is the whole matrix in the compute dtype: a kernel makes W*, and turns G^T X
into dL/dD in place, one such tensor at a time as with LoRA. Shapes as in frozen/linear.py.

A tile is multiplied in float32 and rounded once. A bfloat16 weight that lies on bfloat16's grid already
would lose every factor nearer to 1 than 1/512 that way: over such a base, over int8 with outliers (whose
product is no product with one weight) and under dropout, W x and (W o E) x_d, with E = D or exp(D) - 1, are
two products; then only an output's own rounding hides a change, as it does with LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from decompft.adapters.base import Adapter, Facts, kaiming_uniform
from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.kernels.changed import Change
from decompft.adapters.lora import scaling

# weights in a tile: 32 MiB of float32
TILE_NUMBERS = 1 << 23
# rows of a tile are a multiple of it: where an array's rows are not whole 16 bytes apart, a GPU's products take a
# path three times slower
_ALIGN = 128
# exact zeros that are worth a word
MANY_ZEROS = 0.01


class LieraLinear(Adapter):
    """y = (W o (1 + s B A)) x + bias, or W o exp(s B A). B starts at 0, so that the layer starts as its base.

    A weight that is exactly 0 stays 0: `zero_fraction` says how many those are.
    """

    uses_products = False

    A: torch.nn.Parameter
    B: torch.nn.Parameter
    zero_fraction: float | None = (
        None  # of the weight that is used; None where the adapter was read from a file
    )

    @property
    def is_exact(self) -> bool:
        return getattr(self.config.options, "order", "first") == "exact"

    def initial_values(self, generator: torch.Generator, facts: Facts) -> dict[str, Tensor]:
        self.zero_fraction = float(facts["zero_fraction"])
        return {"A": kaiming_uniform(self.shapes["A"], generator), "B": torch.zeros(self.shapes["B"])}

    def merged(self, dense: Tensor) -> Tensor:
        weight = dense if dense.dtype == torch.float64 else dense.float()
        with torch.no_grad():
            change, _ = self.change(self.A, self.B)
            return weight + weight * change

    def unmerged(self, merged: Tensor, dense: Tensor) -> Tensor:
        """A factor of 0, which the first order can have, has no inverse."""
        left = merged if merged.dtype == torch.float64 else merged.float()
        with torch.no_grad():
            change, _ = self.change(self.A, self.B)
            return left / (1 + change)

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        return bias

    def delta(self) -> tuple[Tensor, Tensor] | None:
        return None

    def lr_scales(self) -> dict[str, float]:
        return {"B": self.config.options.lr_ratio}

    @classmethod
    def remarks(cls, layers: list[tuple[str, Adapter]]) -> list[str]:
        found = [
            (a.zero_fraction, n, a.base.out_features * a.base.in_features)
            for n, a in layers
            if isinstance(a, LieraLinear) and a.zero_fraction is not None
        ]
        if not found:
            return []
        share = sum(z * size for z, _, size in found) / sum(size for _, _, size in found)
        if share < MANY_ZEROS:
            return []
        worst, name, _ = max(found)
        return [
            f"{layers[0][1].config.method}: {share:.1%} of the adapted weights are exactly 0 in the frozen base "
            f"(at most {worst:.1%}, in {name}); a factor cannot move them"
        ]

    def change(self, A: Tensor, B_rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """E of some rows, W* = W + W o E, and dE/dD where that is not 1."""
        D = (B_rows @ A).mul_(scaling(self.config))
        if not self.is_exact:
            return D, None
        limit = self.config.options.clamp
        E = torch.expm1(D.clamp(-limit, limit))  # exp(D) - 1 would lose a small D
        return E, torch.where(D.abs() <= limit, E + 1, 0)

    def as_change(self, A: Tensor, B: Tensor) -> Change:
        """E in the form in which a base's kernel takes it."""
        limit = self.config.options.clamp if self.is_exact else None
        return Change(A=A, B=B, s=scaling(self.config), limit=limit)

    def forward(self, x: Tensor) -> Tensor:
        dropped = None
        if self.config.dropout and self.training:
            dropped = F.dropout(x, self.config.dropout)
        return _Liera.apply(x, dropped, self, *self.trained(), *self.base.storage())


class _Liera(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        layer: LieraLinear,
        A: Tensor,
        B: Tensor,
        *storage: Tensor,
    ) -> Tensor:
        base = layer.base
        x_TI = x.reshape(-1, base.in_features)
        d_TI = x_TI if dropped is None else dropped.reshape(-1, base.in_features)
        is_apart = dropped is not None or _is_apart(base, x.dtype)
        whole_OI = None if is_apart else base.unpack_changed(storage, x.dtype, layer.as_change(A, B))
        if is_apart:
            y_TO = base.product(x_TI, storage, None)
        elif whole_OI is not None:
            y_TO = x_TI @ whole_OI.T
        else:
            y_TO = x_TI.new_empty(x_TI.shape[0], base.out_features)
        for rows, W_RI in _tiles(base, storage) if whole_OI is None else ():
            E_RI, _ = layer.change(A, B[rows])
            E_RI.mul_(W_RI)
            if is_apart:
                y_TO[:, rows].addmm_(d_TI, E_RI.to(x.dtype).T)
            else:
                y_TO[:, rows].addmm_(x_TI, E_RI.add_(W_RI).to(x.dtype).T, beta=0)
        if base.bias is not None:
            y_TO += base.bias.to(x.dtype)
        ctx.save_for_backward(x, dropped, A, B, *storage)
        ctx.layer, ctx.is_apart, ctx.is_whole = layer, is_apart, whole_OI is not None
        return y_TO.view(*x.shape[:-1], base.out_features)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, dropped, A, B, *storage = ctx.saved_tensors
        layer: LieraLinear = ctx.layer
        base, dtype = layer.base, dy.dtype
        s = scaling(layer.config)
        g_TO = dy.reshape(-1, base.out_features)
        x_TI = x.reshape(-1, base.in_features)
        d_TI = x_TI if dropped is None else dropped.reshape(-1, base.in_features)
        needs_dx = ctx.needs_input_grad[0]
        if ctx.is_whole:
            dx_TI, dA, dB = _backward_whole(layer, g_TO, x_TI, A, B, tuple(storage), needs_dx=needs_dx)
            dx = None if dx_TI is None else dx_TI.view(x.shape)
            return dx, None, None, dA, dB, *(None for _ in storage)
        dx_TI = torch.zeros_like(x_TI) if needs_dx else None
        dd_TI = torch.zeros_like(d_TI) if dropped is not None and ctx.needs_input_grad[1] else None
        dA, dB = torch.zeros_like(A), torch.empty_like(B)
        for rows, W_RI in _tiles(base, tuple(storage)):
            g_TR = g_TO[:, rows]
            E_RI, slope_RI = layer.change(A, B[rows])
            if ctx.is_apart:
                if dx_TI is not None:
                    dx_TI.addmm_(g_TR, W_RI.to(dtype))
                into = dx_TI if dropped is None else dd_TI
                if into is not None:
                    into.addmm_(g_TR, E_RI.mul_(W_RI).to(dtype))
            elif dx_TI is not None:
                dx_TI.addmm_(g_TR, E_RI.mul_(W_RI).add_(W_RI).to(dtype))
            # dL/dD of these rows, over s; kept in float32 until it is thin
            M_RI = W_RI.mul_(g_TR.T @ d_TI)
            if slope_RI is not None:
                M_RI.mul_(slope_RI)
            M_RI = M_RI.to(dtype)
            dB[rows] = (M_RI @ A.to(dtype).T).float().mul_(s)
            dA.add_((B[rows].to(dtype).T @ M_RI).float(), alpha=s)
        dx = None if dx_TI is None else dx_TI.view(x.shape)
        dd = None if dd_TI is None or dropped is None else dd_TI.view(dropped.shape)
        return dx, dd, None, dA, dB, *(None for _ in storage)


def _backward_whole(
    layer: LieraLinear,
    g_TO: Tensor,
    x_TI: Tensor,
    A: Tensor,
    B: Tensor,
    storage: tuple[Tensor, ...],
    *,
    needs_dx: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dx, dA, dB where a kernel of the base made W* in the forward pass."""
    base, dtype, change = layer.base, g_TO.dtype, layer.as_change(A, B)
    dx_TI = None
    if needs_dx:
        whole_OI = base.unpack_changed(storage, dtype, change)
        assert whole_OI is not None
        dx_TI = g_TO @ whole_OI
        del whole_OI  # before the slope of its size is made
    M_OI = base.unpack_changed(storage, dtype, change, g_TO.T @ x_TI)
    assert M_OI is not None
    dB = (M_OI @ A.to(dtype).T).float().mul_(change.s)
    dA = (B.to(dtype).T @ M_OI).float().mul_(change.s)
    return dx_TI, dA, dB


def _is_apart(base: FrozenLinear, dtype: torch.dtype) -> bool:
    """Whether W x needs a product of its own; see the module docstring."""
    stored = base.storage()[0].dtype
    is_on_grid = base.storage_names() == ("weight",) and stored == dtype != torch.float32
    return is_on_grid or bool(getattr(base, "outlier_threshold", 0.0))


def _tiles(base: FrozenLinear, storage: tuple[Tensor, ...]) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the weight that is used, in float32 and in memory of their own, and where they lie."""
    size = TILE_NUMBERS // base.in_features
    size = size - size % _ALIGN if size >= _ALIGN else max(1, size)
    for first in range(0, base.out_features, size):
        rows = slice(first, first + size)
        dtype = torch.float64 if storage[0].dtype == torch.float64 else torch.float32
        weight = base.unpack(tuple(s[rows] for s in storage), dtype)
        # an unquantized weight of this dtype is the storage itself
        shares = any(weight.data_ptr() == s[rows].data_ptr() for s in storage)
        yield rows, weight.clone() if shares else weight
