"""The 4-bit NormalFloat base: rows of packed codes and scales, stored so that they really shard.

Layout (Dettmers et al., 2023, arXiv:2305.14314, for the code; the layout is ours):
    codes   (out, in / 4)  bytes viewed as bfloat16: two 4-bit codes a byte, blocks never cross a row
    scales  (out, n)       bytes viewed as bfloat16: float32 absmax a block, or, with double
                           quantization, one byte a block (padded to a multiple of 4) and then
                           float32 `low` and `step` of the row: absmax = low + step * byte

Double quantization is affine and per row, not bitsandbytes' dynamic map over 256 absmax of
neighbouring rows: nothing crosses a row, so every rank quantizes its own rows alone. Viewed as
bfloat16 because FSDP2 of torch 2.11 refuses integer parameters; the bits may spell NaN, so these
tensors take part in no arithmetic, cast or finite check.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from decompft.adapters.frozen.base import FrozenLinear

_LEVELS = 255  # of the affine byte code of the scales
_TAIL_BYTES = 8  # float32 low, float32 step


class Nf4Linear(FrozenLinear):
    """Storage as in the module docstring; bitsandbytes' operators do the arithmetic on codes."""

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
        padded = -(-self.num_blocks // 4) * 4
        scale_bytes = padded + _TAIL_BYTES if double_quant else 4 * self.num_blocks
        self.codes = _bytes_parameter(out_features, in_features // 2)
        self.scales = _bytes_parameter(out_features, scale_bytes)

    def storage_names(self) -> tuple[str, ...]:
        return ("codes", "scales")

    def pack(self, rows: Tensor) -> tuple[Tensor, ...]:
        _load_operators()
        num_rows = rows.shape[0]
        if num_rows == 0:  # a rank may hold no row of a small matrix
            return tuple(p.new_empty((0, p.shape[1]), device=rows.device) for p in (self.codes, self.scales))
        codes, absmax = torch.ops.bitsandbytes.quantize_4bit(
            rows.float().contiguous(), self.block_size, "nf4", torch.uint8
        )
        absmax = absmax.view(num_rows, self.num_blocks).float()
        packed = codes.view(num_rows, self.in_features // 2).view(torch.bfloat16)
        return packed, self._pack_scales(absmax).view(torch.bfloat16)

    def unpack(self, storage: tuple[Tensor, ...], dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
        _load_operators()
        codes, scales = storage
        absmax = self._unpack_scales(scales)
        if scale is not None:
            absmax = absmax * scale  # in / block_size numbers a row, where the weight has in
        # the operator fills a float64 output with garbage
        dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            codes.view(torch.uint8).reshape(-1, 1),
            absmax.reshape(-1),
            self.block_size,
            "nf4",
            (codes.shape[0], self.in_features),
            torch.float32 if dtype == torch.float64 else dtype,
        )
        return dense.to(dtype)

    def _pack_scales(self, absmax: Tensor) -> Tensor:
        """float32 (n, num_blocks) -> bytes (n, scale_bytes)."""
        if not self.double_quant:
            return absmax.contiguous().view(torch.uint8)
        low, high = absmax.aminmax(dim=1, keepdim=True)
        step = (high - low) / _LEVELS
        # a row of equal scales has step 0 and is stored exactly
        code = ((absmax - low) / step.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(0, _LEVELS)
        pad = -self.num_blocks % 4
        tail = torch.cat((low, step), dim=1).view(torch.uint8)
        return torch.cat((nn.functional.pad(code.to(torch.uint8), (0, pad)), tail), dim=1)

    def _unpack_scales(self, scales: Tensor) -> Tensor:
        """Storage (n, ...) -> float32 absmax (n, num_blocks)."""
        if not self.double_quant:
            return scales.view(torch.float32)
        raw = scales.view(torch.uint8)
        tail = raw[:, -_TAIL_BYTES:].contiguous().view(torch.float32)
        return torch.addcmul(tail[:, :1], raw[:, : self.num_blocks].float(), tail[:, 1:])


def _bytes_parameter(rows: int, num_bytes: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, num_bytes // 2, dtype=torch.bfloat16), requires_grad=False)


def _load_operators() -> None:
    import bitsandbytes  # noqa: F401  registers torch.ops.bitsandbytes; 3 s, so only where it is used
