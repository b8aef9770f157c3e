"""Stream the base into a model that stands empty: read this rank's rows, quantize, place, drop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from decompft.adapters.base import Adapter
from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.inject import adapters
from decompft.adapters.spec import ADAPTER_SPECS
from decompft.launcher.errors import ModelError
from decompft.launcher.worker.engines.base import Engine
from decompft.launcher.worker.tensors import TensorSource

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True, kw_only=True, slots=True)
class Want:
    """One tensor of the checkpoint and where its rows go."""

    name: str  # as transformers names it
    key: str  # as the checkpoint names it
    parameters: tuple[nn.Parameter, ...]  # storage, all with the same rows
    layer: FrozenLinear | None  # packs the rows; None: taken as they are
    transposed: bool
    twin: str | None = None  # another tensor of the checkpoint that the model ties to this one


def load_base(
    model: nn.Module,
    source: TensorSource,
    engine: Engine,
    *,
    prefix: str,
    new: set[str],
    seed: int,
    progress: Progress,
) -> None:
    """Fill every parameter of the base, then start the adapters from what they need of it.

    Args:
        prefix: transformers' `base_model_prefix`; a checkpoint may leave it out or add it.
        new: names of tensors that a checkpoint need not have (a classification head).
        seed: of adapters and new tensors; with the tensor's name it fixes the values.

    Raises:
        ModelError: as `match_tensors`, or tied tensors differ.
    """
    wants, missing = match_tensors(model, source, prefix=prefix, new=new)
    needs_norm = {id(a.base): n for n, a in adapters(model) if "frobenius_norm" in _needs(a)}
    squares: dict[str, Tensor] = {}
    total = sum(_num_bytes(w) for w in wants)
    done = 0
    with torch.no_grad():
        for want, rows in _read_ahead(wants, source, engine):
            squared = _place(want, rows.to(engine.device), engine, measure=id(want.layer) in needs_norm)
            if squared is not None:
                squares[needs_norm[id(want.layer)]] = squared
            done += _num_bytes(want)
            progress(done, total)
        for name, parameter in missing.items():
            values = torch.empty(parameter.shape).normal_(0.0, 0.02, generator=generator_for(seed, name))
            place_whole(parameter, torch.zeros_like(values) if values.dim() == 1 else values, engine)
        _start_adapters(model, squares, engine, seed)


def match_tensors(
    model: nn.Module, source: TensorSource, *, prefix: str, new: set[str]
) -> tuple[list[Want], dict[str, nn.Parameter]]:
    """What to read, and the parameters (of those in `new`) that the checkpoint does not have.

    Raises:
        ModelError: a tensor is missing, has another shape, or is quantized already.
    """
    wants, missing = _wants(model, set(source.names()), prefix)
    lost = [n for n in missing if n not in new]
    if lost:
        raise ModelError(
            f"the checkpoint lacks {len(lost)} of the model's tensors, first {lost[0]}",
            "the files belong to another model, or a shard is missing",
        )
    for want in wants:
        source.dtype(want.key)  # refuses what is no float before its shape looks wrong
        _check_shape(want, source.shape(want.key), is_head=want.name in new)
    return wants, missing


def place_whole(parameter: Tensor, value: Tensor, engine: Engine) -> None:
    """Copy this rank's rows of a whole tensor into its parameter."""
    start, stop = engine.rows(parameter)
    engine.local(parameter.detach()).copy_(value[start:stop])


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one tensor: independent of world size and of the order of layers."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _wants(model: nn.Module, keys: set[str], prefix: str) -> tuple[list[Want], dict[str, nn.Parameter]]:
    """What to read, and the parameters that the checkpoint does not have."""
    wants: dict[str, Want] = {}
    missing: dict[str, nn.Parameter] = {}
    names: dict[int, str] = {}  # of a tensor under its first name
    for path, module in model.named_modules(remove_duplicate=True):
        if isinstance(module, Adapter):
            continue
        name = path.removesuffix(".base")
        parameters: dict[str, tuple[nn.Parameter, ...]] = {}
        layer = module if isinstance(module, FrozenLinear) else None
        if layer is not None:
            parameters["weight"] = tuple(getattr(layer, n) for n in layer.storage_names())
        for own, parameter in module.named_parameters(recurse=False):
            if layer is None or own not in layer.storage_names():
                parameters[own] = (parameter,)
        for own, storage in parameters.items():
            full = f"{name}.{own}" if name else own
            first = names.setdefault(id(storage[0]), full)
            key = _find(full, keys, prefix)
            packs = layer if own == "weight" else None
            transposed = packs is not None and packs.transposed
            if key is None:
                if first == full:
                    missing[full] = storage[0]
            elif first in wants:
                wants[first] = replace(wants[first], twin=key)
            else:  # also a tied tensor that the checkpoint has under its second name only
                missing.pop(first, None)
                wants[first] = Want(
                    name=first, key=key, parameters=storage, layer=packs, transposed=transposed
                )
    return list(wants.values()), missing


