"""An adapter folded into its base, written as a plain model: one tensor in memory at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from decompft.adapters.base import Adapter as AdapterLayer
from decompft.adapters.formats import FORMAT_SPECS
from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.inject import adapters, is_linear
from decompft.adapters.spec import ADAPTER_SPECS
from decompft.adapters.token_rows import TokenRows
from decompft.launcher.errors import AdapterError, RunFailed, UserError
from decompft.launcher.worker.bitsandbytes_layout import (
    is_written,
    packed_entries,
    quantization_config,
    writable,
)
from decompft.launcher.worker.build import DTYPES, Outline, open_source, outline_of, trained_targets
from decompft.launcher.worker.engines.base import Engine
from decompft.launcher.worker.inference import Adapter
from decompft.launcher.worker.load import Progress
from decompft.launcher.worker.matching import Want, match_tensors
from decompft.launcher.worker.model_folder import write_config, write_shards
from decompft.launcher.worker.state import place_adapter
from decompft.launcher.worker.tensorfile import Entry, fsync_folder
from decompft.launcher.worker.tensors import SafetensorsSource, TensorSource
from decompft.launcher.worker.token_rows import by_tensor, merged_rows, num_new_rows

Into = Literal["dense", "dequantized", "requantized"]
SHARD_BYTES = 5_000_000_000


@dataclass(kw_only=True)
class Unmerged:
    """How far the base's weights can be got back from what was written.

    `error` is the norm of the difference over the norm of the weight, of the layer where it is largest.
    """

    error: float = 0.0
    layer: str = ""

    def note(self, layer: str, error: float) -> None:
        if not error <= self.error:  # NaN stays
            self.error, self.layer = error, layer


def merge(
    adapter: Adapter, into: Into, out: Path, *, shard_bytes: int = SHARD_BYTES, progress: Progress
) -> Unmerged:
    """Write config, tokenizer and weights of the merged model into the new folder `out`.

    Args:
        into: dense: onto the base's own weights; dequantized: onto the weights as training used them,
            quantized and back, so that the result computes what was trained; requantized: as dense,
            then quantized as the base was in training, in bitsandbytes' layout. From the dequantized
            weights most changes would be rounded back to where they came from.
        shard_bytes: of one safetensors file at most, unless the parts of a single weight are larger.

    Returns:
        With `into` dense how well the change can be taken off again; else without a layer.

    Raises:
        UserError: `out` exists.
        AdapterError: the method is no change of weights, or there is no format to quantize to.
        CheckpointError: the adapter does not fit the base.
        RunFailed: the disk is full, or refuses; `out` does not exist then.
    """
    check_mergeable(adapter, into, out)
    unmerged = Unmerged()
    temporary: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        temporary.chmod(0o755)
        outline = outline_of(
            adapter.model, adapter.quantization, adapter.adapter, adapter.model_dir, adapter.tokens
        )
        merging = _Merging(adapter, outline, into, unmerged)
        write_shards(temporary, list(merging.groups()), shard_bytes, progress)
        quantized = None
        if into == "requantized":
            quantized = quantization_config(outline.quantization, _plain_linears(outline.hf))
        write_config(
            temporary, adapter, type(outline.hf).__name__, quantized, num_new_rows=num_new_rows(outline.hf)
        )
        adapter.tokenizer().save_pretrained(temporary)
        fsync_folder(temporary)
        os.rename(temporary, out)
    except OSError as error:
        raise RunFailed(
            f"{out}: not written: {error.strerror or error}", "free some space, or name another disk"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return unmerged


def check_mergeable(adapter: Adapter, into: Into, out: Path) -> None:
    """Refuse what cannot be merged, before anything is read. Raises as `merge`."""
    if out.exists():
        raise UserError(f"{out}: exists already", "name a new folder with --out")
    section = adapter.adapter
    for method in (section.method, *(o.method for o in section.overrides if o.method)):
        if not ADAPTER_SPECS[method].mergeable:
            raise AdapterError(f"{adapter.folder}: {method} is no change of weights: it cannot be merged")
    if into != "requantized":
        return
    kind = adapter.quantization.format
    if not FORMAT_SPECS[kind].is_quantized:
        raise AdapterError(
            f"{adapter.folder}: was trained over a base that is not quantized: there is no format to go back to",
            "use --into dense",
        )
    if kind not in ("nf4", "fp4", "int8"):
        raise AdapterError(
            f"{adapter.folder}: was trained over {kind}, in which transformers stores no checkpoint with a scale "
            "a row",
            "use --into dequantized for what was trained, or --into dense; nf4, fp4 and int8 can be requantized",
        )


@dataclass
class _Merging:
    """Every tensor of the merged model under transformers' own name, read when its turn comes."""

    adapter: Adapter
    outline: Outline
    into: Into
    unmerged: Unmerged
    device: torch.device = field(init=False)
    source: TensorSource = field(init=False)
    last_packed: tuple[str, tuple[Tensor, ...]] = ("", ())

    def __post_init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        adapter = self.adapter
        self.source = open_source(
            adapter.model, adapter.model_dir, adapter.seed, self.outline.shapes, self.device
        )

    def groups(self) -> Iterator[list[Entry]]:
        """Tensors that belong into one file."""
        trained, outline = self.adapter.tensors, self.outline
        _place(self.adapter, outline, self.device)
        layers = {id(layer.base): layer for _, layer in adapters(outline.hf)}
        biases = {f"{name}.bias": layer for name, layer in adapters(outline.hf)}
        wants, missing = match_tensors(
            outline.hf, self.source, prefix=outline.hf.base_model_prefix, new=set(trained)
        )
        compute = DTYPES[self.adapter.quantization.activations]
        rows = by_tensor(outline.hf, trained)
        for want in wants:
            is_file = isinstance(self.source, SafetensorsSource)
            dtype = self.source.dtype(want.key) if is_file else compute
            layer = layers.get(id(want.layer))
            if want.layer is not None and self.into == "requantized" and is_written(want.layer):
                yield self._packed(want, want.layer, layer, dtype)
                continue
            if want.name in rows:
                yield [self._with_rows(want, *rows[want.name], dtype)]
                continue
            if want.name in trained:  # a module that was trained whole
                read = partial(trained[want.name].to, dtype)
            elif want.name in biases:
                read = partial(self._bias, want, biases[want.name], dtype)
            else:
                read = partial(self._stored, want, layer, dtype)
            yield [Entry(key=want.name, shape=outline.shapes[want.name], dtype=dtype, read=read)]
        for name in missing:  # a new head
            read = partial(trained[name].to, compute)
            yield [Entry(key=name, shape=outline.shapes[name], dtype=compute, read=read)]

    def _with_rows(self, want: Want, module: TokenRows, trained: Tensor | None, dtype: torch.dtype) -> Entry:
        """A frozen embedding, head or head's bias with the trained rows in it, and past it."""

        def read() -> Tensor:
            rows = self.source.rows(want.key, 0, want.parameters[0].shape[0]).to(dtype)
            return merged_rows(module, rows, trained)

        height, *width = self.outline.shapes[want.name]
        return Entry(key=want.name, shape=(height + module.num_new, *width), dtype=dtype, read=read)

    def _packed(
        self, want: Want, frozen: FrozenLinear, layer: AdapterLayer | None, dtype: torch.dtype
    ) -> list[Entry]:
        layout = writable(frozen)

        @torch.no_grad()
        def pack() -> tuple[Tensor, ...]:
            # codes and scales are asked for one after the other
            if self.last_packed[0] != want.name:
                self.last_packed = want.name, layout.pack(self._rows(want, layer))
            return self.last_packed[1]

        return list(packed_entries(want.name, layout, dtype, pack))

    @torch.no_grad()
    def _stored(self, want: Want, layer: AdapterLayer | None, dtype: torch.dtype) -> Tensor:
        """One tensor as the base's checkpoint stores it: linear weights merged, all else as it is."""
        rows = self._rows(want, layer, dtype)
        return (rows.T if want.transposed else rows).to(dtype)

    @torch.no_grad()
    def _bias(self, want: Want, layer: AdapterLayer, dtype: torch.dtype) -> Tensor:
        rows = self.source.rows(want.key, 0, layer.base.out_features).to(self.device)
        merged = layer.merged_bias(rows)
        assert merged is not None, "a bias plus something is a bias"
        return merged.to(dtype)

    @torch.no_grad()
    def _rows(self, want: Want, layer: AdapterLayer | None, stored: torch.dtype | None = None) -> Tensor:
        """(out, in) rows, merged.

        Args:
            stored: the dtype they will be rounded to, if the change shall be taken off again for a look.
        """
        rows = self.source.rows(want.key, 0, want.parameters[0].shape[0], transposed=want.transposed)
        if want.layer is None:
            return rows
        rows = rows.to(self.device)
        # a packed weight was read dequantized already, in the very numbers of training
        if not self.source.is_packed(want.key):
            if layer is not None and layer.rewrites_base:
                rows = layer.base_rows(rows, 0, {n: getattr(layer, n) for n in _of_file(layer)})
            if self.into == "dequantized":
                rows = want.layer.unpack(want.layer.pack(rows), torch.float32)
        if layer is None:
            return rows
        merged = layer.merged(rows)
        if stored is not None and self.into == "dense":
            self.unmerged.note(want.name.removesuffix(".weight"), _lost(layer, rows, merged.to(stored)))
        return merged


