"""MAP's small tensors: the norm of B A and the scales that follow from it, in two launches, their slopes in one.

n = sqrt(tr((B^T B)(A A^T))) (METHODS 1.3, identity 1), row = a / (N(W) + eps), q = w b / (n + eps/s); the slopes are
those of map.py, whose lines `plain` and `plain_pull` repeat. All in float32. Sums are taken over fixed stretches
of A and B, then over the stretches: the same input gives the same bits.

Shapes: A (rank, in), B (out, rank).
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decompft.adapters.kernels.launch import launch, padded
from decompft.adapters.kernels.proved import Proved, close_to

MAX_RANK = 64  # one program adds up both Gram matrices
_SPLITS = 32
_STRIDE = (
    4  # scalars lie 16 bytes apart: kernels are compiled anew for an address that is not a multiple of it
)


class Scales(NamedTuple):
    """What the forward pass needs, and what the backward pass needs again."""

    n: Tensor  # (1,), as the next four
    per_a: Tensor  # row / a
    per_b: Tensor  # q / b
    q: Tensor
    row: Tensor
    AAt: Tensor  # (rank, rank), as the next
    BtB: Tensor


def fits(A: Tensor, B: Tensor) -> bool:
    """Whether `scales` and `pull_` run on these: on a GPU, where nothing differentiates them."""
    return (
        A.is_cuda
        and A.dtype == B.dtype == torch.float32
        and A.shape[0] <= MAX_RANK
        and A.numel() > 0
        and B.numel() > 0
        and A.is_contiguous()
        and B.is_contiguous()
        and not torch.is_grad_enabled()
        and PROVED.runs(A.device, A.dtype)
    )


def scales(
    A: Tensor, B: Tensor, a: Tensor, b: Tensor, base_norm: Tensor, *, eps: float, s: float
) -> tuple[Tensor, Tensor]:
    """Both matrices (2, rank, rank) and the five scalars (5, ...) of `Scales`, in its order. Two launches.

    Args:
        a, b, base_norm: (1,).
    """
    (rank, num_in), num_out = A.shape, B.shape[0]
    sizes: dict[str, Any] = {"SPLITS": _SPLITS, "R": padded(rank)}
    chunk = chunk_of(rank)
    chunks = -(-max(num_in, num_out) // (_SPLITS * chunk))
    parts = A.new_empty(2, _SPLITS, rank, rank)
    grams, found = A.new_empty(2, rank, rank), A.new_empty(5, _STRIDE)
    launch(
        _triton().gram, (2 * _SPLITS,), A.device,
        A, B, parts, rank, num_in, num_out, CHUNK=chunk, CHUNKS=chunks, **sizes,
    )  # fmt: skip
    launch(
        _triton().finish, (1,), A.device,
        parts, a, b, base_norm, grams, found, rank, eps, eps / s, STRIDE=_STRIDE, **sizes,
    )  # fmt: skip
    return grams, found


def views(grams: Tensor, found: Tensor) -> Scales:
    """Of what `scales` returned."""
    return Scales(*found[:, :1].unbind(), *grams.unbind())


def pull_(
    A: Tensor,
    B: Tensor,
    grams: Tensor,
    found: Tensor,
    dq: Tensor,
    drow: Tensor,
    dA: Tensor,
    dB: Tensor,
) -> tuple[Tensor, Tensor]:
    """Slopes of a and b (1,); dA and dB become whole in place. One launch.

    Args:
        grams, found: what `scales` returned.
        dq, drow: of one number.
        dA: the slope of A in the product (q B) A, contiguous.
        dB: that of q B, contiguous.
    """
    (rank, num_in), num_out = A.shape, B.shape[0]
    slopes, chunk = A.new_empty(2, _STRIDE), chunk_of(rank)
    launch(
        _triton().pull, (-(-num_in // chunk) - (-num_out // chunk),), A.device,
        A, B, grams, found, dq, drow, dA, dB, slopes, rank, num_in, num_out,
        R=padded(rank), CHUNK=chunk, STRIDE=_STRIDE,
    )  # fmt: skip
    return slopes[0, :1], slopes[1, :1]


def plain(
    A: Tensor,
    B: Tensor,
    a: Tensor,
    b: Tensor,
    base_norm: Tensor,
    *,
    eps: float,
    s: float,
    warmup: Tensor | float = 1.0,
) -> Scales:
    """The twin of `scales`; differentiable. `warmup` multiplies q, which the kernel does not."""
    AAt, BtB = A @ A.T, B.T @ B
    n = torch.dot(AAt.view(-1), BtB.view(-1)).clamp_min(0).sqrt().reshape(1)
    per_b = (n + eps / s).reciprocal()
    if isinstance(warmup, Tensor) or warmup != 1.0:
        per_b = per_b * warmup
    per_a = (base_norm + eps).reciprocal()
    return Scales(n, per_a, per_b, b * per_b, a * per_a, AAt, BtB)


def plain_pull_(
    A: Tensor,
    B: Tensor,
    found: Scales,
    dq: Tensor,
    drow: Tensor,
    dA: Tensor,
    dB: Tensor,
    *,
    warmup: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The twin of `pull_` but that dB holds the slope of B in the product.

    dn = -dq q / (n + eps/s); dB += B (A A^T) dn / n and dA += (B^T B) A dn / n.

    At n = 0 the norm has no slope and both are 0: dq = <B^T dy, A x> is, and 1e-30 keeps 0/0 from NaN.
    """
    of_b = dq * found.per_b
    slope = (of_b * found.q).div_(found.n + 1e-30).div_(-warmup)
    dA.addmm_(found.BtB * slope, A)
    dB.addmm_(B, found.AAt * slope)
    return drow * found.per_a, of_b


