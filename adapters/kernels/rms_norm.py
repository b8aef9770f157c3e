"""RMSNorm with a frozen weight, and its slope with what else comes back to its input: one launch each.

    rstd = 1 / sqrt(mean(x^2) + eps),   y = weight * round(x rstd)
    dx = round(rstd (dn - n mean(dn n))) + other,   dn = weight dy,   n = x rstd

Every array is read or written once: no gradient of the weight is made, and the residual branch's part of dx (`other`)
needs no addition of its own. Sums are taken in float32 within one program, always in the same order. y is rounded as
transformers' LlamaRMSNorm rounds it, to x's dtype before the weight and after it; dx before the addition, too, so that
it is what a separate addition makes, bit for bit: a block that is run again has that.

Shapes: T rows, H columns; rstd (T,) float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from decompft.adapters.kernels.launch import launch
from decompft.adapters.kernels.proved import Proved, close_to

MAX_COLUMNS = 16384  # one program holds a row: 16 numbers of each array in each of 1024 threads
# whose norms are these, each with its own class of the same lines
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# a product that is not rounded before a sum would let dx with `other` be another than without
_OPTIONS = {"enable_fp_fusion": False}
_NUMBERS = 2048  # of a program, at least: several rows where they are short, as those of heads


def fits(x: Tensor, weight_H: Tensor) -> bool:
    """Whether `forward` and `backward` run on an x (..., H) like this."""
    return (
        x.is_cuda
        and x.dtype in _DTYPES
        and x.dtype == weight_H.dtype
        and x.shape[-1] == weight_H.shape[0] <= MAX_COLUMNS
        and x.numel() > 0
        and x.is_contiguous()
        and weight_H.is_contiguous()
        and PROVED.runs(x.device, x.dtype)
    )


def forward(x_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y and rstd."""
    y_TH, rstd_T = torch.empty_like(x_TH), x_TH.new_empty(len(x_TH), dtype=torch.float32)
    rows, columns, warps = tile_of(x_TH.shape[1])
    launch(
        _triton().rms_norm_forward, (-(-len(x_TH) // rows),), x_TH.device,
        x_TH, weight_H, y_TH, rstd_T, *x_TH.shape, eps, ROWS=rows, COLUMNS=columns, num_warps=warps, **_OPTIONS,
    )  # fmt: skip
    return y_TH, rstd_T


def backward(
    dy_TH: Tensor, x_TH: Tensor, weight_H: Tensor, rstd_T: Tensor, other_TH: Tensor | None
) -> Tensor:
    """dx, with `other` added where there is one. All contiguous."""
    dx_TH = torch.empty_like(x_TH)
    rows, columns, warps = tile_of(x_TH.shape[1])
    launch(
        _triton().rms_norm_backward, (-(-len(x_TH) // rows),), x_TH.device,
        dy_TH, x_TH, weight_H, rstd_T, other_TH, dx_TH, *x_TH.shape,
        SUMS=other_TH is not None, ROWS=rows, COLUMNS=columns, num_warps=warps, **_OPTIONS,
    )  # fmt: skip
    return dx_TH


def plain_forward(x_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The twin of `forward`, in any dtype: transformers' operators in their order; rstd is float32 or better."""
    wide_TH = x_TH.to(torch.promote_types(x_TH.dtype, torch.float32))
    rstd_T1 = torch.rsqrt(wide_TH.pow(2).mean(-1, keepdim=True) + eps)
    return weight_H * (wide_TH * rstd_T1).to(x_TH.dtype), rstd_T1.squeeze(-1)


def plain_backward(
    dy_TH: Tensor, x_TH: Tensor, weight_H: Tensor, rstd_T: Tensor, other_TH: Tensor | None
) -> Tensor:
    """The twin of `backward`."""
    rstd_T1 = rstd_T.unsqueeze(-1)
    d_normed_TH, normed_TH = dy_TH.to(rstd_T.dtype) * weight_H.to(rstd_T.dtype), x_TH * rstd_T1
    dx_TH = rstd_T1 * (d_normed_TH - normed_TH * (d_normed_TH * normed_TH).mean(-1, keepdim=True))
    dx_TH = dx_TH.to(x_TH.dtype)
    return dx_TH if other_TH is None else dx_TH + other_TH


def tile_of(num_columns: int) -> tuple[int, int, int]:
    """Rows and padded columns of a program, and its warps: 16 numbers a thread and more where there are few."""
    columns = max(16, 1 << (num_columns - 1).bit_length())
    rows = max(1, _NUMBERS // columns)
    return rows, columns, min(32, max(4, rows * columns // 512))


@cache
def _triton() -> Any:
    # triton only where a GPU is
    from decompft.adapters.kernels import rms_norm_triton

    return rms_norm_triton


def example(device: torch.device, dtype: torch.dtype, size: tuple[int, int], *, cut_by: float = 0.0) -> None:
    """Forward and backward, with and without `other`, beside float64.

    Args:
        size: T, H.
        cut_by: spacing of numbers at 1, where they are cut off instead of rounded.
    """
    eps, draw = 1e-5, torch.Generator().manual_seed(0)
    x, dy, other = (torch.randn(size, generator=draw).to(device, dtype) for _ in range(3))
    weight = (1 + torch.randn(size[1], generator=draw)).to(device, dtype)
    spacing, near_zero = 2 * cut_by or torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    # float32 sums by trees, at most 64 additions above each other, and some more operations
    apart = 80 * 2**-24
    y, rstd = forward(x, weight, eps)
    exact_y, exact_rstd = plain_forward(x.double(), weight.double(), eps)
    close_to(rstd, exact_rstd.float(), apart * exact_rstd)
    # rounded twice, and so is what it is compared with once: by half a spacing each time
    bound = (2 * spacing + apart) * exact_y.abs() + spacing * near_zero * (1 + weight.double().abs())
    close_to(y, exact_y.to(dtype), bound)
    normed, d_normed = (x.double() * rstd[:, None]).abs(), (dy.double() * weight).abs()
    terms = rstd[:, None] * (d_normed + normed * (normed * d_normed).mean(-1, keepdim=True))
    exact = plain_backward(dy.double(), x.double(), weight.double(), rstd.double(), None)
    bound = spacing * (exact.abs() + near_zero) + apart * terms
    dx = backward(dy, x, weight, rstd, None)
    close_to(dx, exact.to(dtype), bound)
    total = dx + other
    close_to(backward(dy, x, weight, rstd, other), total, bound + spacing * total.double().abs())


def _example(device: torch.device, dtype: torch.dtype) -> None:
    """A row that fills its program, one that does not, and several rows of a program."""
    for size in ((3, 4096), (2, 5000), (2 * tile_of(100)[0] + 5, 100)):
        example(device, dtype, size)


PROVED = Proved(name="rms_norm", instead="Liger's or torch's norm", example=_example, families=FAMILIES)
