"""Launches of Triton kernels, of which all but the first of a kind cost the host microseconds.

Triton looks at every argument at every launch, and at its own settings, some 30 to 60 us in all: a step of 7B in
float8 launches two thousand kernels, and the GPU would wait for the host. What decides which machine code runs is
remembered here instead: types, whether a pointer is a multiple of 16, and all other values as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

# how a compiled kernel is called is no promise of Triton's: equal in the releases from and to these
_KNOWN_FROM, _KNOWN_TO = (3, 6), (3, 8)
_MOST_KINDS = 4096  # shapes are values, too

# (kernel, device, kind of each argument, options) -> compiled kernel
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, grid: Sequence[int], device: torch.device, *args: Any, **named: Any) -> None:
    """`kernel[grid](*args, **named)` on the device's current stream.

    Args:
        kernel: what `triton.jit` made.
        device: of all tensors.
        named: the constexprs, each always of one type, and Triton's options.
    """
    stream = _stream(device)
    if stream is None:
        _plainly(kernel, grid, device, args, named)
        return
    kind: list[Any] = [id(kernel), device.index, tuple(named.items())]
    values: list[Any] = []
    for value in args:
        if isinstance(value, Tensor):
            at = value.data_ptr()
            values.append(at)
            kind += (value.dtype, at & 15)
        else:  # 1, 1.0 and True are equal
            values.append(value)
            kind += (value.__class__, value)
    key = tuple(kind)
    found = _compiled.get(key)
    if found is None:
        if len(_compiled) >= _MOST_KINDS:
            _compiled.clear()
        _compiled[key] = _plainly(kernel, grid, device, args, named)
        return
    values += [named[name] for name in kernel.arg_names[len(args) :]]
    width, height, depth = (*grid, 1, 1)[:3]
    # None: no hooks, as nothing here profiles through Triton
    found.run(width, height, depth, stream, found.function, found.packed_metadata, None, None, None, *values)


def _plainly(kernel: Any, grid: Sequence[int], device: torch.device, args: Any, named: Any) -> Any:
    """Triton's own way; the compiled kernel."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return kernel[tuple(grid)](*args, **named)


def _stream(device: torch.device) -> int | None:
    """The current one; None where Triton is to launch: in its interpreter, for another device, in another release."""
    if device.type != "cuda" or not _is_known() or torch.cuda.current_device() != device.index:
        return None
    return torch._C._cuda_getCurrentRawStream(device.index)


def padded(rank: int) -> int:
    """The inner size of a tile's product: a power of 2, of which a tensor core takes 16."""
    return max(16, 1 << (rank - 1).bit_length())


@cache
def _is_known() -> bool:
    import triton

    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return _KNOWN_FROM <= release <= _KNOWN_TO
