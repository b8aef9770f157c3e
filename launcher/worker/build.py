"""From a plan to a model that trains: meta, inject, freeze, shard, stream-load, check."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decompft.adapters.base import Adapter
from decompft.adapters.formats import FORMAT_SPECS
from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.inject import MakeFrozen, adapters, inject
from decompft.adapters.spec import AdapterConfig
from decompft.adapters.targets import TargetMismatch, select
from decompft.adapters.token_rows import token_rows
from decompft.launcher.errors import AdapterError
from decompft.launcher.layers import layer_configs
from decompft.launcher.quantized_checkpoint import is_quantized, stored_in
from decompft.launcher.recipe import AdapterSection, ModelSection, QuantizationSection
from decompft.launcher.recompute import Recompute
from decompft.launcher.tensor_names import find_key
from decompft.launcher.worker.base_weights import BaseWeights
from decompft.launcher.worker.chosen_kernels import choose_kernels
from decompft.launcher.worker.engines.base import Engine, full_shape
from decompft.launcher.worker.joining import join_linears
from decompft.launcher.worker.load import Progress, load_base
from decompft.launcher.worker.loaded import Loaded
from decompft.launcher.worker.model import (
    LossModel,
    blocks,
    build_on_meta,
    fill_buffers,
    head_names,
    read_config,
)  # fmt: skip
from decompft.launcher.worker.packed_cache import packed_cache_dir
from decompft.launcher.worker.quantized_source import BitsAndBytesSource
from decompft.launcher.worker.recompute import set_recompute
from decompft.launcher.worker.spectrum_cache import spectra_dir
from decompft.launcher.worker.tensors import RandomSource, SafetensorsSource, TensorSource
from decompft.launcher.worker.token_rows import wrap_tokens
from decompft.launcher.worker.tokens import TrainedToken

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
NONE = QuantizationSection(format="none")


@dataclass(frozen=True, kw_only=True)
class Built:
    """A model ready to train, and the names of what trains."""

    model: LossModel
    trained: dict[str, nn.Parameter]  # name without the "model." of LossModel -> parameter
    buffers: dict[str, Tensor]  # adapter tensors that do not train but belong in its file
    adapted: tuple[str, ...]
    kernels: str  # what computes norms, activations, attention and products, and which kernels of ours run, in words
    loaded: Loaded
    weights: Callable[[], BaseWeights]  # the full-precision weights again


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A model on meta, with what is known of it before a weight is read."""

    hf: Any  # the transformers model
    shapes: dict[str, tuple[int, ...]]  # of its parameters before injection, as transformers names them
    adapted: tuple[str, ...]
    quantization: QuantizationSection  # as the checkpoint leaves it possible
    new_heads: set[str]  # modules that a checkpoint need not have
    whole: set[str]  # modules that train whole


def build(
    section: ModelSection,
    quantization: QuantizationSection,
    adapter: AdapterSection | None,
    engine: Engine,
    *,
    seed: int,
    model_dir: Path | None,
    recompute: Recompute,
    recompute_blocks: int | None = None,
    tokens: Sequence[TrainedToken] = (),
    base_hash: str | None = None,
    known: Callable[[str], Tensor] | None = None,
    progress: Progress = lambda done, total: None,
    factor_progress: Progress = lambda done, total: None,
) -> Built:
    """Build a model on `engine` from three sections of a recipe, or of an adapter.json.

    Args:
        adapter: None for the bare frozen base.
        seed: of the adapter's start, of new tensors, and of random weights.
        model_dir: folder of the checkpoint; None for a model made from config.
        recompute: what each block computes again in the backward pass.
        recompute_blocks: how many do so under `selective`; None: all.
        tokens: those of `adapter.train_tokens`.
        base_hash: sha256 of the checkpoint's `identity`, under which quantized rows are kept; None keeps none.
        known: an adapter tensor by its name, where the adapters exist already: none is started anew.
        progress: bytes of the base that are in place, and in all.
        factor_progress: matrices whose factors were made for the adapters' start, and in all.

    Raises:
        ModelError, AdapterError: model and checkpoint, or targets and model, do not fit.
        PlanError: the GPU cannot multiply in fp8, and should.
    """
    outline = outline_of(section, quantization, adapter, model_dir, tokens)
    hf, shapes = outline.hf, outline.shapes
    kernels = choose_kernels(
        hf,
        section,
        outline.quantization,
        engine,
        dtype=DTYPES[outline.quantization.activations],
        recompute=recompute,
    )
    set_recompute(hf, blocks(hf), recompute, count=recompute_blocks)
    model = LossModel(hf, section.task)
    engine.shard(model, blocks(hf))
    engine.materialize(model)
    fill_buffers(hf)
    source = open_source(section, model_dir, seed, shapes, engine.device)
    new = {n for n in shapes if any(n == h or n.startswith(h + ".") for h in outline.new_heads)}
    spectra = spectra_dir() if base_hash is not None else None
    loaded = load_base(
        hf, source, engine, prefix=hf.base_model_prefix, new=new, seed=seed, progress=progress,
        cache_dir=_cache_dir(source, base_hash, outline.quantization, engine.device),
        spectra_dir=spectra, known=known,
        factor_progress=factor_progress,
    )  # fmt: skip
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers())), "a tensor was left on meta"
    join_linears(hf, engine)
    trained = {n: p for n, p in hf.named_parameters() if p.requires_grad}
    buffers = _buffers(hf)
    assert set(trained) == _expected(hf, outline.whole), "what trains is not what was injected"
    return Built(
        model=model, trained=trained, buffers=buffers, adapted=outline.adapted,
        kernels=kernels, loaded=loaded,
        weights=lambda: BaseWeights(hf, source, prefix=hf.base_model_prefix, new=new, spectra_dir=spectra),
    )  # fmt: skip


