"""What are the linear weights of a model like, and what did tuning change in them? One in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from decompft.adapters.spec import ADAPTER_SPECS
from decompft.adapters.targets import TargetMismatch, select
from decompft.launcher.errors import AdapterError, ModelError, UserError
from decompft.launcher.quantized_checkpoint import read_config_json, stored_format
from decompft.launcher.recipe import ModelSection, QuantizationSection
from decompft.launcher.runs import find_run
from decompft.launcher.say import Say
from decompft.launcher.worker.adapter_folder import adapter_folder
from decompft.launcher.worker.build import open_source, outline_of
from decompft.launcher.worker.inspecting.comparison import Comparison, compare
from decompft.launcher.worker.inspecting.distribution import Distribution, distribution
from decompft.launcher.worker.inspecting.layers import layers_of
from decompft.launcher.worker.inspecting.names import kind_and_depth
from decompft.launcher.worker.inspecting.spectrum import Spectrum, spectrum
from decompft.launcher.worker.inspecting.whiteness import Whiteness, whiteness
from decompft.launcher.worker.load import Progress
from decompft.launcher.worker.matching import Want, match_tensors
from decompft.launcher.worker.modelfiles import resolve_model
from decompft.launcher.worker.tensors import TensorSource

Change = Callable[[str, Tensor], Tensor | None]  # a weight's name, the weight: the tuned one, or None


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightRow:
    """One linear weight (out, in)."""

    name: str
    kind: str  # the name behind the layer's number
    depth: int | None
    out_features: int
    in_features: int
    distribution: Distribution
    whiteness: Whiteness | None  # None where all entries are equal
    spectrum: Spectrum
    comparison: Comparison | None  # None where nothing was compared


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The linear layers of a model by name; their weights lie on disk."""

    model: str  # as the user wrote it
    source: TensorSource
    wants: dict[str, Want]

    def read(self, name: str) -> Tensor:
        """(out, in) in the checkpoint's dtype; of a quantized one, dequantized."""
        want = self.wants[name]
        rows = want.parameters[0].shape[0]
        weight = self.source.rows(want.key, 0, rows, transposed=want.transposed)
        if not bool(torch.isfinite(weight).all()):
            raise ModelError(f"{self.model}: {want.key} holds NaN or infinity", "fetch the model again")
        return weight

    def shape(self, name: str) -> tuple[int, int]:
        layer = self.wants[name].layer
        assert layer is not None
        return layer.out_features, layer.in_features


def open_weights(model: str, say: Say) -> Weights:
    """The linear layers of a model, the output head left out; nothing but headers is read.

    Args:
        model: as `model.id` of a recipe: a folder, a hub id, a GGUF file.

    Raises:
        ModelError: not found, or not readable.
    """
    section = ModelSection(id=model)
    folder = resolve_model(section, say=say)
    assert folder is not None, "a model with an id has a folder, or an error says why not"
    whole = QuantizationSection(format="none", compute="float32")
    if stored := stored_format(read_config_json(folder)):
        whole = whole.model_copy(update={"format": stored})
    outline = outline_of(section, whole, None, folder)
    source = open_source(section, folder, 0, outline.shapes, torch.device("cpu"))
    wants, _ = match_tensors(outline.hf, source, prefix=outline.hf.base_model_prefix, new=set())
    linear = {w.name.removesuffix(".weight"): w for w in wants if w.layer is not None}
    return Weights(model=model, source=source, wants=linear)


def selected(weights: Weights, patterns: list[str]) -> list[str]:
    """Names of the layers that patterns, as in `adapter.targets`, select.

    Raises:
        UserError: a pattern selects none.
    """
    try:
        return select(list(weights.wants), patterns, ())
    except TargetMismatch as error:
        raise UserError(f"--layers: {error}", "patterns are those of adapter.targets of a recipe") from error


def open_tuned(tuned: str, weights: Weights, say: Say) -> Change:
    """What turns a weight of the base into that of `tuned`, a model or an adapter over this base.

    Raises:
        ModelError, AdapterError: not found, or it does not belong to the base.
    """
    folder = _adapter(tuned)
    if folder is not None:
        return _merged_by(folder, weights, say)
    other = open_weights(tuned, say)

    def change(name: str, weight: Tensor) -> Tensor | None:
        if name not in other.wants or other.shape(name) != tuple(weight.shape):
            found = f"has shape {list(other.shape(name))}" if name in other.wants else "is missing"
            raise ModelError(
                f"{tuned}: {name} {found}, but {weights.model} has it as {list(weight.shape)}",
                "--tuned takes a model that was tuned from MODEL, or an adapter over it",
            )
        return other.read(name)

    return change


def inspect_weights(
    weights: Weights, names: list[str], change: Change | None, progress: Progress
) -> Iterator[WeightRow]:
    """Statistics of each layer in `names`, on a GPU if there is one.

    Args:
        change: from `open_tuned`; None compares with nothing.
        progress: called with numbers of weights.
    """
    device = _device()
    sizes = {name: weights.shape(name)[0] * weights.shape(name)[1] for name in names}
    done, total = 0, sum(sizes.values())
    for name in names:
        weight = weights.read(name).to(device).float()
        tuned = None if change is None else change(name, weight)
        entries = distribution(weight)
        kind, depth = kind_and_depth(name)
        yield WeightRow(
            name=name,
            kind=kind,
            depth=depth,
            out_features=weight.shape[0],
            in_features=weight.shape[1],
            distribution=entries,
            whiteness=None if entries.label is None else whiteness(weight, entries.mean, entries.std),
            spectrum=spectrum(weight, entries.std),
            comparison=None if tuned is None else compare(weight, tuned.to(device)),
        )
        done += sizes[name]
        progress(done, total)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _adapter(tuned: str) -> Path | None:
    """The folder of an adapter or a run, or None for what must be a model."""
    path = find_run(tuned)
    is_model = not path.is_dir() or (path / "config.json").is_file()
    return None if is_model else adapter_folder(tuned)


def _merged_by(folder: Path, base: Weights, say: Say) -> Change:
    # here and not at the top: `inspect weights` of a bare model needs none of it
    from decompft.launcher.worker.inference import open_adapter

    adapter = open_adapter(folder, base=base.model, say=say)
    section = adapter.adapter
    for method in (section.method, *(o.method for o in section.overrides if o.method)):
        if not ADAPTER_SPECS[method].mergeable:
            raise AdapterError(f"{folder}: {method} is no change of weights: there is nothing to compare")
    tensors = {name: tensor.to(_device()) for name, tensor in adapter.tensors.items()}
    sizes = {name: base.shape(name) for name in base.wants}
    layers = layers_of(adapter.adapter, tensors, adapter.step, sizes=sizes).layers

    def change(name: str, weight: Tensor) -> Tensor | None:
        if name not in layers:
            return weight
        layer = layers[name]
        values = {n: t.detach() for n, t in (*layer.named_parameters(), *layer.named_buffers())}
        return layer.merged(layer.base_rows(weight, 0, values)).detach()

    return change
