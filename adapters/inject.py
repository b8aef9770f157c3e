"""Meta surgery: every linear layer becomes a frozen base, the targeted ones an adapter over it."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from decompft.adapters.base import Adapter
from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.spec import ADAPTER_SPECS, AdapterConfig
from decompft.adapters.specs.base import inner_config

MakeFrozen = Callable[[str, int, int, torch.dtype | None], FrozenLinear]  # name, in, out, bias dtype


def inject(
    model: nn.Module,
    configs: Callable[[list[str]], Mapping[str, AdapterConfig]],
    heads: list[str],
    make: MakeFrozen,
) -> list[str]:
    """Replace the linear layers of `model` (on meta) in place, and freeze everything else.

    Args:
        configs: names of all linear layers but the heads -> the adapters of those that get one.
        heads: names of output heads, which are neither adapted nor replaced.
        make: builds the frozen base of a layer.

    Returns:
        Names of the adapted layers.
    """
    linears = {n: m for n, m in model.named_modules() if is_linear(m) and n not in heads}
    adapted = configs(list(linears))
    siblings = Counter(_regularised_as(config) for config in adapted.values())
    for name, module in linears.items():
        out_features, in_features = linear_shape(module)
        bias = module.bias.dtype if module.bias is not None else None
        base = make(name, in_features, out_features, bias)
        base.transposed = is_transposed(module)
        model.set_submodule(name, base)
        if (config := adapted.get(name)) is not None:
            adapter = make_adapter(base, config)
            adapter.num_siblings = siblings[_regularised_as(config)]
            model.set_submodule(name, adapter)
    _share_derived(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for _, adapter in adapters(model):
        for parameter in adapter.parameters(recurse=False):
            parameter.requires_grad_(True)
    return [name for name in linears if name in adapted]


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """The adapters of a model with their names, in the model's order."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, Adapter))


def remarks(model: nn.Module) -> list[str]:
    """What the methods of a model have to say about their start, a line each."""
    classes: dict[type[Adapter], list[tuple[str, Adapter]]] = {}
    for name, adapter in adapters(model):
        classes.setdefault(type(adapter), []).append((name, adapter))
    return [line for kind, layers in classes.items() for line in kind.remarks(layers)]


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


def make_adapter(base: FrozenLinear, config: AdapterConfig) -> Adapter:
    """An adapter of the config's method over a frozen layer, its tensors not set yet."""
    module, _, name = ADAPTER_SPECS[config.method].impl.partition(":")
    made: Adapter = getattr(importlib.import_module(module), name)(base, config)
    return made


def _regularised_as(config: AdapterConfig) -> str:
    """The method over whose layers a regulariser is a mean: under map the inner one, whose regulariser map's is."""
    while config.method == "map":
        config = inner_config(config)
    return config.method


def _share_derived(model: nn.Module) -> None:
    """Layers whose derived buffers must hold the same values hold one tensor."""
    made: dict[tuple[object, ...], Tensor] = {}
    for _, adapter in adapters(model):
        config = adapter.config
        for name, shape in adapter.derived_shapes.items():
            key = (config.method, repr(config.options), name, shape)
            adapter._buffers[name] = made.setdefault(key, adapter.get_buffer(name))
