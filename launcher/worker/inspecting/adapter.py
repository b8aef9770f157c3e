"""What did an adapter learn, layer by layer, told from its own file (METHODS 2.6, item 3)?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from decompft.adapters.base import Adapter
from decompft.adapters.frozen.factors import Factors
from decompft.adapters.liera import LieraLinear
from decompft.adapters.lora import scaling
from decompft.launcher.worker.inspecting.by_kind import Profile, profile
from decompft.launcher.worker.inspecting.layers import AdapterLayers
from decompft.launcher.worker.inspecting.names import kind_and_depth
from decompft.launcher.worker.inspecting.product import Product, product

# what the product is: the whole change of the weight; all of it but a scaled base; or only the method's
# s B A, where the change needs the base as well (DoRA), part of the base was moved into it (PiSSA), or there is
# no changed weight (a nonlinear adapter); LieRA's and HiRA's s B A goes with every weight, as it says
Meaning = Literal[
    "dW",
    "dW without the base's scale",
    "s B A",
    "s B A, the factor's change: W o (1 + s B A)",
    "s B A, the exponent: W o exp(s B A)",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Values:
    """A scalar or a vector, or a matrix of which only this matters here."""

    shape: tuple[int, ...]
    norm: float  # Frobenius
    mean: float
    std: float
    min: float
    max: float


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterRow:
    """One adapted layer; W (out, in)."""

    name: str
    kind: str
    depth: int | None
    out_features: int
    in_features: int
    meaning: Meaning | None  # of `product`; None without one
    product: Product | None  # the low-rank part; None for methods without one, and where a size is not known
    row_scale: Values | None  # W's rows are scaled by these: MAP's a / N(W), (IA)^3's vector
    column_scale: Values | None
    tensors: dict[str, Values]  # trained: A, B, MAP's a and b, DoRA's m
    buffers: dict[str, Values]  # kept with them: norms, thin factors of W, the phase


@torch.no_grad()
def inspect_adapter(adapter: AdapterLayers) -> list[AdapterRow]:
    """Statistics of every layer; no matrix of a weight's size is made."""
    unsized = set(adapter.unsized)
    return [_row(name, layer, is_sized=name not in unsized) for name, layer in adapter.layers.items()]


def std_profile(rows: Sequence[AdapterRow]) -> Profile:
    """The deviation of the low-rank part over the depth of one kind of layer."""
    return profile(rows, lambda row: row.product.std if row.product else None)


def values(tensor: Tensor) -> Values:
    wide = tensor.detach().double()
    return Values(
        shape=tuple(tensor.shape),
        norm=torch.linalg.vector_norm(wide).item(),
        mean=wide.mean().item(),
        std=wide.std(correction=0).item(),
        min=wide.min().item(),
        max=wide.max().item(),
    )


def _row(name: str, layer: Adapter, *, is_sized: bool) -> AdapterRow:
    kind, depth = kind_and_depth(name)
    factors, meaning = _factors(layer) if is_sized else (Factors(), None)
    found = None
    if factors.up is not None and factors.down is not None:
        found = product(factors.up.double() * factors.q, factors.down)
    buffers = {n: values(layer.get_buffer(n)) for n in layer.fixed_shapes}
    return AdapterRow(
        name=name,
        kind=kind,
        depth=depth,
        out_features=layer.base.out_features,
        in_features=layer.base.in_features,
        meaning=None if found is None else meaning,
        product=found,
        row_scale=None if factors.row is None else values(factors.row),
        column_scale=None if factors.col is None else values(factors.col),
        tensors={n: values(t) for n, t in layer.named_parameters(recurse=False)},
        buffers=buffers,
    )


def _factors(layer: Adapter) -> tuple[Factors, Meaning]:
    """What can be known of a layer's factors without its base."""
    if isinstance(layer, LieraLinear):
        meaning: Meaning = "s B A, the factor's change: W o (1 + s B A)"
        if layer.is_exact:
            meaning = "s B A, the exponent: W o exp(s B A)"
        return Factors(up=layer.B, down=layer.A, q=scaling(layer.config)), meaning
    if layer.reads_weight:
        A, B = (getattr(layer, name, None) for name in ("A", "B"))
        return Factors(up=B, down=A, q=scaling(layer.config)), "s B A"
    found = layer.effective(torch.empty(0))
    if layer.rewrites_base or found.relu:
        return found, "s B A"
    return found, "dW" if found.row is None and found.col is None else "dW without the base's scale"