def outline_of(
    section: ModelSection,
    quantization: QuantizationSection,
    adapter: AdapterSection | None,
    model_dir: Path | None,
    tokens: Sequence[TrainedToken] = (),
) -> Outline:
    """The model on meta with its adapters and frozen layers in place, no weight read.

    Raises:
        ModelError, AdapterError: as `build`.
    """
    packed: set[str] = set()
    if model_dir is not None:
        quantization, packed = stored_in(section, quantization, model_dir)
    compute = DTYPES[quantization.activations]
    hf = build_on_meta(read_config(section, model_dir), section, compute)
    shapes = {n: tuple(p.shape) for n, p in hf.named_parameters()}
    heads = head_names(hf)
    dense = DTYPES[quantization.activations if section.dtype == "auto" else section.dtype]
    make = frozen_maker(quantization, dense)
    if packed:
        make = _as_packed(make, frozen_maker(NONE, dense), packed, hf.base_model_prefix)
    adapted = _inject(hf, adapter, heads, make)
    new_heads = set() if section.task == "causal-lm" else set(heads)
    whole = _train_whole(hf, [] if adapter is None else adapter.train_modules, new_heads, compute)
    wrap_tokens(hf, adapter, tokens, has_head=section.task == "causal-lm")
    return Outline(
        hf=hf,
        shapes=shapes,
        adapted=tuple(adapted),
        quantization=quantization,
        new_heads=new_heads,
        whole=whole,
    )


def open_source(
    section: ModelSection,
    model_dir: Path | None,
    seed: int,
    shapes: dict[str, tuple[int, ...]],
    device: torch.device,
) -> TensorSource:
    """Where the base's weights come from."""
    if section.weights == "random":
        return RandomSource(seed, shapes, device)
    assert model_dir is not None
    return BitsAndBytesSource(model_dir) if is_quantized(model_dir) else SafetensorsSource(model_dir)


def trained_targets(hf: Any) -> dict[str, Tensor]:
    """All tensors of an adapter's file, as they are in the model."""
    return {n: p for n, p in hf.named_parameters() if p.requires_grad} | _buffers(hf)


def frozen_maker(quantization: QuantizationSection, dense: torch.dtype) -> MakeFrozen:
    """How a linear layer of the base is stored.

    Args:
        dense: dtype of an unquantized weight.

    Raises (when called):
        AdapterError: a width that the block size does not divide.
    """
    spec = FORMAT_SPECS[quantization.format]
    module, _, name = spec.impl.partition(":")
    layer: Callable[..., FrozenLinear] = getattr(importlib.import_module(module), name)
    options: dict[str, Any] = {}
    if not spec.is_quantized:
        options["dtype"] = dense
    elif spec.has_blocks:
        options |= {"block_size": quantization.block_size, "double_quant": quantization.double_quant}
    elif spec.has_outliers:
        options["outlier_threshold"] = quantization.outlier_threshold

    def make(name: str, in_features: int, out_features: int, bias: torch.dtype | None) -> FrozenLinear:
        if spec.has_blocks:
            _check_width(name, in_features, quantization)
        return layer(in_features, out_features, bias_dtype=bias, **options)

    return make