def _lost(layer: AdapterLayer, dense: Tensor, merged: Tensor) -> float:
    """What is lost of W when the change is taken off again, over W's norm."""
    left = layer.unmerged(merged, dense)
    return float(torch.linalg.norm(left - dense.float()) / torch.linalg.norm(dense.float()))


def _plain_linears(hf: Any) -> list[str]:
    """Linear layers that a requantized checkpoint holds in plain floats: the head, and what the base's has so."""
    return [
        name.removesuffix(".base")
        for name, module in hf.named_modules()
        if is_linear(module) or (isinstance(module, FrozenLinear) and not is_written(module))
    ]


def _of_file(layer: AdapterLayer) -> tuple[str, ...]:
    return (*layer.shapes, *layer.fixed_shapes)


def _place(adapter: Adapter, outline: Outline, device: torch.device) -> None:
    """Give the adapter layers of the outline their tensors; their bases stay on meta.

    Raises:
        AdapterError: a layer has a bias where the model has none.
        CheckpointError: the adapter does not fit.
    """
    derived: dict[int, Tensor] = {}  # tensor on meta -> its values, which layers may share
    for _, layer in adapters(outline.hf):
        for name in layer.shapes:
            setattr(layer, name, nn.Parameter(torch.empty_like(layer.get_parameter(name), device=device)))
        for name in layer.fixed_shapes:
            setattr(layer, name, torch.empty_like(layer.get_buffer(name), device=device))
        empty = {name: id(layer.get_buffer(name)) for name in layer.derived_shapes}
        if not derived.keys() >= set(empty.values()):
            derived |= {empty[name]: value.to(device) for name, value in layer.derived().items()}
        for name, number in empty.items():
            setattr(layer, name, derived[number])
    place_adapter(trained_targets(outline.hf), adapter.tensors, Engine(device, timeout_s=60))
    adapter.settle(outline.hf)
    for name, layer in adapters(outline.hf):
        if layer.base.bias is None and layer.merged_bias(None) is not None:
            raise AdapterError(
                f"{adapter.folder}: {name} has learned a bias, and a plain {type(outline.hf).__name__} has none there: "
                "it cannot be merged",
                "use it as an adapter: decompft generate, eval",
            )
