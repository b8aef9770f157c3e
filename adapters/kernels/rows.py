"""DoRA's small tensors: norms of rows and the factors that follow from them in one launch, their slopes in one.

n_j = |W_j + s B_j A| from |W_j|^2, P = W A^T and A A^T (METHODS 1.3, identity 2), row = m / n, up = s row B; the
slopes are those of dora.py. All in float32. Shapes: A (rank, in), B, P and up (out, rank), the others (out,).
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decompft.adapters.kernels.launch import launch, padded
from decompft.adapters.kernels.proved import Proved, close_to

MAX_RANK = 64  # of a tile that lies in registers
TINY = 1e-37  # under the root: a row of zeros, with m = 0, stays what it is instead of becoming 0 / 0


class Rows(NamedTuple):
    """What the forward pass needs, and what the backward pass needs again."""

    n: Tensor  # (out,), as the next two
    row: Tensor  # m / n
    per_B: Tensor  # s row
    up: Tensor  # (out, rank)


def fits(A: Tensor, B: Tensor) -> bool:
    """Whether `factors` and `pull_` run on these: on a GPU, where nothing differentiates them."""
    return (
        A.is_cuda
        and A.dtype == B.dtype == torch.float32
        and A.shape[0] <= MAX_RANK
        and B.numel() > 0
        and B.is_contiguous()
        and not torch.is_grad_enabled()
        and PROVED.runs(A.device, A.dtype)
    )


def factors(P: Tensor, AAt: Tensor, B: Tensor, squares: Tensor, m: Tensor, s: float) -> Rows:
    """One launch.

    Args:
        squares: |W_j|^2 (out,).
    """
    num_out, rank = B.shape
    n, row, per_B = (torch.empty_like(m) for _ in range(3))
    up = torch.empty_like(B)
    launch(
        _triton().factors, (-(-num_out // rows_of(rank)),), B.device,
        P.contiguous(), AAt.contiguous(), B, squares, m, n, row, per_B, up, num_out, rank, s, TINY,
        R=padded(rank), ROWS=rows_of(rank),
    )  # fmt: skip
    return Rows(n, row, per_B, up)


def pull_(dup: Tensor, B: Tensor, drow: Tensor, n: Tensor, per_B: Tensor, s: float) -> Tensor:
    """dm (out,); `dup`, the slope of up, contiguous, becomes B's in place. One launch."""
    num_out, rank = B.shape
    dm = torch.empty_like(n)
    launch(
        _triton().pull, (-(-num_out // rows_of(rank)),), B.device,
        dup, B, drow.contiguous(), n, per_B, dm, num_out, rank, s, R=padded(rank), ROWS=rows_of(rank),
    )  # fmt: skip
    return dm


def plain(P: Tensor, AAt: Tensor, B: Tensor, squares: Tensor, m: Tensor, s: float) -> Rows:
    """The twin of `factors`."""
    n = plain_norms(P, AAt, B, squares, s)
    row = m / n
    per_B = row * s
    return Rows(n, row, per_B, B * per_B.view(-1, 1))


def plain_norms(P: Tensor, AAt: Tensor, B: Tensor, squares: Tensor, s: float) -> Tensor:
    """n alone (out,): n^2 = squares + (2 s P + s^2 B A A^T) . B by rows. At B = 0 exactly the root of `squares`."""
    both = torch.addmm(P, B, AAt, beta=2 * s, alpha=s * s)
    return torch.linalg.vecdot(both, B).add_(squares).clamp_min_(TINY).sqrt_()


def plain_pull_(dup: Tensor, B: Tensor, drow: Tensor, n: Tensor, per_B: Tensor, s: float) -> Tensor:
    """The twin of `pull_`: dm = (drow + s sum_k dup_k B_k) / n, dB = s (m / n) dup."""
    slope = torch.add(drow, torch.linalg.vecdot(dup, B), alpha=s)
    dup.mul_(per_B.view(-1, 1))
    return slope.div_(n)


def rows_of(rank: int) -> int:
    """Of a tile: with more numbers in it, its machine code takes seconds to compile."""
    return max(16, 512 // padded(rank))


@cache
def _triton() -> Any:
    # triton only where a GPU is
    from decompft.adapters.kernels import rows_triton

    return rows_triton


def _example(device: torch.device, dtype: torch.dtype) -> None:
    """Sizes that fill no tile, beside float64; at B = 0, and with a row of zeros, as well."""
    draw = torch.Generator().manual_seed(0)
    num_out, rank, s = 2 * rows_of(5) + 5, 5, 2.0
    W, A = torch.randn(num_out, 40, generator=draw), torch.randn(rank, 40, generator=draw)
    B, dup = (torch.randn(num_out, rank, generator=draw) for _ in range(2))
    m, drow = torch.rand(num_out, generator=draw), torch.randn(num_out, generator=draw)
    W[3], B[3], m[3], drow[3] = 0, 0, 0, 0
    for up in (B, torch.zeros_like(B)):
        tensors = (W @ A.T, A @ A.T, up, W.square().sum(1), m)
        P, AAt, up_, squares, m_ = (t.double() for t in tensors)
        exact, wide = plain(P, AAt, up_, squares, m_, s), dup.double()
        expected = (*exact, plain_pull_(wide, up.double(), drow.double(), exact.n, exact.per_B, s), wide)
        P, AAt, up_, squares, m_ = (t.to(device, copy=True) for t in tensors)
        dup_ = dup.to(device, copy=True)
        found = factors(P, AAt, up_, squares, m_, s)
        dm = pull_(dup_, up_, drow.to(device), found.n, found.per_B, s)
        for one, right in zip((*found, dm, dup_), expected, strict=True):
            # |W_j + s B_j A|^2 is a sum of terms that are up to 40 times larger, of a few float32 roundings each
            close_to(one, right.to(device, torch.float32), 40 * 8 * 2**-24 * float(right.abs().max()))


PROVED = Proved(
    name="rows", instead="torch's operators", example=_example, dtypes=(torch.float32,), methods=("dora",)
)