def _check_width(name: str, width: int, quantization: QuantizationSection) -> None:
    if width % quantization.block_size == 0:
        return
    block = "quantization.block_size: 64, or " if width % 64 == 0 else ""
    raise AdapterError(
        f"{name}: width {width} is not a multiple of quantization.block_size {quantization.block_size}",
        f"use {block}quantization.format: int8, fp8 or none, which take any width; adapter.targets does not "
        "matter here: every linear layer but the output head is quantized, whether it is a target or not",
    )


def _as_packed(quantized: MakeFrozen, plain: MakeFrozen, packed: set[str], prefix: str) -> MakeFrozen:
    """What the checkpoint has in plain floats (llm_int8_skip_modules) stays so."""

    def make(name: str, in_features: int, out_features: int, bias: torch.dtype | None) -> FrozenLinear:
        is_packed = find_key(f"{name}.weight", packed, prefix) is not None
        return (quantized if is_packed else plain)(name, in_features, out_features, bias)

    return make


def _cache_dir(
    source: TensorSource, base_hash: str | None, quantization: QuantizationSection, device: torch.device
) -> Path | None:
    """Where quantized rows are kept; random weights, and those of a quantized checkpoint, are not."""
    if base_hash is None or type(source) is not SafetensorsSource:
        return None
    return packed_cache_dir(base_hash, quantization, source, packed_on=device.type)


def _inject(hf: Any, adapter: AdapterSection | None, heads: list[str], make: MakeFrozen) -> list[str]:
    def configs(names: list[str]) -> dict[str, AdapterConfig]:
        hint = "see the layers with: decompft plan RECIPE --json"
        return {} if adapter is None else layer_configs(adapter, names, heads, hint=hint)

    with torch.device("meta"):
        return inject(hf, configs, heads, make)


def _train_whole(hf: Any, patterns: list[str], heads: set[str], compute: torch.dtype) -> set[str]:
    """Mark modules that train whole, in float32; returns their names.

    Raises:
        AdapterError: a pattern matches no module that has parameters of its own.
    """
    own = {
        n: m for n, m in hf.named_modules() if not isinstance(m, (Adapter, FrozenLinear)) and _parameters(m)
    }
    chosen = {n for n in own if any(n == h or n.startswith(h + ".") for h in heads)}
    try:
        chosen |= set(select(list(own), patterns, ()))
    except TargetMismatch as error:
        names = dict.fromkeys(n.rpartition(".")[2] for n in own)
        raise AdapterError(f"adapter.train_modules: {error}", f"there are: {', '.join(names)}") from error
    trained = {id(p) for n in chosen for p in _parameters(own[n])}
    # a head tied to a chosen embedding trains with it
    chosen |= {n for n, m in own.items() if any(id(p) in trained for p in _parameters(m))}
    for name in chosen:
        for parameter in _parameters(own[name]):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        _compute_in_float32(own[name], None if name in heads else compute)
    return chosen


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    """A module's own parameters, without its children's."""
    return list(module.parameters(recurse=False))


def _compute_in_float32(module: nn.Module, back_to: torch.dtype | None) -> None:
    """Cast floating inputs up before a module that trains in float32, and its output back."""

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(a.float() if torch.is_tensor(a) and a.is_floating_point() else a for a in args)

    def after(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return out if back_to is None else out.to(back_to)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _buffers(hf: Any) -> dict[str, Tensor]:
    return {f"{n}.{b}": a.get_buffer(b) for n, a in adapters(hf) for b in a.fixed_shapes}


def _expected(hf: Any, whole: set[str]) -> set[str]:
    names = {f"{n}.{t}" for n, a in adapters(hf) for t in a.shapes}
    for module in whole:
        names |= {f"{module}.{p}" for p, _ in hf.get_submodule(module).named_parameters(recurse=False)}
    names |= {f"{n}.rows" for n, _ in token_rows(hf)}
    first = {n for n, _ in hf.named_parameters()}  # a tied tensor keeps its first name
    return names & first


def count_trained(trained: dict[str, nn.Parameter]) -> int:
    return sum(math.prod(full_shape(p)) for p in trained.values())
