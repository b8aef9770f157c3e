"""nf4 and fp4 rows -> dense rows in one pass: codes and stored scales are read, the weight is written, nothing between.

bitsandbytes' operator reads float32 scales, which three or four small launches have to unpack before. Arithmetic is
its own, so that results are the same bits: level * absmax in float32, rounded once. Only a product smaller than a
float32's 1e-38 may differ, which bitsandbytes' kernels set to 0. The storage is described in frozen/fourbit.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decompft.adapters.formats import ROW_TAIL_BYTES, SCALE_ALIGN
from decompft.adapters.frozen.rows import as_bytes, as_float32
from decompft.adapters.kernels.launch import launch
from decompft.adapters.kernels.proved import Proved, close_to

# as bitsandbytes' CUDA kernels have them, by code; nf4's: Dettmers et al., 2023, arXiv:2305.14314, appendix E
_FP4 = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
LEVELS = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": _FP4 + tuple(-v for v in _FP4),
}  # fmt: skip
_BYTES = 2048  # of codes, a program's
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def fits(codes: Tensor, block_size: int, dtype: torch.dtype, scale: Tensor | None) -> bool:
    """Whether `dequantize` runs on these."""
    return (
        codes.is_cuda
        and dtype in _DTYPES
        and codes.numel() > 0
        and block_size % 32 == 0
        and block_size & (block_size - 1) == 0
        and (scale is None or scale.dtype == torch.float32)
        and PROVED.runs(codes.device, dtype)
    )


def dequantize(
    codes: Tensor,
    scales: Tensor,
    code: str,
    block_size: int,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    *,
    double_quant: bool,
) -> Tensor:
    """Storage of n rows -> dense (n, in), times `scale`, (1,) or (n, 1) float32, rounded once.

    Args:
        codes, scales: as FourBitLinear stores them.
    """
    assert codes.element_size() == 2, codes.dtype
    out = torch.empty(codes.shape[0], codes.shape[1] * 4, dtype=dtype, device=codes.device)
    row_blocks = out.shape[1] // block_size
    total = out.shape[0] * row_blocks
    blocks = max(1, 2 * _BYTES // block_size)
    stored = sources(codes, scales, code, scale, double_quant=double_quant)
    launch(
        _triton(), (-(-total // blocks),), codes.device,
        *stored.pointers, out, total, row_blocks, stored.row_floats,
        **stored.constants, HALF=block_size // 2, BLOCKS=blocks,
        # low + step * byte is rounded as FUSED says, not as a compiler likes
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


class Sources(NamedTuple):
    """A kernel's arguments that say what a weight is."""

    pointers: tuple[Tensor, ...]  # the first
    row_floats: int
    constants: dict[str, Any]


def sources(codes: Tensor, scales: Tensor, code: str, scale: Tensor | None, *, double_quant: bool) -> Sources:
    floats = as_float32(scales.contiguous())
    pointers = (
        codes.contiguous().view(torch.uint8), floats.view(torch.uint8), floats,
        floats if scale is None else scale.contiguous(), levels(code, codes.device),
    )  # fmt: skip
    times = 0 if scale is None else 1 if scale.numel() == 1 else 2
    constants = {"DOUBLE": double_quant, "FUSED": _addcmul_is_fused(codes.device), "TIMES": times}
    return Sources(pointers, floats.shape[1], constants)


@cache
def levels(code: str, device: torch.device) -> Tensor:
    """The 16 levels of nf4 or fp4, float32 (16,), by code."""
    return torch.tensor(LEVELS[code], device=device)


@cache
def _addcmul_is_fused(device: torch.device) -> bool:
    """Whether torch's addcmul, which unpacks scales elsewhere, rounds once: not the same in every release."""
    step = torch.tensor([1 + 2**-12], device=device)
    # the square is 1 + 2^-11 + 2^-24: rounded before the sum, the last term is lost
    return bool(torch.addcmul(torch.full_like(step, -1 - 2**-11), step, step) != 0)


@cache
def _triton() -> Any:
    # triton only where a GPU is
    from decompft.adapters.kernels import dequantize_triton

    return dequantize_triton.dequantize


def plain(
    codes: Tensor,
    scales: Tensor,
    code: str,
    block_size: int,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    *,
    double_quant: bool,
) -> Tensor:
    """The twin: what `dequantize` computes, in torch's operators."""
    raw = codes.contiguous().view(torch.uint8).int()
    blocks = 2 * raw.shape[1] // block_size
    absmax = as_float32(scales.contiguous())
    if double_quant:
        absmax = torch.addcmul(absmax[:, -2:-1], absmax.view(torch.uint8)[:, :blocks].float(), absmax[:, -1:])
    if scale is not None:
        absmax = absmax * scale
    found = levels(code, codes.device)[torch.stack((raw >> 4, raw & 15), -1)].view(-1, blocks, block_size)
    return (found * absmax.unsqueeze(-1)).view(codes.shape[0], -1).to(dtype)


def example_storage(
    device: torch.device, *, double_quant: bool, num_rows: int = 5, num_blocks: int = 35, block_size: int = 64
) -> tuple[Tensor, Tensor]:
    """Codes and scales that fill no tile, in a storage that starts between two float32."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (num_rows, num_blocks * block_size // 2), generator=draw, dtype=torch.uint8)
    scales = torch.rand(num_rows, num_blocks, generator=draw) + 0.01
    if double_quant:
        padded = num_blocks + -num_blocks % SCALE_ALIGN
        raw = torch.randint(0, 256, (num_rows, padded + ROW_TAIL_BYTES), generator=draw, dtype=torch.uint8)
        raw[:, padded:] = (torch.rand(num_rows, 2, generator=draw) + 0.01).view(torch.uint8)
        scales = raw.view(torch.float32)
    flat = torch.cat([torch.zeros(1, dtype=torch.bfloat16), as_bytes(scales).view(-1)]).to(device)
    return as_bytes(codes.to(device)), flat[1:].view(num_rows, -1)


def _example(device: torch.device, dtype: torch.dtype) -> None:
    """Both codes, both kinds of scales, and what multiplies them."""
    row_scale = torch.linspace(0.5, 2.0, 5, device=device).view(-1, 1)
    for code, double_quant, scale in (
        ("nf4", True, None),
        ("fp4", False, row_scale),
        ("nf4", True, row_scale[:1, 0]),
    ):
        codes, scales = example_storage(device, double_quant=double_quant)
        given = (codes, scales, code, 64, dtype, scale)
        close_to(dequantize(*given, double_quant=double_quant), plain(*given, double_quant=double_quant), 0.0)


PROVED = Proved(name="dequantize", instead="bitsandbytes' operator", example=_example, formats=tuple(LEVELS))
