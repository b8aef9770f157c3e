"""How many tensors as large as a layer's weight does an adapter make, and how many live at once?"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from decompft.adapters.base import Adapter

TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Of one forward and one backward pass of a layer. LoRA over a quantized base: made 2, alive 1."""

    made: int  # new tensors of at least out x in numbers
    alive: int  # of those, the most that lived at one time
    peak_in_weights: float | None  # GPU: the pass's memory over its start, in weights of the compute dtype


def dense_tensors(layer: Adapter, dtype: torch.dtype) -> Dense:
    """Run `layer` forward and backward on a few tokens, whose activations are far smaller than its weight."""
    numbers = layer.base.out_features * layer.base.in_features
    device = next(layer.parameters()).device
    x = torch.randn(TOKENS, layer.base.in_features, device=device, dtype=dtype, requires_grad=True)
    assert numbers > 4 * TOKENS * max(layer.base.out_features, layer.base.in_features), (
        "the layer is too small"
    )
    start = 0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
    before = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    with _Count(numbers, before) as count:
        layer(x).sum().backward()
    peak = None
    if device.type == "cuda":
        peak = round((torch.cuda.max_memory_allocated(device) - start) / (numbers * dtype.itemsize), 3)
    for parameter in layer.parameters():
        parameter.grad = None
    return Dense(made=count.made, alive=count.most, peak_in_weights=peak)


class _Count(TorchDispatchMode):
    """Watches what every operator returns; a view counts as the tensor that it views."""

    def __init__(self, numbers: int, known: set[int]) -> None:
        super().__init__()
        self.made = self.most = 0
        self._numbers = numbers
        self._known = known
        self._seen: list[tuple[weakref.ref[Tensor], int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._seen = [(ref, place) for ref, place in self._seen if ref() is not None]
        alive = {place for _, place in self._seen}
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
            if place in self._known or storage.nbytes() < self._numbers * tensor.element_size():
                continue
            self.made += place not in alive
            alive.add(place)
            self._seen.append((weakref.ref(tensor), place))
        self.most = max(self.most, len(alive))
        return out
