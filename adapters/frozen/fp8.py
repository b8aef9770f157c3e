"""The fp8 base: float8 e4m3 codes (four bits of exponent, three of mantissa) and a scale a row.

Storage only: the weight is dequantized to the compute dtype for its products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decompft.adapters.frozen.eightbit import EightBitLinear


class Fp8Linear(EightBitLinear):
    """w = code * absmax / 448: within 1/16 of w, or within absmax / 448 / 1024 near 0."""

    code = torch.float8_e4m3fn
    largest = 448.0

    def _times(self, codes: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        # e4m3 takes part in no promotion; bfloat16 holds each of its numbers exactly
        return codes.to(dtype).mul_(factor)