def chunk_of(rank: int) -> int:
    """Columns of A, or rows of B, in a tile; a tile of more numbers is machine code that takes seconds to compile."""
    return 1024 // padded(rank)


@cache
def _triton() -> Any:
    # triton only where a GPU is
    from decompft.adapters.kernels import norm_triton

    return norm_triton


def _example(device: torch.device, dtype: torch.dtype) -> None:
    """Widths and a rank that fill no tile, in float64 beside it; at B = 0 as well."""
    draw = torch.Generator().manual_seed(0)
    A, B, dA, dB = (torch.randn(size, generator=draw) for size in ((5, 300), (200, 5), (5, 300), (200, 5)))
    a, b, base_norm, dq, drow = (torch.tensor([v]) for v in (3.0, 0.7, 2.5, 0.3, -1.1))
    options = {"eps": 1e-6, "s": 2.0}
    for up, dq_of in ((B, dq), (torch.zeros_like(B), torch.zeros(1))):
        tensors = (A, up, a, b, base_norm, dq_of, drow, dA, dB)
        A_, B_, a_, b_, norm_, dq_, drow_, dA_, dB_ = (t.double() for t in tensors)
        exact = plain(A_, B_, a_, b_, norm_, **options)
        dB_ *= exact.q
        expected = (*exact, *plain_pull_(A_, B_, exact, dq_, drow_, dA_, dB_), dA_, dB_)
        A_, B_, a_, b_, norm_, dq_, drow_, dA_, dB_ = (t.to(device, copy=True) for t in tensors)
        grams, scalars = scales(A_, B_, a_, b_, norm_, **options)
        slopes = pull_(A_, B_, grams, scalars, dq_, drow_, dA_, dB_)
        for found, right in zip((*views(grams, scalars), *slopes, dA_, dB_), expected, strict=True):
            # float32 sums of up to 300 terms in any order: 300 half spacings, of the largest number
            close_to(found, right.to(device, torch.float32), 300 * 2**-24 * float(right.abs().max()))


PROVED = Proved(
    name="norm", instead="torch's operators", example=_example, dtypes=(torch.float32,), methods=("map",)
)
