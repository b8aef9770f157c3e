"""Meta surgery: every linear layer becomes a frozen base, the targeted ones an adapter over it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from decompft.adapters.base import Adapter
from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.spec import ADAPTER_SPECS, AdapterConfig
from decompft.adapters.targets import select

MakeFrozen = Callable[[str, int, int, torch.dtype | None], FrozenLinear]  # name, in, out, bias dtype


def inject(
    model: nn.Module,
    config: AdapterConfig | None,
    targets: str | list[str],
    heads: list[str],
    make: MakeFrozen,
) -> list[str]:
    """Replace the linear layers of `model` (on meta) in place, and freeze everything else.

    Args:
        config: the adapter, or None to freeze only.
        targets: as `adapter.targets` of a recipe.
        heads: names of output heads, which are neither adapted nor replaced.
        make: builds the frozen base of a layer.

    Returns:
        Names of the adapted layers.

    Raises:
        TargetMismatch: a target matches nothing.
    """
    linears = {n: m for n, m in model.named_modules() if is_linear(m) and n not in heads}
    adapted = set(select(list(linears), targets, heads)) if config else set()
    for name, module in linears.items():
        out_features, in_features = linear_shape(module)
        bias = module.bias.dtype if module.bias is not None else None
        base = make(name, in_features, out_features, bias)
        base.transposed = is_transposed(module)
        model.set_submodule(
            name, _adapter_class(config)(base, config) if config and name in adapted else base
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for _, adapter in adapters(model):
        for parameter in adapter.parameters(recurse=False):
            parameter.requires_grad_(True)
    return [name for name in linears if name in adapted]


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """The adapters of a model with their names, in the model's order."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, Adapter))


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """GPT-2's Conv1D: a linear layer whose weight is stored (in, out)."""
    return type(module).__name__ == "Conv1D"


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features)."""
    weight: Tensor = module.weight  # type: ignore[assignment]  # both kinds have one
    first, second = weight.shape
    return (second, first) if is_transposed(module) else (first, second)


def _adapter_class(config: AdapterConfig) -> Any:
    module, _, name = ADAPTER_SPECS[config.method].impl.partition(":")
    return getattr(importlib.import_module(module), name)
