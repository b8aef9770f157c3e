"""The fp8 base: float8 e4m3 codes (four bits of exponent, three of mantissa) and a scale a row.

Storage: a product multiplies with the weight dequantized to the compute dtype. Only the forward pass of `compute: fp8`
takes the codes as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decompft.adapters.frozen.eightbit import EightBitLinear
from decompft.adapters.frozen.rows import as_float32
from decompft.adapters.kernels.fp8 import Rows


class Fp8Linear(EightBitLinear):
    """w = code * absmax / 448: within 1/16 of w, or within absmax / 448 / 1024 near 0."""

    code = torch.float8_e4m3fn
    largest = 448.0

    def fp8_rows(self, storage: tuple[Tensor, ...], weight: Tensor | None = None) -> Rows:
        codes, absmax = storage
        if (
            codes.data_ptr() % 16
        ):  # a piece of a flat buffer may lie anywhere, a GPU's product wants it aligned
            codes = codes.clone()
        return Rows(codes.view(self.code)[:, : self.in_features], as_float32(absmax).view(-1) / self.largest)

    def _times(self, codes: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        # e4m3 takes part in no promotion; bfloat16 holds each of its numbers exactly
        return codes.to(dtype).mul_(factor)
