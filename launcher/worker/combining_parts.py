"""Which task vectors do several adapters hold, and do they belong to one base?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decompft.adapters.base import Adapter as AdapterLayer
from decompft.adapters.combine import Thin
from decompft.adapters.inject import adapters
from decompft.adapters.spec import ADAPTER_SPECS
from decompft.launcher.errors import AdapterError
from decompft.launcher.worker.build import DTYPES, Outline, open_source, outline_of, trained_targets
from decompft.launcher.worker.engines.base import Engine
from decompft.launcher.worker.inference import Adapter
from decompft.launcher.worker.matching import Want, match_tensors
from decompft.launcher.worker.state import place_adapter
from decompft.launcher.worker.tensors import SafetensorsSource


@dataclass(frozen=True, kw_only=True)
class Part:
    """One adapter, its trained numbers in place."""

    adapter: Adapter
    description: dict[str, Any]  # adapter.json
    outline: Outline
    layers: dict[str, AdapterLayer]  # by the name of the weight that each changes
    whole: dict[str, Tensor]  # parameters of modules that were trained whole, by name
    biases: dict[str, Tensor]  # what layers add to biases, by the bias's name
    is_thin: bool  # every layer's change is up @ down over the unscaled base, and there is nothing else to it

    @property
    def name(self) -> str:
        """How a message names it."""
        return f"{self.adapter.folder} ({self.adapter.adapter.method})"

    def scaled(self, name: str, weight: Tensor) -> tuple[float, Thin] | None:
        """(p, (up, down)) with W* = p W + up @ down for a number p, as MAP's; None if it is not of this kind."""
        layer = self.layers.get(name)
        if layer is None or layer.rewrites_base:
            return None
        found = layer.effective(weight)
        if found.col is not None or found.row is None or found.row.numel() > 1:
            return None
        if found.up is None or found.down is None:
            return None
        return float(found.row), (found.q * found.up, found.down)

    def other_change(self, name: str, base: Tensor) -> Tensor:
        """The task vector of a parameter that is no weight of an adapted layer."""
        if name in self.whole:
            return self.whole[name] - base
        return self.biases.get(name, torch.zeros_like(base))


class Base:
    """The weights under the parts, one tensor at a time, in float32."""

    def __init__(self, part: Part, device: torch.device, *, as_trained: bool) -> None:
        """
        Args:
            as_trained: weights of linear layers are quantized and back, as the part used them; else the
                checkpoint's own.
        """
        adapter, outline = part.adapter, part.outline
        self._source = open_source(adapter.model, adapter.model_dir, adapter.seed, outline.shapes, device)
        wants, missing = match_tensors(
            outline.hf, self._source, prefix=outline.hf.base_model_prefix, new=set(part.whole)
        )
        self._wants = {want.name: want for want in wants}
        self._device, self._as_trained = device, as_trained
        self._compute = DTYPES[adapter.quantization.activations]
        self.names = tuple(self._wants)
        self.missing = tuple(missing)  # new heads

    def weight(self, name: str) -> Tensor:
        """A linear layer's weight (out, in)."""
        return self._used(self._wants[name], self._rows(name))

    def change(self, part: Part, name: str, weight: Tensor) -> Tensor:
        """The task vector of `weight`, which is `self.weight(name)`."""
        layer = part.layers.get(name)
        if layer is None:
            return torch.zeros_like(weight)
        if (delta := layer.delta()) is not None:
            return delta[0] @ delta[1]
        under = weight
        if layer.rewrites_base:
            values = {own: layer.get_buffer(own) for own in layer.fixed_shapes}
            under = self._used(self._wants[name], layer.base_rows(self._rows(name), 0, values))
        return layer.merged(under) - weight

    def tensor(self, name: str) -> Tensor | None:
        """Any other tensor; None for a new head, which the checkpoint does not have."""
        return self._rows(name) if name in self._wants else None

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor in a model that is written."""
        if name in self._wants and isinstance(self._source, SafetensorsSource):
            return self._source.dtype(self._wants[name].key)
        return self._compute

    def stored(self, name: str) -> Tensor:
        """A tensor as a model's folder has it."""
        return self.as_stored(name, self._raw(name))

    def as_stored(self, name: str, rows: Tensor) -> Tensor:
        """The rows of a tensor, dtype and layout as in a model's folder."""
        return (rows.T if self._wants[name].transposed else rows).to(self.dtype(name))

    def _used(self, want: Want, rows: Tensor) -> Tensor:
        # a packed weight was read dequantized already, in the very numbers of training
        if not self._as_trained or self._source.is_packed(want.key):
            return rows
        assert want.layer is not None, want.name
        return want.layer.unpack(want.layer.pack(rows), torch.float32)

    def _rows(self, name: str) -> Tensor:
        return self._raw(name).to(self._device).float()

    def _raw(self, name: str) -> Tensor:
        want = self._wants[name]
        return self._source.rows(want.key, 0, want.parameters[0].shape[0], transposed=want.transposed)


