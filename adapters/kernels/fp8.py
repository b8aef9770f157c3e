"""To float8 e4m3 with a float32 scale a row: activations and gradients in one pass, 4-bit codes without bfloat16.

Legend: T tokens, K columns, O output rows, I inputs, B blocks of a row. A quantized row is codes * scale; its scale is
the largest magnitude over 448, e4m3's largest number. A number is within 1/16 of itself of its code's, or within
scale / 1024 near 0.

4-bit rows take for the largest magnitude a bound that needs no weight: levels reach from -1 to 1, so that a weight is
at most its block's absmax. A row's scale is that of its largest block, where some code is +-1. The inputs of a block
share the scale of that block's largest absmax over all rows: an input whose own weights are smaller loses nothing until
they are 2^14 times smaller, because e4m3 rounds relative to each number.

Triton where there is a GPU and it is installed, torch elsewhere; both divide in float32, so that a code may differ by a
step where the quotient lies between two codes, and nowhere else.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decompft.adapters.kernels.dequantize import example_storage, levels
from decompft.adapters.kernels.launch import launch
from decompft.adapters.kernels.proved import Proved, close_to

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
# a row whose largest magnitude is below this is rounded as if it were this: its scale is still a normal number
SMALLEST = 1e-30
_WIDEST = 1 << 16  # columns that one program holds in registers
# chosen on an H200 with benchmarks/fp8_kernels_time.py, which times the candidates beside these
_ROW_WARPS = 2  # to an output row
_TALL_WARPS, _TALL_PIECES = 2, 1  # of 128 output rows each; of 64 inputs, one after the other
_HIGH_ROWS = 16
# of a 4-bit weight: a thread of the transposing kernel has 64 inputs of a block, and writes four rows as a word
_BLOCKS_OF, _ROWS_OF = 64, 4


class Rows(NamedTuple):
    """codes (n, k) e4m3, scale (n,) float32: values are codes * scale[:, None]."""

    codes: Tensor
    scale: Tensor


class FourBit(NamedTuple):
    """The storage of a 4-bit weight as bytes; see frozen/fourbit.py for the layout."""

    codes: Tensor  # uint8 (O, I / 2)
    scales: Tensor  # uint8 (O, n)
    levels: Tensor  # float32 (16,)
    block_size: int
    double_quant: bool

    @property
    def num_inputs(self) -> int:
        return 2 * self.codes.shape[1]


def quantize_rows(x_TK: Tensor, times_K: Tensor | None = None, *, pad_to: int = 0) -> Rows:
    """x, or x * times in float32, row by row; with at least `pad_to` rows, the surplus ones zero.

    Args:
        x_TK: floating; its rows contiguous.
        times_K: float32.
    """
    num_rows, num_columns = x_TK.shape
    codes = torch.empty(max(num_rows, pad_to), num_columns, dtype=E4M3, device=x_TK.device)
    scale = torch.empty(codes.shape[0], dtype=torch.float32, device=x_TK.device)
    if codes.shape[0] > num_rows:
        codes[num_rows:].view(torch.uint8).zero_()
        scale[num_rows:].zero_()
    if _fits(x_TK) and x_TK.dtype.itemsize <= 4 and x_TK.stride(1) == 1 and num_columns <= _WIDEST:
        launch_rows(x_TK, times_K, codes, scale)
        return Rows(codes, scale)
    wide_TK = x_TK.float() if times_K is None else x_TK.float() * times_K
    scale[:num_rows] = scale_of(torch.linalg.vector_norm(wide_TK, torch.inf, dim=1))
    codes[:num_rows] = wide_TK / scale[:num_rows, None]
    return Rows(codes, scale)


def fourbit_rows(weight: FourBit) -> Rows:
    """The dequantized weight (O, I) with a scale an output row."""
    if not _fits_fourbit(weight):
        absmax_OB = absmax(weight)
        scale_O = scale_of(absmax_OB.amax(1))
        return Rows(_values(weight, absmax_OB / scale_O[:, None]).to(E4M3), scale_O)
    rows, device = weight.codes.shape[0], weight.codes.device
    found = Rows(
        torch.empty(rows, weight.num_inputs, dtype=E4M3, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
    )
    launch_fourbit_rows(weight, found.codes, found.scale)
    return found


def fourbit_columns(weight: FourBit) -> Rows:
    """The transposed dequantized weight (I, O), contiguous, with a scale an input."""
    if not (_fits_fourbit(weight) and weight.codes.shape[0] % _ROWS_OF == 0):
        absmax_OB = absmax(weight)
        scale_B = scale_of(absmax_OB.amax(0))
        codes = _values(weight, absmax_OB / scale_B).to(E4M3).T.contiguous()
        return Rows(codes, scale_B.repeat_interleave(weight.block_size))
    rows, device = weight.codes.shape[0], weight.codes.device
    blocks = weight.num_inputs // weight.block_size
    high_NB = torch.empty(-(-rows // _HIGH_ROWS), blocks, dtype=torch.float32, device=device)
    launch_block_highs(weight, high_NB)
    found = Rows(
        torch.empty(weight.num_inputs, rows, dtype=E4M3, device=device),
        torch.empty(weight.num_inputs, dtype=torch.float32, device=device),
    )
    launch_fourbit_columns(weight, high_NB.amax(0), found.codes, found.scale)
    return found


def scale_of(high: Tensor) -> Tensor:
    """Largest magnitudes -> scales; what is not finite stays so."""
    return high.clamp_min(SMALLEST) / LARGEST


def absmax(weight: FourBit) -> Tensor:
    """float32 (O, B)."""
    floats = _floats(weight)
    if not weight.double_quant:
        return floats
    blocks = weight.num_inputs // weight.block_size
    return torch.addcmul(floats[:, -2:-1], weight.scales[:, :blocks].float(), floats[:, -1:])


def reason_without_triton(device: torch.device) -> str:
    """Why plain torch quantizes on this device, in words; "" where Triton does, which is proved now."""
    return "no GPU" if device.type != "cuda" else PROVED.reason(device, torch.bfloat16)


def _values(weight: FourBit, absmax_OB: Tensor) -> Tensor:
    """float32 (O, I): each code's level times its block's number."""
    pairs = torch.stack((weight.codes >> 4, weight.codes & 15), dim=2)
    levels = weight.levels.index_select(0, pairs.view(-1).int())
    levels_OBC = levels.view(weight.codes.shape[0], -1, weight.block_size)
    return levels_OBC.mul_(absmax_OB[:, :, None]).view(weight.codes.shape[0], -1)


def _floats(weight: FourBit) -> Tensor:
    """The scales' bytes as float32 (O, n / 4); a view where it can be one."""
    aligned = weight.scales.storage_offset() % 4 == 0 and weight.scales.is_contiguous()
    return (weight.scales if aligned else weight.scales.clone()).view(torch.float32)


