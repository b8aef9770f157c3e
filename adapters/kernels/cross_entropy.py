"""Each token's cross-entropy, and its slope written over the logits, in two passes over a row instead of six or more.

    loss = log(sum_v exp(x_v)) - x_target,    x_v <- exp(x_v) / sum - (v == target)

One program has a row. The first pass finds largest logit and sum at once, the second writes slopes, and finds most of
the row in cache. All is float32, slopes are rounded once; sums are taken in a fixed order: the same input gives the
same bits.

Shapes: T tokens, V the vocabulary; logits (T, V), targets (T,) int64.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from decompft.adapters.kernels.launch import launch
from decompft.adapters.kernels.proved import Proved, close_to

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# a load of 16 bytes a thread in bfloat16: with 128256 columns as fast as the best that was timed on an H200, with 32000
# 4 % slower (cross_entropy_speed.py)
_BLOCK, _WARPS = 4096, 16


def fits(like: Tensor, targets_T: Tensor) -> bool:
    """Whether `losses_` runs on logits of this device and dtype, and these targets."""
    return (
        like.is_cuda
        and like.dtype in _DTYPES
        and targets_T.dtype == torch.int64
        and targets_T.is_contiguous()
        and PROVED.runs(like.device, like.dtype)
    )


def losses_(logits_TV: Tensor, targets_T: Tensor, ignore: int, *, slopes: bool) -> Tensor:
    """(T,) float32. One launch.

    Args:
        logits_TV: contiguous along V; rows may be further apart than they are long.
        targets_T: any that is neither a column nor `ignore` has a loss that is not a number.
        ignore: the target of rows whose loss and slopes are 0.
        slopes: write the slope of each row's loss over its logits, which are left as they are otherwise.
    """
    losses_T = torch.empty(logits_TV.shape[0], dtype=torch.float32, device=logits_TV.device)
    launch(
        _triton(), logits_TV.shape[:1], logits_TV.device,
        logits_TV, targets_T, losses_T, logits_TV.shape[1], logits_TV.stride(0), ignore,
        SLOPES=slopes, BLOCK=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip
    return losses_T


def plain_(logits_TV: Tensor, targets_T: Tensor, ignore: int, *, slopes: bool) -> Tensor:
    """The twin of `losses_`, in float32 or better."""
    wide_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    is_ignored_T1 = (targets_T == ignore)[:, None]
    target_T1 = targets_T[:, None].masked_fill(is_ignored_T1, 0)
    norm_T1 = torch.logsumexp(wide_TV, dim=1, keepdim=True)
    loss_T1 = norm_T1 - wide_TV.gather(1, target_T1)
    if slopes:
        d_TV = (wide_TV - norm_T1).exp_()
        d_TV.scatter_add_(1, target_T1, -torch.ones_like(norm_T1))
        logits_TV.copy_(d_TV.masked_fill_(is_ignored_T1, 0.0))
    return loss_T1.masked_fill(is_ignored_T1, 0.0)[:, 0]


@cache
def _triton() -> Any:
    # triton only where a GPU is
    from decompft.adapters.kernels import cross_entropy_triton

    return cross_entropy_triton.cross_entropy


def example(
    device: torch.device,
    dtype: torch.dtype,
    *,
    size: tuple[int, int],
    slopes: bool,
    spacing: float | None = None,
) -> None:
    """Run `losses_` on large and small logits, some of them -inf, and compare it with the twin in float64.

    Args:
        size: of the logits, 5 rows at least; they are columns of a wider array.
        spacing: of numbers near 1 as the device rounds to them; None: the dtype's own.

    Raises:
        WrongKernelError: it is further from it than rounding allows, or writes where it should not.
    """
    (num_rows, num_columns), ignore = size, -100
    draw = torch.Generator().manual_seed(0)
    drawn = 4 * torch.randn(num_rows, num_columns + 8, generator=draw)
    drawn[1] *= 1000
    drawn[2, 2::3] = -torch.inf
    drawn[4, : 3 + num_columns // 2] = -torch.inf  # whole blocks, the first of them
    targets = torch.randint(num_columns, (num_rows,), generator=draw)
    targets[:5] = torch.tensor([0, num_columns // 2, 0, ignore, num_columns - 1])
    wide, targets = drawn.to(device, dtype), targets.to(device)
    before, logits = wide.clone(), wide[:, 3 : 3 + num_columns]
    x = logits.double()
    exact, made = x.clone(), losses_(logits, targets, ignore, slopes=slopes)
    losses = plain_(exact, targets, ignore, slopes=True)
    # float32 numbers of these sizes, rounded a few times; sums of some dozen terms one after the other; a device's
    # exponential multiplies its argument by log2(e) first
    norm = x.logsumexp(1)
    near = 2**-20 * (1 + norm.abs())
    close_to(made, losses.float(), near + 2**-20 * losses.abs())
    if slopes:
        p, log_p = (x - norm[:, None]).exp(), (x - norm[:, None]).nan_to_num(neginf=0.0)
        spacing = spacing or torch.finfo(dtype).eps
        # below float32's normal numbers an exponential may become 0
        bound = spacing * (exact.abs() + torch.finfo(dtype).smallest_normal) + 2**-126
        close_to(logits, exact.to(dtype), bound + p * (near[:, None] + 2**-20 * log_p.abs()))
        before[:, 3 : 3 + num_columns] = logits
    close_to(wide.nan_to_num(), before.nan_to_num(), 0.0)


def _example(device: torch.device, dtype: torch.dtype) -> None:
    """Rows of two blocks and a part of one, and of less than one."""
    for num_columns, slopes in ((2 * _BLOCK + 13, True), (2 * _BLOCK + 13, False), (77, True)):
        example(device, dtype, size=(9, num_columns), slopes=slopes)


# every run has a loss
PROVED = Proved(name="cross_entropy", instead="torch's operators", example=_example)
