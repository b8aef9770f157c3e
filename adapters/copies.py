"""Which trained tensors of a model are the thin factors themselves, so that rounded copies of them serve a whole step.

A factor that a method computes anew in each pass (DoRA's up, B / ||.||) has none and is cast where it is used.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from decompft.adapters.base import Adapter
from decompft.adapters.frozen.rounded import Rounded
from decompft.adapters.inject import adapters
from decompft.adapters.joint import joints
from decompft.adapters.map_scales import map_scales


def round_factors(model: nn.Module, dtype: torch.dtype) -> Rounded:
    """Copies in `dtype` of the thin factors that are whole trained tensors; a joint's downs one after the other."""
    found: dict[int, Tensor] = {}
    if dtype.itemsize < torch.float32.itemsize:
        groups = [[m for m in joint.members if isinstance(m, Adapter)] for joint in joints(model)]
        for members in (*groups, *([a] for _, a in adapters(model))):
            pairs = [_factors(a) for a in members]
            for factor in (*(down for _, down in pairs), *(up for up, _ in pairs)):
                if factor is not None:
                    found.setdefault(id(factor), factor)
    whole = [a for _, a in adapters(model) if len(list(_whole(a))) == len(a.shapes)]
    return Rounded(list(found.values()), dtype, map_scales(whole, dtype))


@torch.no_grad()
def _factors(adapter: Adapter) -> tuple[Tensor | None, Tensor | None]:
    """(up, down), None for what is no trained tensor that lies here as a whole."""
    whole = {id(p): p for p in _whole(adapter)}
    has_own_pass = type(adapter).forward is not Adapter.forward
    if adapter.reads_weight or has_own_pass or len(whole) < len(adapter.shapes):
        return None, None
    found = adapter.factors(adapter.trained(), adapter.fixed())
    return whole.get(id(found.up)), whole.get(id(found.down))


def _whole(adapter: Adapter) -> Iterator[nn.Parameter]:
    """Parameters that no engine has cut, or gathers for a pass."""
    for name, parameter in adapter.named_parameters(recurse=False):
        if type(parameter) is nn.Parameter and tuple(parameter.shape) == adapter.shapes[name]:
            yield parameter
