"""Up to three arrays and a thin product summed into the first array, and their dots with another, in one pass.

    own_1 <- sum_m own_m + left right,    dot_m = sum over all rows and columns of own_m x

Of no array, the product alone: writing it is all that costs, which torch's products do at half of the memory's speed.

Where each linear's part of a slope is wanted by itself, or a product cannot add to what is there, torch's operators
read and write all of the slope for each sum, each dot and the thin product. Here each array is read once and one is
written. Sums are float32, rounded once to the arrays' dtype. Dots are taken over fixed tiles, then over the tiles: the
same input gives the same bits.

Shapes: T rows, C columns, K the inner size of the thin product. own, x (T, C), left (T, K), right (K, C).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decompft.adapters.kernels.launch import launch, padded
from decompft.adapters.kernels.proved import Proved, close_to

MOST = 3  # arrays, which lie in registers together
MAX_INNER = 192  # `right` stays in shared memory as a tile's loads pass; padded to 256
# float32 products do not run on tensor cores: a tile of more is machine code that takes seconds to compile
_MAX_INNER_FLOAT32 = 32


class Tile(NamedTuple):
    """A program's share; of rows see `rows_of`."""

    columns: int
    tiles: int  # one below the other: `right` is read once for all
    warps: int


# by the number of arrays. What bounds this is memory, so that loads must be on their way while others are computed
# with. On an H200 these were fastest or next to it in benchmarks/combine_speed.py
TILES = (Tile(128, 4, 4), Tile(128, 1, 4), Tile(128, 1, 8), Tile(128, 8, 4))

Product = tuple[Tensor, Tensor]  # left, right


def fits(x_TC: Tensor, thin: Product | None) -> bool:
    """Whether `add_` runs on arrays like x, contiguous, and this product."""
    return (thin is None or _is_thin(*thin, x_TC.dtype)) and _takes(x_TC)


def _takes(x_TC: Tensor) -> bool:
    return (
        x_TC.is_cuda
        and x_TC.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and x_TC.stride(1) == 1
        and x_TC.numel() > 0
        and PROVED.runs(x_TC.device, x_TC.dtype)
    )


def add_(owns: Sequence[Tensor], x_TC: Tensor | None, thin: Product | None) -> Tensor | None:
    """owns[0] becomes the sum; returns the dots of each with x, (len(owns),) float32. Only where it `fits`.

    Args:
        owns: one to `MOST`, contiguous, of one dtype, each in memory of its own.
        x_TC: None: no dots are wanted, and None is returned.
        thin: what else is added; right may have any strides.
    """
    assert all(own.is_contiguous() for own in owns), [own.stride() for own in owns]
    return _launch(owns[0], len(owns), owns[1:], x_TC, thin)


