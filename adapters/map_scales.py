"""MAP's scales of all layers, made once a step (kernels/norm_many.py), and found again by each layer's passes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch

from decompft.adapters.base import Adapter
from decompft.adapters.kernels import norm, norm_many
from decompft.adapters.map import MapLinear, state_of


class MapScales:
    """Of layers that one `Many` takes. Good from `refresh` to `drop`, for tensors to which nobody writes meanwhile."""

    def __init__(self, layers: Sequence[MapLinear], dtype: torch.dtype) -> None:
        self._layers = list(layers)
        self._tensors = [(a.A, a.B, a.a, a.b, a.base_norm) for a in layers]
        self._many = norm_many.Many(
            self._tensors, dtype, eps=layers[0].config.options.eps, s=layers[0].scaling
        )

    def refresh(self) -> None:
        self._many.refresh()
        for layer, made, tensors in zip(self._layers, self._many.layers, self._tensors, strict=True):
            layer.made_ahead, layer.made_of = made, state_of(tensors[:4])

    def drop(self) -> None:
        for layer in self._layers:
            layer.made_ahead = None


@torch.no_grad()
def map_scales(layers: Iterable[Adapter], dtype: torch.dtype) -> list[MapScales]:
    """Of those that MAP over LoRA has among the layers, whose tensors lie here whole."""
    groups: dict[tuple[object, ...], list[MapLinear]] = defaultdict(list)
    for layer in layers:
        if type(layer) is MapLinear and norm.fits(layer.A, layer.B) and norm_many.runs(layer.A.device, dtype):
            key = layer.A.device, len(layer.A), layer.config.options.eps, layer.scaling
            groups[key].append(layer)
    return [MapScales(group, dtype) for group in groups.values()]