def open_parts(opened: Sequence[Adapter], device: torch.device) -> tuple[Part, ...]:
    """The adapters as task vectors over one base.

    Raises:
        AdapterError: they differ in base, task, shapes or modules trained whole, or one is no change of weights.
    """
    described = [json.loads((adapter.folder / "adapter.json").read_bytes()) for adapter in opened]
    for adapter, description in zip(opened, described, strict=True):
        _refuse_another_base(opened[0].folder, described[0], adapter.folder, description)
    parts = tuple(_part(adapter, text, device) for adapter, text in zip(opened, described, strict=True))
    for part in parts[1:]:
        _refuse_other_shapes(parts[0], part)
    return parts


@torch.no_grad()
def _part(adapter: Adapter, description: dict[str, Any], device: torch.device) -> Part:
    if adapter.tokens:
        raise AdapterError(
            f"{adapter.folder}: has trained rows of tokens (adapter.train_tokens), which are neither combined nor "
            "exported, and without which it would not be what was trained",
            "decompft merge writes base, adapter and rows as one model",
        )
    outline = outline_of(adapter.model, adapter.quantization, adapter.adapter, adapter.model_dir)
    layers = dict(adapters(outline.hf))
    for layer in layers.values():
        if not ADAPTER_SPECS[layer.config.method].mergeable:
            raise AdapterError(
                f"{adapter.folder}: {layer.config.method} is no change of weights: it cannot be combined",
                "leave it out",
            )
    for layer in layers.values():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, nn.Parameter(torch.empty_like(parameter, device=device)))
        for name, buffer in list(layer.named_buffers(recurse=False)):
            setattr(layer, name, torch.empty_like(buffer, device=device))
        for name, value in layer.derived().items():
            layer.get_buffer(name).copy_(value)
    inside = {
        f"{path}.{own}" for path, layer in layers.items() for own in (*layer.shapes, *layer.fixed_shapes)
    }
    # what trains whole stays on meta, where placing checks names and shapes alone
    place_adapter(trained_targets(outline.hf), adapter.tensors, Engine(device, timeout_s=60))
    adapter.settle(outline.hf)
    biases = {f"{path}.bias": layer.merged_bias(None) for path, layer in layers.items()}
    return Part(
        adapter=adapter,
        description=description,
        outline=outline,
        layers={f"{path}.weight": layer for path, layer in layers.items()},
        whole={n: t.to(device).float() for n, t in adapter.tensors.items() if n not in inside},
        biases={name: bias for name, bias in biases.items() if bias is not None},
        is_thin=all(layer.delta() is not None for layer in layers.values()),
    )


def _refuse_another_base(
    first: Path, of_first: dict[str, Any], other: Path, of_other: dict[str, Any]
) -> None:
    for key, what in (("sha256", "base"), ("weights", "weights of the base"), ("seed", "random weights")):
        one, two = of_first["base"].get(key), of_other["base"].get(key)
        if one != two:
            names = [_base_name(description["base"]) for description in (of_first, of_other)]
            raise AdapterError(
                f"{other}: was trained over another {what} than {first}: {names[1]}, not {names[0]}",
                "task vectors add up only over the very same weights",
            )
    one, two = (description["model"]["task"] for description in (of_first, of_other))
    if one != two:
        raise AdapterError(
            f"{other}: its task is {two}, that of {first} is {one}", "combine adapters of one task"
        )


def _base_name(base: dict[str, Any]) -> str:
    name = base.get("id") or base.get("source") or f"a {base['config']['model_type']} from config"
    seed = f", seed {base['seed']}" if "seed" in base else ""
    return f"{name} (sha256 {base['sha256'][:12]}{seed})"


def _refuse_other_shapes(first: Part, other: Part) -> None:
    """All of one base have the same weights; what was trained whole must be the same modules."""
    if odd := sorted(set(first.whole) ^ set(other.whole)):
        has, lacks = (first, other) if odd[0] in first.whole else (other, first)
        raise AdapterError(
            f"{lacks.name}: did not train {odd[0]}, which {has.name} trained whole",
            "adapter.train_modules must be the same in all parts; merge each on its own instead",
        )
    for name, tensor in first.whole.items():
        if tensor.shape != other.whole[name].shape:
            raise AdapterError(
                f"{name}: has shape {list(other.whole[name].shape)} in {other.name}, "
                f"{list(tensor.shape)} in {first.name}",
                "the parts must have the same number of labels and vocabulary",
            )