def _launch(
    out_TC: Tensor, num: int, others: Sequence[Tensor], x_TC: Tensor | None, thin: Product | None
) -> Tensor | None:
    """`out_TC` is the first of `num` arrays, and only written if there are none."""
    num_rows, num_columns = out_TC.shape
    rows, tile = rows_of(out_TC.dtype), TILES[num]
    grid = (-(-num_columns // tile.columns), -(-num_rows // (rows * tile.tiles)))
    parts = None
    if x_TC is not None:
        parts = torch.empty(num, grid[0] * grid[1], dtype=torch.float32, device=out_TC.device)
    left, right = (None, None) if thin is None else thin
    inner = 0 if left is None else left.shape[1]
    absent = [None] * (MOST - 1 - len(others))
    launch(
        _triton(), grid, out_TC.device,
        out_TC, *others, *absent, x_TC, left, right, parts, num_rows, num_columns, inner,
        0 if x_TC is None else x_TC.stride(0), 0 if left is None else left.stride(0),
        *((0, 0) if right is None else right.stride()),
        M=num, DOTS=parts is not None, THIN=thin is not None, K=padded(inner),
        ROWS=rows, COLUMNS=tile.columns, TILES=tile.tiles, num_warps=tile.warps, num_stages=1,
    )  # fmt: skip
    return None if parts is None else parts.sum(1)


def plain_(owns: Sequence[Tensor], x_TC: Tensor | None, thin: Product | None) -> Tensor | None:
    """The twin of `add_`, in float32 or better."""
    wide = torch.promote_types(owns[0].dtype, torch.float32)
    dots = None
    if x_TC is not None:
        dots = torch.stack([(own.to(wide) * x_TC).sum() for own in owns])
    total = torch.stack([own.to(wide) for own in owns]).sum(0)
    if thin is not None:
        total += thin[0].to(wide) @ thin[1].to(wide)
    owns[0].copy_(total)
    return dots


def add_product_(y_TC: Tensor, left_TK: Tensor, right_KC: Tensor) -> Tensor:
    """y += left right, in place."""
    if not (y_TC.is_contiguous() and fits(y_TC, (left_TK, right_KC))):
        return y_TC.addmm_(left_TK, right_KC)
    add_([y_TC], None, (left_TK, right_KC))
    return y_TC


def product(left_TK: Tensor, right_KC: Tensor) -> Tensor:
    """left right."""
    if _is_thin(left_TK, right_KC, left_TK.dtype) and _takes(left_TK):
        out_TC = left_TK.new_empty(left_TK.shape[0], right_KC.shape[1])
        _launch(out_TC, 0, (), None, (left_TK, right_KC))
        return out_TC
    return left_TK @ right_KC


def rows_of(dtype: torch.dtype) -> int:
    """Of a tile; a float32 product takes its registers from the tile."""
    return 32 if dtype == torch.float32 else 64


def _is_thin(left_TK: Tensor, right_KC: Tensor, dtype: torch.dtype) -> bool:
    most = _MAX_INNER_FLOAT32 if dtype == torch.float32 else MAX_INNER
    return (
        left_TK.dtype == right_KC.dtype == dtype and 0 < left_TK.shape[1] <= most and left_TK.stride(1) == 1
    )


@cache
def _triton() -> Any:
    # triton only where a GPU is
    from decompft.adapters.kernels import combine_triton

    return combine_triton.combine


def example(
    device: torch.device,
    dtype: torch.dtype,
    *,
    num: int,
    dots: bool,
    inner: int,
    tall: bool,
    size: tuple[int, int],
) -> None:
    """Run `add_`, or `product`, and compare it with the twin in float64.

    Args:
        num: of arrays; 0 for `product`.
        inner: of the thin product; 0 for none.
        tall: its right factor is a transposed array.

    Raises:
        WrongKernelError: it is further from it than rounding allows.
    """
    draw = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device, dtype)

    owns, x = [made(*size) for _ in range(num)], made(size[0], size[1] + 16)[:, : size[1]] if dots else None
    thin = None
    if inner:
        # columns of a wider array, as one member's part of all
        left = made(size[0], inner + 16)[:, :inner]
        thin = left, made(size[1], inner).T if tall else made(inner, size[1])
    wide = [own.double() for own in owns] or [torch.zeros(size, dtype=torch.float64, device=device)]
    sizes = sum((own.abs() for own in wide), torch.zeros_like(wide[0]))
    if thin is not None:
        sizes += thin[0].double().abs() @ thin[1].double().abs()
    dot_sizes = None if x is None else torch.stack([(own * x.double()).abs().sum() for own in wide])
    exact_dots = plain_(
        wide,
        None if x is None else x.double(),
        None if thin is None else (thin[0].double(), thin[1].double()),
    )
    if not owns and thin is not None:
        owns, found = [made(*size)], None
        _launch(owns[0], 0, (), None, thin)
    else:
        found = add_(owns, x, thin)
    # float32 sums, of which a tensor core may cut two bits off, then one rounding
    bound = torch.finfo(dtype).eps * wide[0].abs() + 2**-22 * (inner + num) * sizes
    close_to(owns[0], wide[0].to(dtype), bound)
    if found is not None and exact_dots is not None and dot_sizes is not None:
        # float32 sums of at most 256 terms one after the other: a thread's, then over threads, tiles and programs
        close_to(found, exact_dots.float(), 2**-24 * 256 * dot_sizes)


def _example(device: torch.device, dtype: torch.dtype) -> None:
    """Rows and columns that fill no tile: as y, before and after its product, as the slope of gate and up, as that of
    q, k and v."""
    for num, inner in ((0, 16), (1, 5), (2, 0), (3, 24)):
        tile = TILES[num]
        size = rows_of(dtype) * tile.tiles + 5, tile.columns + 16
        example(device, dtype, num=num, dots=num > 1, inner=inner, tall=num < 2, size=size)


# not named by method or format: with `quantization.compute: fp8` all of them want it
PROVED = Proved(name="combine", instead="torch's operators", example=_example)
