"""silu(gate) * up where the thin branches of gate and up are not added yet: they are, in passing.

    g = gate + h_g w_g^T,   u = up + h_u w_u^T,   y = silu(g) u
    dg = dy u s (1 + g (1 - s)),   du = dy silu(g),   s = 1 / (1 + exp(-g))

A thin product that is written by itself, or added to, passes over all of gate, or up, once or twice more. Here the
arrays come from products with the frozen weights alone, and a tile's branch is computed where the tile is read, once in
the forward pass and once more in the backward pass. g and u are float32 within a tile and never written; y, dg and du
are rounded once. dg and du are written over gate and up, and with them, where a scale of rows has its slope by them,
the sums over tokens of dg gate and of du up.

Shapes: T tokens, O columns, R a branch's rank: gate, up, y (T, O), h (T, R), w (O, R). A branch may be absent.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decompft.adapters.kernels.launch import launch, padded
from decompft.adapters.kernels.proved import Proved, WrongKernelError, close_to

MAX_RANK = 64  # of a branch, padded to a power of 2 of which a tensor core takes 16
# whose MLPs are down(silu(gate(x)) * up(x)), each with its own class of the same lines
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_DTYPES = (torch.bfloat16, torch.float16)

Branch = tuple[Tensor, Tensor]  # h, w
Dots = tuple[bool, bool]


class Tile(NamedTuple):
    """A program's share."""

    rows: int
    columns: int
    tiles: int  # one below the other: w is read once for all
    warps: int


# what bounds both is memory; by the times of `combine` on an H200, which has as many arrays
FORWARD = Tile(64, 128, 4, 8)
BACKWARD = Tile(64, 128, 1, 8)


def fits(x: Tensor) -> bool:
    """Whether `forward` and `backward` run on arrays like x."""
    return x.is_cuda and x.dtype in _DTYPES and x.numel() > 0 and PROVED.runs(x.device, x.dtype)


def takes(h_TR: Tensor, w_OR: Tensor) -> bool:
    """Whether they take a branch."""
    return (
        h_TR.dtype == w_OR.dtype and 0 < h_TR.shape[1] <= MAX_RANK and h_TR.stride(1) == w_OR.stride(1) == 1
    )


def forward(gate_TO: Tensor, up_TO: Tensor, of_gate: Branch | None, of_up: Branch | None) -> Tensor:
    """y; gate and up contiguous."""
    y_TO = torch.empty_like(gate_TO)
    _launch(_triton().swiglu_forward, FORWARD, (gate_TO, up_TO, y_TO), of_gate, of_up)
    return y_TO


def backward(
    dy_TO: Tensor,
    gate_TO: Tensor,
    up_TO: Tensor,
    of_gate: Branch | None,
    of_up: Branch | None,
    dots: Dots = (False, False),
) -> tuple[Tensor | None, ...]:
    """gate and up become what comes back to them; all contiguous.

    Args:
        dots: whether of gate, and of up, the sums (O,) over tokens of what they were times what they become are
            wanted, float32. They are returned, None in the place of one that is not.
    """
    made = [
        torch.empty(_grid(BACKWARD, dy_TO)[1], dy_TO.shape[1], dtype=torch.float32, device=dy_TO.device)
        if is_wanted
        else None
        for is_wanted in dots
    ]
    arrays = dy_TO, gate_TO, up_TO, *made
    flags = {"GATE_DOTS": dots[0], "UP_DOTS": dots[1]}
    _launch(_triton().swiglu_backward, BACKWARD, arrays, of_gate, of_up, **flags)
    return tuple(None if parts is None else parts.sum(0) for parts in made)


def _launch(
    kernel: Any,
    tile: Tile,
    arrays: tuple[Tensor | None, ...],
    of_gate: Branch | None,
    of_up: Branch | None,
    **flags: bool,
) -> None:
    first = arrays[0]
    assert first is not None
    factors = (*(of_gate or (None, None)), *(of_up or (None, None)))
    ranks = [0 if branch is None else branch[0].shape[1] for branch in (of_gate, of_up)]
    launch(
        kernel, _grid(tile, first), first.device,
        *arrays, *factors, *first.shape, *ranks, *(0 if f is None else f.stride(0) for f in factors),
        **flags, GATE_R=ranks[0] and padded(ranks[0]), UP_R=ranks[1] and padded(ranks[1]),
        ROWS=tile.rows, COLUMNS=tile.columns, TILES=tile.tiles, num_warps=tile.warps, num_stages=1,
    )  # fmt: skip


