"""An adapter's layers from its file: the base stays a shape, looked for only where no tensor tells that shape."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from decompft.adapters.base import Adapter
from decompft.adapters.frozen.dense import DenseLinear
from decompft.adapters.inject import make_adapter
from decompft.adapters.spec import AdapterConfig, spec_of
from decompft.adapters.targets import TargetMismatch, select
from decompft.launcher.errors import AdapterError
from decompft.launcher.recipe import AdapterSection
from decompft.launcher.worker.adapter_json import AdapterJson, read_adapter_json
from decompft.launcher.worker.inspecting.base_sizes import Sizes, sizes_of_base
from decompft.launcher.worker.inspecting.names import natural_order
from decompft.launcher.worker.restore import load_adapter

# sizes that no layer has; in both orders, because a dimension may be the smaller of the two
_STAND_INS = ((1_000_003, 1_000_033), (1_000_033, 1_000_003))


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterLayers:
    """What lies in an adapter's file."""

    layers: dict[str, Adapter]  # by module name; a size that no tensor tells is 1
    whole: dict[str, Tensor]  # of modules that were trained whole
    # layers whose derived buffers are on meta: their values follow from a size that nothing here tells (VeRA's A0)
    unsized: tuple[str, ...] = ()


def open_layers(folder: Path) -> tuple[AdapterLayers, AdapterJson]:
    """The layers in an adapter's folder, and its adapter.json.

    Raises:
        AdapterError: damaged, or of a method that this version does not have.
    """
    tensors, description = load_adapter(folder)
    told = read_adapter_json(folder, description)
    found = layers_of(told.adapter, tensors, told.step)
    if found.unsized and (sizes := sizes_of_base(description)):
        found = layers_of(told.adapter, tensors, told.step, sizes=sizes)
    return found, told


def layers_of(
    section: AdapterSection, tensors: Mapping[str, Tensor], step: int | None, *, sizes: Sizes | None = None
) -> AdapterLayers:
    """Put the tensors of an adapter's file into layers of their methods, on the tensors' device.

    Args:
        step: optimizer steps it was trained for; None leaves what depends on it as at the end.
        sizes: of the base's layers, for what the shapes of the tensors do not tell.

    Raises:
        AdapterError: no tensors of the file are those of the method, or they are of another rank.
    """
    inside: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, own = name.rpartition(".")
        inside.setdefault(module, {})[own] = tensor
    layers: dict[str, Adapter] = {}
    unsized: list[str] = []
    derived: dict[str, dict[str, Tensor]] = {}  # layers of one method and shape share them
    for module, config in _configs(section, sorted(inside, key=natural_order)).items():
        if inside[module].keys() == _shapes(config, 2, 2).keys():
            told = _sizes(config, inside[module])
            known = (sizes or {}).get(module, told)
            # a size that is needed: 0 is that of no layer
            if None not in known or not spec_of(config).derived(0, 0, config):
                layers[module] = _layer(config, inside[module], known, derived)
            else:
                layers[module] = _layer(config, inside[module], known, None)
                unsized.append(module)
            if step:
                layers[module].on_step(step - 1)
    if not layers:
        raise AdapterError(
            f"adapter.safetensors: holds no layer with the tensors of {section.method}: "
            + ", ".join(_shapes(section.config(), 2, 2)),
            "the file and adapter.json belong to different adapters",
        )
    whole = {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in layers}
    return AdapterLayers(layers=layers, whole=whole, unsized=tuple(unsized))


def _configs(section: AdapterSection, names: list[str]) -> dict[str, AdapterConfig]:
    """As `launcher.layers.layer_configs`, but of layers that are known to be adapted: the names of the
    others are not in the file, so a target that selects none of these is no mistake."""
    configs = dict.fromkeys(names, section.config())
    for override in section.overrides:
        targets = [override.targets] if isinstance(override.targets, str) else override.targets
        for target in () if override.skip else targets:
            with suppress(TargetMismatch):
                configs |= dict.fromkeys(select(names, target, ()), section.config(override))
    return configs


def _shapes(config: AdapterConfig, out: int, in_: int) -> dict[str, tuple[int, ...]]:
    spec = spec_of(config)
    return {**spec.tensors(out, in_, config), **spec.buffers(out, in_, config)}


def _layer(
    config: AdapterConfig,
    tensors: dict[str, Tensor],
    sizes: tuple[int | None, int | None],
    derived: dict[str, dict[str, Tensor]] | None,
) -> Adapter:
    """
    Args:
        sizes: (out, in); None for what is not known.
        derived: what was made for layers before, to which this one adds; None leaves it on meta.
    """
    out, in_ = (size or 1 for size in sizes)
    with torch.device("meta"):
        layer = make_adapter(DenseLinear(in_, out, dtype=torch.float32, bias_dtype=None), config)
    for own, tensor in tensors.items():
        is_trained = own in layer.shapes
        setattr(layer, own, nn.Parameter(tensor.float(), requires_grad=False) if is_trained else tensor)
    if layer.derived_shapes and derived is not None:
        key = f"{config.method} {config.options} {layer.derived_shapes}"
        if key not in derived:
            device = next(iter(tensors.values())).device
            derived[key] = {own: value.to(device) for own, value in layer.derived().items()}
        for own, value in derived[key].items():
            setattr(layer, own, value)
    return layer


def _sizes(config: AdapterConfig, tensors: dict[str, Tensor]) -> tuple[int | None, int | None]:
    """(out, in) of the base, from where they turn up in the shapes of the method's tensors; None if nowhere.

    Raises:
        AdapterError: the method's tensors have another number of dimensions, or another size that no layer changes.
    """
    out = in_ = None
    one, other = (_shapes(config, *sizes) for sizes in _STAND_INS)
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        fits = len(shape) == len(one[name])
        for size, *stand_ins in zip(shape, one[name], other[name], strict=False):
            # what is the same in both orders, and not because it is the smaller of the two
            if stand_ins[0] == stand_ins[1] != size and stand_ins[0] < min(_STAND_INS[0]):
                fits = False
            if tuple(stand_ins) == (_STAND_INS[0][0], _STAND_INS[1][0]):
                out = size
            elif tuple(stand_ins) == (_STAND_INS[0][1], _STAND_INS[1][1]):
                in_ = size
        if not fits:
            raise AdapterError(
                f"adapter.safetensors: {name} of {list(shape)} does not go with {config.method} of rank {config.rank}",
                "the file and adapter.json belong to different adapters",
            )
    return out, in_