def _fits(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.numel() > 0 and PROVED.runs(tensor.device, torch.bfloat16)


def _fits_fourbit(weight: FourBit) -> bool:
    return weight.block_size % _BLOCKS_OF == 0 and _fits(weight.codes)


def launch_rows(x_TK: Tensor, times_K: Tensor | None, out_TK: Tensor, scale_T: Tensor) -> None:
    num_rows, num_columns = x_TK.shape
    width = 1 << (num_columns - 1).bit_length()
    launch(
        _triton().rows, (num_rows,), x_TK.device,
        x_TK, times_K, out_TK, scale_T, num_columns, x_TK.stride(0),
        TIMES=times_K is not None, COLUMNS=width, num_warps=4 if width <= 2048 else 8 if width <= 8192 else 16,
    )  # fmt: skip


def launch_fourbit_rows(weight: FourBit, out_OI: Tensor, scale_O: Tensor) -> None:
    launch(
        _triton().fourbit_rows, (weight.codes.shape[0],), weight.codes.device,
        *_pointers(weight), out_OI.view(torch.int32), scale_O, **_sizes(weight),
        THREADS=32 * _ROW_WARPS, num_warps=_ROW_WARPS,
    )  # fmt: skip


def launch_block_highs(weight: FourBit, high_NB: Tensor) -> None:
    num_rows = weight.codes.shape[0]
    launch(
        _triton().block_highs, (high_NB.shape[0],), weight.codes.device,
        weight.scales.contiguous(), _floats(weight), high_NB, num_rows, **_sizes(weight), ROWS=_HIGH_ROWS,
    )  # fmt: skip


def launch_fourbit_columns(weight: FourBit, high_B: Tensor, out_IO: Tensor, scale_I: Tensor) -> None:
    """Output rows in multiples of four."""
    fours, threads = weight.codes.shape[0] // _ROWS_OF, 32 * _TALL_WARPS
    grid = (-(-weight.num_inputs // (_BLOCKS_OF * _TALL_PIECES)), -(-fours // threads))
    launch(
        _triton().fourbit_columns, grid, weight.codes.device,
        *_pointers(weight), high_B, out_IO.view(torch.int32), scale_I, fours, **_sizes(weight),
        THREADS=threads, PIECES=_TALL_PIECES, num_warps=_TALL_WARPS,
    )  # fmt: skip


def _pointers(weight: FourBit) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _words(weight.codes), weight.scales.contiguous(), _floats(weight), weight.levels


def _words(of_bytes: Tensor) -> Tensor:
    """int32, four bytes each; a copy where 16 bytes cannot be read at once."""
    whole = of_bytes.contiguous()
    aligned = whole.storage_offset() % 4 == 0 and whole.data_ptr() % 16 == 0
    return (whole if aligned else whole.clone()).view(torch.int32)


def _sizes(weight: FourBit) -> dict[str, int]:
    blocks = weight.num_inputs // weight.block_size
    return {
        "INPUTS": weight.num_inputs, "BLOCK": weight.block_size, "BLOCKS": blocks,
        "BLOCKS_POWER": 1 << (blocks - 1).bit_length(), "SCALE_BYTES": weight.scales.shape[1],
        "DOUBLE": weight.double_quant,
    }  # fmt: skip


@cache
def _triton() -> Any:
    # triton only where a GPU is
    from decompft.adapters.kernels import fp8_triton

    return fp8_triton


def _example(device: torch.device, dtype: torch.dtype) -> None:
    """Each kernel, on sizes that fill no tile, beside torch on the CPU."""
    draw = torch.Generator().manual_seed(0)
    x, times = torch.randn(5, 80, generator=draw).to(dtype), torch.rand(80, generator=draw)
    for factor in (None, times):
        found = _room(5, 80, device)
        launch_rows(x.to(device), None if factor is None else factor.to(device), *found)
        _near(found, quantize_rows(x, factor))
    for double_quant in (True, False):
        stored = example_storage(torch.device("cpu"), double_quant=double_quant, num_rows=12)
        codes, scales = (s.view(torch.uint8) for s in stored)
        weight = FourBit(codes, scales, levels("nf4", codes.device), 64, double_quant)
        there = weight._replace(**{n: getattr(weight, n).to(device) for n in ("codes", "scales", "levels")})
        num_rows, num_inputs = codes.shape[0], weight.num_inputs
        found = _room(num_rows, num_inputs, device)
        launch_fourbit_rows(there, *found)
        _near(found, fourbit_rows(weight))
        high_NB = torch.empty(-(-num_rows // _HIGH_ROWS), num_inputs // 64, device=device)
        launch_block_highs(there, high_NB)
        found = _room(num_inputs, num_rows, device)
        launch_fourbit_columns(there, high_NB.amax(0), *found)
        _near(found, fourbit_columns(weight))


def _room(num_rows: int, num_columns: int, device: torch.device) -> Rows:
    codes = torch.empty(num_rows, num_columns, dtype=E4M3, device=device)
    return Rows(codes, torch.empty(num_rows, device=device))


def _near(found: Rows, expected: Rows) -> None:
    """A code may be the next one: 1/8 of a number, or 1/512 of a scale; a scale is another by rounding alone."""
    close_to(found.scale.cpu(), expected.scale, expected.scale * 2**-20)
    codes = expected.codes.float()
    close_to(found.codes.cpu().float(), codes, codes.abs() / 8 + 2**-9)


PROVED = Proved(name="fp8", instead="torch's operators", example=_example, is_asked_for=True)
