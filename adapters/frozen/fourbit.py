"""The 4-bit bases, nf4 and fp4: rows of packed codes and scales, stored so that they really shard.

Layout (Dettmers et al., 2023, arXiv:2305.14314, for the codes; the layout is ours):
    codes   (out, in / 2)  bytes: two 4-bit codes each, the first in the high half; blocks never cross a row
    scales  (out, n)       bytes: float32 absmax a block, or, with double quantization, one byte a
                           block (padded to a multiple of 4) and then float32 `low` and `step` of
                           the row: absmax = low + step * byte

Double quantization is affine and per row, not bitsandbytes' dynamic map over 256 absmax of
neighbouring rows: nothing crosses a row, so every rank quantizes its own rows alone.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from decompft.adapters.formats import ROW_TAIL_BYTES, SCALE_ALIGN
from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.frozen.rows import as_bytes, as_float32, bytes_parameter, float_chunks, load_operators
from decompft.adapters.kernels import changed, dequantize, weight_times
from decompft.adapters.kernels.changed import Change
from decompft.adapters.kernels.fp8 import FourBit, Rows, fourbit_columns, fourbit_rows

_LEVELS = 255  # of the affine byte code of the scales


class FourBitLinear(FrozenLinear):
    """Storage as in the module docstring; bitsandbytes' operators, or a kernel of ours, do the arithmetic on codes."""

    code: ClassVar[str]  # bitsandbytes' name of the 16 levels

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        block_size: int,
        double_quant: bool,
        bias_dtype: torch.dtype | None,
    ) -> None:
        super().__init__(in_features, out_features, bias_dtype=bias_dtype)
        if in_features % block_size:
            raise ValueError(f"in_features {in_features} is not a multiple of the block size {block_size}")
        self.block_size = block_size
        self.double_quant = double_quant
        self.num_blocks = in_features // block_size  # a row
        padded = self.num_blocks + -self.num_blocks % SCALE_ALIGN
        self.codes = bytes_parameter(out_features, in_features // 2)
        self.scales = bytes_parameter(
            out_features, padded + ROW_TAIL_BYTES if double_quant else 4 * self.num_blocks
        )

    def storage_names(self) -> tuple[str, ...]:
        return ("codes", "scales")

    def pack(self, rows: Tensor) -> tuple[Tensor, ...]:
        load_operators()
        codes = rows.new_empty((rows.shape[0], self.in_features // 2), dtype=torch.uint8)
        absmax = rows.new_empty((rows.shape[0], self.num_blocks), dtype=torch.float32)
        for where, chunk in float_chunks(rows):
            packed, scales = torch.ops.bitsandbytes.quantize_4bit(
                chunk, self.block_size, self.code, torch.uint8
            )
            codes[where] = packed.view(chunk.shape[0], -1)
            absmax[where] = scales.view(chunk.shape[0], -1)
        return self.store(codes, absmax)

    def store(self, codes: Tensor, absmax: Tensor) -> tuple[Tensor, ...]:
        """Rows that are 4-bit already -> storage tensors; without double quantization nothing is lost.

        Args:
            codes: uint8 (n, in / 2).
            absmax: float32 (n, in / block_size).
        """
        return as_bytes(codes), as_bytes(self._pack_scales(absmax))

    def unpack(self, storage: tuple[Tensor, ...], dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
        codes, scales = storage
        if dequantize.fits(codes, self.block_size, dtype, scale):
            return dequantize.dequantize(
                codes, scales, self.code, self.block_size, dtype, scale, double_quant=self.double_quant
            )
        load_operators()
        shape = (codes.shape[0], self.in_features)
        if shape[0] == 0:  # CUDA's operator starts no empty grid
            return torch.empty(shape, dtype=dtype, device=codes.device)
        absmax = self._unpack_scales(scales)
        if scale is not None:
            absmax = absmax * scale  # in / block_size numbers a row, where the weight has in
        # the operator fills a float64 output with garbage
        dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            codes.view(torch.uint8).reshape(-1, 1),
            absmax.reshape(-1),
            self.block_size,
            self.code,
            shape,
            torch.float32 if dtype == torch.float64 else dtype,
        )
        return dense.to(dtype)

    def unpack_changed(
        self, storage: tuple[Tensor, ...], dtype: torch.dtype, change: Change, slope: Tensor | None = None
    ) -> Tensor | None:
        codes, scales = storage
        if not changed.fits(codes, self.block_size, dtype, change):
            return None
        return changed.changed(
            codes, scales, self.code, self.block_size, dtype, change, slope, double_quant=self.double_quant
        )

    def times(self, storage: tuple[Tensor, ...], A: Tensor, dtype: torch.dtype) -> Tensor:
        (codes, scales), rounded = storage, A.to(dtype)
        if not weight_times.fits(codes, self.block_size, rounded):
            return super().times(storage, A, dtype)
        return weight_times.weight_times(
            codes, scales, rounded, self.code, self.block_size, double_quant=self.double_quant
        )

    def fp8_rows(self, storage: tuple[Tensor, ...], weight: Tensor | None = None) -> Rows:
        return fourbit_rows(self.four_bit(storage))

    def fp8_columns(self, storage: tuple[Tensor, ...], weight: Tensor | None = None) -> Rows:
        return fourbit_columns(self.four_bit(storage))

    def four_bit(self, storage: tuple[Tensor, ...]) -> FourBit:
        """Storage as the fp8 kernels take it."""
        codes, scales = (s.view(torch.uint8) for s in storage)
        return FourBit(
            codes, scales, dequantize.levels(self.code, codes.device), self.block_size, self.double_quant
        )

    def _pack_scales(self, absmax: Tensor) -> Tensor:
        """float32 (n, num_blocks) -> the same, or bytes (n, padded + tail)."""
        if not self.double_quant:
            return absmax
        low, high = absmax.aminmax(dim=1, keepdim=True)
        step = (high - low) / _LEVELS
        # a row of equal scales has step 0 and is stored exactly
        code = ((absmax - low) / step.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(0, _LEVELS)
        tail = torch.cat((low, step), dim=1).view(torch.uint8)
        padding = (0, -self.num_blocks % SCALE_ALIGN)
        return torch.cat((nn.functional.pad(code.to(torch.uint8), padding), tail), dim=1)

    def _unpack_scales(self, scales: Tensor) -> Tensor:
        """Storage (n, ...) -> float32 absmax (n, num_blocks)."""
        if not self.double_quant:
            return as_float32(scales)
        raw = scales.view(torch.uint8)
        tail = raw[:, -ROW_TAIL_BYTES:].contiguous().view(torch.float32)
        return torch.addcmul(tail[:, :1], raw[:, : self.num_blocks].float(), tail[:, 1:])


class Nf4Linear(FourBitLinear):
    """NormalFloat: levels at the quantiles of a normal distribution."""

    code = "nf4"


class Fp4Linear(FourBitLinear):
    """A sign, two bits of exponent and one of mantissa, as bitsandbytes lays them out."""

    code = "fp4"
