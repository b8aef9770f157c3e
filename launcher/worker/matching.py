"""Which tensor of a checkpoint goes where in the model? All that can be wrong is told before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from decompft.adapters.base import Adapter
from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.token_rows import TokenRows
from decompft.launcher.errors import ModelError
from decompft.launcher.tensor_names import find_key, refuse_surplus_layers
from decompft.launcher.worker.engines.base import full_shape
from decompft.launcher.worker.tensors import TensorSource


@dataclass(frozen=True, kw_only=True, slots=True)
class Want:
    """One tensor of the checkpoint and where its rows go."""

    name: str  # as transformers names it
    key: str  # as the checkpoint names it
    parameters: tuple[nn.Parameter, ...]  # storage, all with the same rows
    layer: FrozenLinear | None  # packs the rows; None: taken as they are
    transposed: bool
    twin: str | None = None  # another tensor of the checkpoint that the model ties to this one


def match_tensors(
    model: nn.Module, source: TensorSource, *, prefix: str, new: set[str]
) -> tuple[list[Want], dict[str, nn.Parameter]]:
    """What to read, and the parameters (of those in `new`) that the checkpoint does not have.

    Raises:
        ModelError: a tensor is missing, has another shape, or a dtype that is none of ours; or there are
            more layers than the model has.
    """
    wants, missing = _wants(model, set(source.names()), prefix)
    lost = [n for n in missing if n not in new]
    if lost:
        raise ModelError(
            f"the checkpoint lacks {len(lost)} of the model's tensors, first {lost[0]}",
            "the files belong to another model, or a shard is missing",
        )
    claimed = {k for w in wants for k in (w.key, w.twin) if k is not None}
    refuse_surplus_layers("", source.names(), claimed)
    # packed weights lie as (out, in), whatever the model's own layer stores
    wants = [replace(w, transposed=w.transposed and not source.is_packed(w.key)) for w in wants]
    for want in wants:
        source.dtype(want.key)  # refuses what is no float before its shape looks wrong
        _check_shape(want, source.shape(want.key), is_head=want.name in new)
    return wants, missing


def _wants(model: nn.Module, keys: set[str], prefix: str) -> tuple[list[Want], dict[str, nn.Parameter]]:
    """What to read, and the parameters that the checkpoint does not have."""
    wants: dict[str, Want] = {}
    missing: dict[str, nn.Parameter] = {}
    names: dict[int, str] = {}  # of a tensor under its first name
    for path, module in model.named_modules(remove_duplicate=True):
        if isinstance(module, Adapter | TokenRows):
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
            key = find_key(full, keys, prefix)
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


def _check_shape(want: Want, found: tuple[int, ...], *, is_head: bool) -> None:
    if want.layer is not None:
        expected: tuple[int, ...] = (want.layer.out_features, want.layer.in_features)
        expected = expected[::-1] if want.transposed else expected
    else:
        expected = full_shape(want.parameters[0])
    if found != expected:
        hint = "config.json and weights belong to different models"
        if is_head:
            hint = f"this checkpoint already classifies; model.num_labels: {found[0]} keeps its head"
        raise ModelError(
            f"{want.key} has shape {list(found)} in the checkpoint, the model's config says {list(expected)}",
            hint,
        )
