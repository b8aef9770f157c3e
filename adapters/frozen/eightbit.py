"""What the 8-bit bases share: rows of one byte a weight, and a float32 a row.

Layout:
    codes   (out, in)  bytes, padded by one to an even number
    absmax  (out, 4)   bytes: the row's largest magnitude in float32

w = code * absmax / largest code. A row knows nothing of its neighbours, so every rank quantizes
its own rows alone, and any width packs.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.frozen.rows import as_bytes, as_float32, bytes_parameter, float_chunks


class EightBitLinear(FrozenLinear):
    """Storage as in the module docstring; a subclass names the dtype of a code and its largest value.

    absmax is stored and not absmax / largest: it is what bitsandbytes' int8 files hold, bit for bit.
    """

    code: ClassVar[torch.dtype]
    largest: ClassVar[float]

    def __init__(self, in_features: int, out_features: int, *, bias_dtype: torch.dtype | None) -> None:
        super().__init__(in_features, out_features, bias_dtype=bias_dtype)
        self.codes = bytes_parameter(out_features, in_features + in_features % 2)
        self.absmax = bytes_parameter(out_features, 4)

    def storage_names(self) -> tuple[str, ...]:
        return ("codes", "absmax")

    def pack(self, rows: Tensor) -> tuple[Tensor, ...]:
        codes = rows.new_empty(rows.shape, dtype=self.code)
        absmax = rows.new_empty((rows.shape[0], 1), dtype=torch.float32)
        for where, chunk in float_chunks(rows):
            high = torch.linalg.vector_norm(chunk, torch.inf, dim=1, keepdim=True)
            absmax[where] = high
            # divided first: a quotient of two numbers of a row is at most 1, whatever their size
            scaled = (chunk / high.masked_fill(high == 0, 1)).mul_(self.largest)
            codes[where] = scaled if self.code.is_floating_point else scaled.round_()
        return self.store(codes, absmax)

    def store(self, codes: Tensor, absmax: Tensor) -> tuple[Tensor, ...]:
        """Rows that are quantized already -> storage tensors; nothing is lost.

        Args:
            codes: (n, in) in the format's own dtype, e.g. bitsandbytes' CB.
            absmax: float32 (n, 1), e.g. bitsandbytes' SCB.
        """
        raw = codes.view(torch.uint8)
        if self.in_features % 2:
            raw = torch.nn.functional.pad(raw, (0, 1))
        return as_bytes(raw), as_bytes(absmax)

    def unpack(self, storage: tuple[Tensor, ...], dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
        codes, absmax = storage
        # float32 even under bfloat16: a rounded factor would bend a whole row one way
        factor = as_float32(absmax).to(torch.promote_types(dtype, torch.float32)) / self.largest
        if scale is not None:
            factor = factor * scale
        return self._times(codes.view(self.code)[:, : self.in_features], factor, dtype)

    def _times(self, codes: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """codes (n, in) * factor (n, 1), multiplied in the factor's dtype and rounded once to `dtype`."""
        raise NotImplementedError
