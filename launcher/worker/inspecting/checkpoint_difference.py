"""How do the tensors of two checkpoints differ, kind by kind? Any world sizes and engines wrote them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decompft.launcher.worker.restore import Checkpoint

_SPAN = (
    2**22
)  # numbers compared at a time: an embedding that is trained whole would take gigabytes as float64
_FIRST_KINDS = ("param", "exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, kw_only=True, slots=True)
class Largest:
    """The largest of some difference over the tensors of a kind, and where it is."""

    value: float  # infinite where one has a NaN or an infinity that the other has not
    tensor: str


@dataclass(frozen=True, kw_only=True, slots=True)
class KindDifference:
    """One kind of state: what both hold, and how it differs."""

    kind: str
    num_compared: int  # tensors that both hold in one shape and dtype
    num_bit_equal: int  # of them
    absolute: Largest | None  # None: all are bit-equal
    relative: Largest | None  # of the difference over the tensor's largest number in either
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    other_shape: tuple[str, ...]  # or another dtype

    @property
    def holds_the_same(self) -> bool:
        return not (self.only_first or self.only_second or self.other_shape)


def open_verified(path: Path) -> Checkpoint:
    """Open a checkpoint whose hashes the command line has checked just now."""
    return Checkpoint(path, json.loads((path / "manifest.json").read_bytes()))


def compare(
    first: Checkpoint, second: Checkpoint, progress: Callable[[int, int], None]
) -> list[KindDifference]:
    """Compare every tensor of two checkpoints.

    Args:
        progress: called with (tensors done, all).
    """
    held = [_held(first), _held(second)]
    kinds = {kind for one in held for kind, _ in one}
    order = sorted(
        kinds,
        key=lambda kind: (_FIRST_KINDS.index(kind) if kind in _FIRST_KINDS else len(_FIRST_KINDS), kind),
    )
    total, done = len(held[0] & held[1]), 0
    found = []
    for kind in order:
        names = [{name for each, name in one if each == kind} for one in held]
        both = sorted(names[0] & names[1])
        alike = [name for name in both if _form(first, name, kind) == _form(second, name, kind)]
        differing: list[tuple[str, float, float]] = []
        for name in alike:
            difference = _difference(first, second, name, kind)
            if difference is not None:
                differing.append((name, *difference))
            done += 1
            progress(done, total)
        found.append(
            KindDifference(
                kind=kind,
                num_compared=len(alike),
                num_bit_equal=len(alike) - len(differing),
                absolute=_largest([(name, absolute) for name, absolute, _ in differing]),
                relative=_largest([(name, relative) for name, _, relative in differing]),
                only_first=tuple(sorted(names[0] - names[1])),
                only_second=tuple(sorted(names[1] - names[0])),
                other_shape=tuple(name for name in both if name not in alike),
            )
        )
    return found


def differing_state(first: Checkpoint, second: Checkpoint) -> dict[str, tuple[Any, Any]]:
    """Dotted keys of the state, and of what wrote it, whose values differ; absent is None."""
    flat = [
        {"world_size": c.world_size, "incarnation": c.incarnation, "step": c.step} | _flat(c.state)
        for c in (first, second)
    ]
    keys = sorted(flat[0].keys() | flat[1].keys())
    pairs = {key: (flat[0].get(key), flat[1].get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _held(checkpoint: Checkpoint) -> set[tuple[str, str]]:
    manifest = json.loads((checkpoint.path / "manifest.json").read_bytes())
    return {(kind, name) for name, kinds in manifest["tensors"].items() for kind in kinds}


def _form(checkpoint: Checkpoint, name: str, kind: str) -> tuple[tuple[int, ...], str]:
    return checkpoint.shape(name, kind), checkpoint.dtype(name, kind)


def _difference(first: Checkpoint, second: Checkpoint, name: str, kind: str) -> tuple[float, float] | None:
    """Largest absolute difference, and the same over the largest number; None if every bit is equal."""
    numel = math.prod(first.shape(name, kind))
    is_equal, gap, size = True, 0.0, 0.0
    for start in range(0, numel, _SPAN):
        a, b = (c.read_span(name, kind, start, min(start + _SPAN, numel)) for c in (first, second))
        # bits, so that a NaN equals itself and -0 is not 0
        if torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            size = max(size, _largest_finite(a))
            continue
        is_equal = False
        wide_a, wide_b = a.double(), b.double()
        distance = (wide_a - wide_b).abs()
        is_same = (wide_a == wide_b) | (wide_a.isnan() & wide_b.isnan())
        distance = distance.masked_fill(is_same, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
        gap = max(gap, distance.max().item())
        size = max(size, _largest_finite(a), _largest_finite(b))
    if is_equal:
        return None
    return gap, gap / size if size else 0.0


def _largest_finite(tensor: Tensor) -> float:
    wide = tensor.double().abs()
    return wide.masked_fill(~wide.isfinite(), 0.0).max().item()


def _largest(values: list[tuple[str, float]]) -> Largest | None:
    if not values:
        return None
    name, value = max(values, key=lambda pair: pair[1])
    return Largest(value=value, tensor=name)


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat
