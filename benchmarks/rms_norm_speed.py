"""How near is the kernel `rms_norm` to the card's memory, beside Liger's and the addition after it? One GPU, seconds.

python benchmarks/rms_norm_speed.py [--tokens 8192] [--columns 4096]

In bfloat16, as CUDA graphs of several arrays, so that neither the host nor a cache counts. A limit is the bytes of all
arrays, each read or written once, at the speed of a large copy.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from inspect import signature

import torch
from step_classes import copy_rate, replayed
from torch import Tensor

from decompft.adapters.kernels import rms_norm

COPIES = 8
EPS = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=4096)
    args = parser.parse_args()
    size, device = (args.tokens, args.columns), torch.device("cuda", torch.cuda.current_device())
    draw = torch.Generator(device).manual_seed(0)
    weight = torch.randn(args.columns, generator=draw, device=device).bfloat16()
    # x, dy and what comes back along the residual
    sets = [
        [torch.randn(size, generator=draw, device=device).bfloat16() for _ in range(3)] for _ in range(COPIES)
    ]
    if not rms_norm.fits(sets[0][0], weight):
        raise SystemExit(rms_norm.PROVED.reason(device, torch.bfloat16))
    memory, each = copy_rate(), 2 * args.tokens * args.columns
    beside = liger(weight)
    print(f"memory {memory / 1e12:.2f} TB/s; liger-kernel {'is' if beside else 'is not'} installed")
    print(f"{'pass':<28}{'arrays':>7}{'limit us':>10}{'kernel us':>11}{'of it':>7}{'beside us':>11}")
    for name, arrays, work in ours(weight):
        found, limit = replayed([run(work, s) for s in sets]), arrays * each / memory
        other = f"{1e6 * replayed([run(beside[name], s) for s in sets]):11.1f}" if beside else ""
        print(f"{name:<28}{arrays:7d}{1e6 * limit:10.1f}{1e6 * found:11.1f}{limit / found:7.0%}{other}")


Work = Callable[[Tensor, Tensor, Tensor], object]


def run(work: Work, given: list[Tensor]) -> Callable[[], object]:
    return lambda: work(*given)


def ours(weight: Tensor) -> list[tuple[str, int, Work]]:
    """Name, arrays read and written, work."""
    rstd = torch.ones(2**20, device=weight.device)

    def back(x: Tensor, dy: Tensor, other: Tensor | None) -> object:
        return rms_norm.backward(dy, x, weight, rstd[: len(x)], other)

    return [
        ("forward", 2, lambda x, dy, other: rms_norm.forward(x, weight, EPS)),
        ("backward", 3, lambda x, dy, other: back(x, dy, None)),
        ("backward with residual", 4, back),
    ]


def liger(weight: Tensor) -> dict[str, Work]:
    """The same by Liger's functions as a Llama's norms call them, and torch's addition; empty without Liger."""
    try:
        from liger_kernel.ops.rms_norm import rms_norm_backward, rms_norm_forward
    except ImportError:
        return {}
    one = torch.randn(16, len(weight), device=weight.device).bfloat16()
    *_, block, warps, mode = rms_norm_forward(one, weight, EPS, 0.0, "llama", None)
    rstd = torch.ones(2**20, device=weight.device)
    # releases without it make the weight's gradient, whether it trains or not
    frozen = {"needs_dw": False} if "needs_dw" in signature(rms_norm_backward).parameters else {}

    def back(x: Tensor, dy: Tensor) -> Tensor:
        # in place of dy, as it does by default
        given = dy, x, weight, rstd[: len(x)], 0.0, mode, block, warps, True, None
        dx: Tensor = rms_norm_backward(*given, **frozen)[0]
        return dx

    return {
        "forward": lambda x, dy, other: rms_norm_forward(x, weight, EPS, 0.0, "llama", None),
        "backward": lambda x, dy, other: back(x, dy),
        "backward with residual": lambda x, dy, other: back(x, dy) + other,
    }


if __name__ == "__main__":
    main()
