"""What a large product costs alone, added onto what lies there, with a thin product before or after it, or beside it:
as further columns of x and of the weight.

    python benchmarks/products.py

Widths of Llama-2-7B, 8,192 tokens, rank 16, bfloat16, random numbers; milliseconds, the median of 20.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from step_classes import seconds
from torch import Tensor

T, R = 8192, 16


def main() -> None:
    names = ("alone", "thin after", "thin first", "beta 0.5", "thin", "16 beside", "48 beside")
    print(f"{'in':>6} {'out':>6} {'side':>9}" + "".join(f"{name:>12}" for name in names))
    for num_in, num_out in ((4096, 4096), (4096, 11008), (11008, 4096)):
        for side in ("forward", "backward"):
            is_forward = side == "forward"
            found = [1000 * seconds(work) for work in _ways(num_in, num_out, is_forward)]
            found += [1000 * seconds(_beside(num_in, num_out, is_forward, more)) for more in (16, 48)]
            print(f"{num_in:6d} {num_out:6d} {side:>9}" + "".join(f"{ms:12.3f}" for ms in found), flush=True)


def _ways(num_in: int, num_out: int, is_forward: bool) -> tuple[Callable[[], object], ...]:
    """In the order of the columns."""
    w = _weight(num_in, num_out, is_forward)
    x, up, h = _random(T, num_in), _random(R, num_out), _random(T, R)
    y = torch.empty(T, num_out, device="cuda", dtype=torch.bfloat16)
    return (
        lambda: torch.mm(x, w, out=y),
        lambda: torch.mm(x, w, out=y).addmm_(h, up),
        lambda: torch.mm(h, up, out=y).addmm_(x, w),
        lambda: y.addmm_(x, w, beta=0.5),
        lambda: torch.mm(h, up, out=y),
    )


def _beside(num_in: int, num_out: int, is_forward: bool, more: int) -> Callable[[], object]:
    x, w = _random(T, num_in + more), _weight(num_in + more, num_out, is_forward)
    y = torch.empty(T, num_out, device="cuda", dtype=torch.bfloat16)
    return lambda: torch.mm(x, w, out=y)


def _weight(num_in: int, num_out: int, is_forward: bool) -> Tensor:
    """(num_in, num_out), as it lies in the pass."""
    return _random(num_out, num_in).T if is_forward else _random(num_in, num_out)


def _random(*size: int) -> Tensor:
    return torch.randn(size, device="cuda", dtype=torch.bfloat16) / 64


if __name__ == "__main__":
    main()
