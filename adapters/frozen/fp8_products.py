"""`quantization.compute: fp8`: both products of a frozen linear in float8 e4m3, whatever format stores its weight.

    y = (xq Wq^T) x_scale w_scale      x a row (token) each, W an output row each
    dx = (gq Vq^T) g_scale v_scale     g a row each, V = W^T an input each

Legend: T tokens, I inputs, O outputs. Sums are float32 (on Hopper its tensor cores' fast accumulation), multiplied
by both scales before they are rounded once to x's dtype. An adapter's scale of W's rows multiplies w_scale in
the forward pass and g in the backward pass, in float32: Wq and Vq are of the bare weight, and no scale is rounded.

The backward pass is that of the dequantized weight rounded anew, by columns: neither the rounding of x nor the
difference between Wq and Vq is differentiated.

`torch._scaled_mm` on a GPU of compute capability 8.9 or higher; on a CPU the same numbers from a float32 product, which
is exact but for the order of the sum.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.kernels.fp8 import Rows, quantize_rows

# of both sizes of a weight
ALIGN = 16
# cuBLAS has no kernel for some products of few rows over wide inputs (pytorch/ao issue 4582: 256 rows, 9216 inputs)
_FEWEST_ROWS = 512


def fits_fp8(base: FrozenLinear) -> bool:
    """Whether `torch._scaled_mm` takes a layer's sizes, in both passes."""
    return base.in_features % ALIGN == 0 and base.out_features % ALIGN == 0


class Fp8Products:
    """See the module docstring. One serves all layers; it holds what the last x was rounded to while that x lives."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], int, Rows] | None = None

    def forward(
        self,
        base: FrozenLinear,
        x_TI: Tensor,
        storage: tuple[Tensor, ...],
        scale: Tensor | None,
        weight: Tensor | None,
    ) -> Tensor:
        found = base.fp8_rows(storage, weight)
        if scale is not None:
            found = Rows(found.codes, found.scale * scale.view(-1))
        return _product(self._rounded(x_TI), found, x_TI)

    def _rounded(self, x_TI: Tensor) -> Rows:
        """Once for all linears of a node, which are given the same object."""
        last = self._last
        if last is not None and last[0]() is x_TI and last[1] == x_TI._version:
            return last[2]
        found = quantize_rows(x_TI, pad_to=_pad_to(x_TI))
        if not x_TI.is_inference():  # which cannot tell whether it has changed
            self._last = weakref.ref(x_TI, self._forget), x_TI._version, found
        return found

    def _forget(self, reference: weakref.ref[Tensor]) -> None:
        if self._last is not None and self._last[0] is reference:
            self._last = None

    def backward(
        self,
        base: FrozenLinear,
        g_TO: Tensor,
        storage: tuple[Tensor, ...],
        scale: Tensor | None,
        weight: Tensor | None,
    ) -> Tensor:
        found = base.fp8_columns(storage, weight)
        of_rows = None
        if scale is not None and scale.numel() > 1:
            of_rows = scale.reshape(-1)
        elif scale is not None:
            found = Rows(found.codes, found.scale * scale)
        return _product(quantize_rows(g_TO, of_rows, pad_to=_pad_to(g_TO)), found, g_TO)


def _pad_to(x: Tensor) -> int:
    """Rows that a product is made of."""
    if not x.is_cuda:
        return 0
    return max(_FEWEST_ROWS, x.shape[0] + -x.shape[0] % ALIGN)


def _product(left: Rows, right: Rows, like: Tensor) -> Tensor:
    """left (>= T, K) times the transposed right (N, K) -> (T, N), with T and the dtype of `like`."""
    if not like.is_cuda:
        sums = left.codes.float() @ right.codes.float().T
        return sums.mul_(left.scale[:, None]).mul_(right.scale).to(like.dtype)
    made = torch._scaled_mm(
        left.codes,
        right.codes.T,
        scale_a=left.scale[:, None],
        scale_b=right.scale[None, :],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return made[: like.shape[0]].to(like.dtype)