def _grid(tile: Tile, like_TO: Tensor) -> tuple[int, int]:
    num_rows, num_columns = like_TO.shape
    return -(-num_columns // tile.columns), -(-num_rows // (tile.rows * tile.tiles))


def plain_forward(gate_TO: Tensor, up_TO: Tensor, of_gate: Branch | None, of_up: Branch | None) -> Tensor:
    """The twin of `forward`, in float32 or better."""
    gate, up = _whole(gate_TO, of_gate), _whole(up_TO, of_up)
    return (gate * torch.sigmoid(gate) * up).to(gate_TO.dtype)


def plain_backward(
    dy_TO: Tensor,
    gate_TO: Tensor,
    up_TO: Tensor,
    of_gate: Branch | None,
    of_up: Branch | None,
    dots: Dots = (False, False),
) -> tuple[Tensor | None, ...]:
    """The twin of `backward`."""
    gate, up = _whole(gate_TO, of_gate), _whole(up_TO, of_up)
    dy, part = dy_TO.to(gate.dtype), torch.sigmoid(gate)
    silu = gate * part
    found: list[Tensor | None] = []
    for array, slope, is_wanted in zip(
        (gate_TO, up_TO), (dy * up * (silu * (1 - part) + part), dy * silu), dots, strict=True
    ):
        rounded = slope.to(array.dtype)
        found.append((rounded.to(gate.dtype) * array).sum(0) if is_wanted else None)
        array.copy_(rounded)
    return tuple(found)


def _whole(y_TO: Tensor, branch: Branch | None) -> Tensor:
    wide = y_TO.to(torch.promote_types(y_TO.dtype, torch.float32))
    return wide if branch is None else wide + branch[0].to(wide.dtype) @ branch[1].to(wide.dtype).T


@cache
def _triton() -> Any:
    # triton only where a GPU is
    from decompft.adapters.kernels import swiglu_triton

    return swiglu_triton


def example(
    device: torch.device,
    dtype: torch.dtype,
    size: tuple[int, int],
    ranks: tuple[int, int],
    *,
    cut_by: float = 0.0,
) -> None:
    """Forward and backward, with dots and without, beside float64.

    Args:
        size: T, O.
        ranks: of gate's branch and of up's; 0 for none.
        cut_by: spacing of numbers at 1, where they are cut off instead of rounded.

    Raises:
        WrongKernelError: it is further from it than rounding allows.
    """
    draw = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device, dtype)

    gate, up, dy = (made(*size) for _ in range(3))
    # h as columns of a wider array, as one member's part of all
    branches = [(made(size[0], r + 16)[:, :r], made(size[1], r)) if r else None for r in ranks]
    exact = [None if b is None else (b[0].double(), b[1].double()) for b in branches]
    # float32 sums, of which a tensor core may cut two bits off
    g, u = _whole(gate.double(), exact[0]), _whole(up.double(), exact[1])
    off_g, off_u = (
        2.0**-21 * (r + 1) * _whole(a.double().abs(), None if b is None else (b[0].abs(), b[1].abs()))
        for r, a, b in zip(ranks, (gate, up), exact, strict=True)
    )
    spacing = 2 * cut_by or torch.finfo(dtype).eps
    tiny = spacing * torch.finfo(dtype).smallest_normal
    part = torch.sigmoid(g)
    silu = g * part
    slope = silu * (1 - part) + part
    # exponentials and quotients are off by some 2^-21 of themselves; silu's slope is 1.1 at most, its slope's 0.5
    some, dy_size = 2.0**-20, dy.double().abs()
    y = silu * u
    bound = (spacing + some) * y.abs() + 1.1 * off_g * u.abs() + silu.abs() * off_u + tiny
    close_to(forward(gate, up, branches[0], branches[1]), y.to(dtype), bound)
    d_gate, d_up = dy.double() * u * slope, dy.double() * silu
    terms = dy_size * u.abs() * ((silu * (1 - part)).abs() + part)
    off = dy_size * (off_u * slope.abs() + 0.5 * off_g * u.abs())
    bounds = (
        spacing * d_gate.abs() + some * terms + off + tiny,
        (spacing + some) * d_up.abs() + 1.1 * dy_size * off_g + tiny,
    )
    for dots in ((False, False), (True, True), (False, True)):
        arrays = gate.clone(), up.clone()
        sums = backward(dy, *arrays, branches[0], branches[1], dots)
        for array, expected, bound in zip(arrays, (d_gate, d_up), bounds, strict=True):
            close_to(array, expected.to(dtype), bound)
        for found, array, was, is_wanted in zip(sums, arrays, (gate, up), dots, strict=True):
            if (found is None) == is_wanted:
                raise WrongKernelError("sums that were asked for and those that are there differ")
            if found is not None:
                terms = array.double() * was.double()
                # float32 sums, over a tile's rows by a tree, then over tiles
                close_to(found, terms.sum(0).float(), 2.0**-24 * (64 + len(gate)) * terms.abs().sum(0))


def _example(device: torch.device, dtype: torch.dtype) -> None:
    """Rows and columns that fill no tile; one branch, both, ranks that are padded, and none."""
    size = FORWARD.rows * FORWARD.tiles + 5, FORWARD.columns + 16
    for ranks in ((16, 16), (5, 0), (0, 48), (0, 0)):
        example(device, dtype, size, ranks)


PROVED = Proved(
    name="swiglu",
    instead="branches written by themselves and Liger's or torch's activation",
    example=_example,
    families=FAMILIES,
    computes=_DTYPES,
)
