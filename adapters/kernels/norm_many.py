"""MAP's scales of many layers, and their q B in the compute dtype, in three launches for all: once a step.

The tensors of a layer do not change between the first pass of a step and its last, so that norm.py's two launches, the
product q B and its rounding, 224 times four launches of some microseconds in a pass of 7B, can be made before. Sums
are taken over the stretches that norm.py takes, so that the numbers are the same bits.

Shapes of a layer: A (rank, in), B (out, rank); all layers have one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decompft.adapters.kernels import norm
from decompft.adapters.kernels.launch import launch, padded
from decompft.adapters.kernels.proved import Proved, WrongKernelError

_BLOCK = 2048  # numbers of q B that a program makes

Layer = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # A, B, a, b, base_norm


class Made(NamedTuple):
    """What a layer's pass needs."""

    grams: Tensor  # as of norm.scales
    found: Tensor
    up: Tensor  # q B (out, rank), rounded once


class Many:
    """The arrays of some layers, written anew by each `refresh`."""

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype, *, eps: float, s: float) -> None:
        """All layers on one GPU, each as `norm.fits` wants it."""
        (rank, _), device = layers[0][0].shape, layers[0][0].device
        assert all(layer[0].shape[0] == rank for layer in layers)
        # the kernels read addresses
        assert all(t.dtype == torch.float32 and t.is_contiguous() for layer in layers for t in layer)
        self._layers, self._rank, self._eps, self._s = list(layers), rank, eps, s
        num = len(layers)
        chunk = norm.chunk_of(rank)
        sizes, starts = [], [0]
        for A, B, *_ in layers:
            chunks = -(-max(A.shape[1], B.shape[0]) // (norm._SPLITS * chunk))
            sizes.append([A.shape[1], B.shape[0], chunks])
            # each begins at a multiple of 16 bytes and more
            starts.append(starts[-1] + -(-B.numel() // 64) * 64)
        self._sizes = torch.tensor(sizes, dtype=torch.int32, device=device)
        self._starts = torch.tensor(starts[:-1], dtype=torch.int64, device=device)
        self._most = max(B.numel() for _, B, *_ in layers)
        grams, found = (
            torch.empty(num, 2, rank, rank, device=device),
            torch.empty(num, 5, norm._STRIDE, device=device),
        )
        ups = torch.empty(starts[-1], dtype=dtype, device=device)
        self._made = grams, found, ups
        self.layers = [
            Made(grams[k], found[k], ups[starts[k] : starts[k] + B.numel()].view(B.shape))
            for k, (_, B, *_) in enumerate(layers)
        ]
        self._places: list[int] = []
        self._addresses = torch.empty(0)

    def refresh(self) -> None:
        places = [t.data_ptr() for layer in self._layers for t in layer]
        if places != self._places:
            self._places = places
            self._addresses = torch.tensor(places, dtype=torch.int64, device=self._sizes.device)
        grams, found, ups = self._made
        num, device = len(self._layers), self._sizes.device
        # not held between steps: 15 MB of 7B's 224 layers at rank 16, 235 at 64
        parts = torch.empty(num, 2, norm._SPLITS, self._rank, self._rank, device=device)
        sizes: dict[str, Any] = {"SPLITS": norm._SPLITS, "R": padded(self._rank)}
        launch(
            _triton().gram_many, (2 * norm._SPLITS, num), device,
            self._addresses, self._sizes, parts, self._rank, CHUNK=norm.chunk_of(self._rank), **sizes,
        )  # fmt: skip
        launch(
            _triton().finish_many, (num,), device,
            self._addresses, parts, grams, found, self._rank, self._eps, self._eps / self._s,
            STRIDE=norm._STRIDE, **sizes,
        )  # fmt: skip
        launch(
            _triton().up_many, (-(-self._most // _BLOCK), num), device,
            self._addresses, self._sizes, self._starts, found, ups, self._rank, STRIDE=norm._STRIDE, BLOCK=_BLOCK,
        )  # fmt: skip


def runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `Many` runs there and makes ups in `dtype`."""
    return dtype in (torch.bfloat16, torch.float16) and PROVED.runs(device, dtype)


@cache
def _triton() -> Any:
    # triton only where a GPU is
    from decompft.adapters.kernels import norm_many_triton

    return norm_many_triton


def _example(device: torch.device, dtype: torch.dtype) -> None:
    """Layers of three sizes, beside norm.py's launches: the same bits."""
    draw = torch.Generator().manual_seed(0)

    def made(*size: int) -> Tensor:
        return torch.randn(size, generator=draw).to(device)

    layers = [
        (made(5, i), made(o, 5), made(1), made(1), made(1).abs())
        for i, o in ((300, 200), (40, 1100), (64, 8))
    ]
    many = Many(layers, dtype, eps=1e-6, s=2.0)
    many.refresh()
    for layer, found in zip(layers, many.layers, strict=True):
        grams, scalars = norm.scales(*layer, eps=1e-6, s=2.0)
        up = (layer[1] * norm.views(grams, scalars).q).to(dtype)
        same = torch.equal(found.grams, grams) and torch.equal(found.found[:, 0], scalars[:, 0])
        if not same or not torch.equal(found.up, up):
            raise WrongKernelError("layers together have other numbers than one by one")


PROVED = Proved(
    name="norm_many", instead="norm, layer by layer", example=_example, methods=("map",),
    computes=(torch.bfloat16, torch.float16),
)  # fmt: skip