def _find(name: str, keys: set[str], prefix: str) -> str | None:
    bare = name.removeprefix(f"{prefix}.")
    names = [name, bare, f"{prefix}.{name}"]
    # LayerNorm's parameters in checkpoints converted from TensorFlow
    old = [
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        for n in names
    ]
    return next((n for n in (*names, *old) if n in keys), None)


def _check_shape(want: Want, found: tuple[int, ...], *, is_head: bool) -> None:
    if want.layer is not None:
        expected: tuple[int, ...] = (want.layer.out_features, want.layer.in_features)
        expected = expected[::-1] if want.transposed else expected
    else:
        expected = tuple(want.parameters[0].shape)
    if found != expected:
        hint = "config.json and weights belong to different models"
        if is_head:
            hint = f"this checkpoint already classifies; model.num_labels: {found[0]} keeps its head"
        raise ModelError(
            f"{want.key} has shape {list(found)} in the checkpoint, the model's config says {list(expected)}",
            hint,
        )


def _num_bytes(want: Want) -> int:
    return sum(p.numel() * p.element_size() for p in want.parameters)


def _read_ahead(wants: list[Want], source: TensorSource, engine: Engine) -> Iterator[tuple[Want, Tensor]]:
    """Read the next tensor while the present one is quantized; two slices in memory at most."""

    def read(want: Want) -> Tensor:
        start, stop = engine.rows(want.parameters[0])
        rows = source.rows(want.key, start, stop, transposed=want.transposed)
        if want.twin is not None and not torch.equal(rows, source.rows(want.twin, start, stop)):
            raise ModelError(
                f"the model's config ties {want.key} and {want.twin}, but the checkpoint has other values for each",
                "set tie_word_embeddings: false in the model's config.json",
            )
        return rows

    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = pool.submit(read, wants[0])
        for want, following in zip(wants, [*wants[1:], None], strict=True):
            rows = ahead.result()
            if following is not None:
                ahead = pool.submit(read, following)
            yield want, rows


def _place(want: Want, rows: Tensor, engine: Engine, *, measure: bool) -> Tensor | None:
    """Pack and copy; returns the sum of squares (float64) of the rows as they will be used."""
    packed = (rows,) if want.layer is None else want.layer.pack(rows)
    for parameter, values in zip(want.parameters, packed, strict=True):
        engine.local(parameter.detach()).copy_(values)
    if not measure or want.layer is None:
        return None
    if rows.shape[0] == 0:
        return torch.zeros((), dtype=torch.float64, device=engine.device)
    used = want.layer.unpack(packed, torch.float32)
    return torch.sum(torch.linalg.vecdot(used, used), dtype=torch.float64)


def _start_adapters(model: nn.Module, squares: dict[str, Tensor], engine: Engine, seed: int) -> None:
    names = sorted(squares)
    sums = engine.sum_shards(torch.stack([squares[n] for n in names])) if names else torch.empty(0)
    norms = dict(zip(names, sums.sqrt().tolist(), strict=True))
    for name, adapter in adapters(model):
        facts = {"frobenius_norm": norms[name]} if name in norms else {}
        for own, value in adapter.initial_values(generator_for(seed, name), facts).items():
            place_whole(getattr(adapter, own), value, engine)


def _needs(adapter: Adapter) -> tuple[str, ...]:
    return ADAPTER_SPECS[adapter.config.method].needs
