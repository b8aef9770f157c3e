"""How near is each causal attention to the card's arithmetic? One GPU, a minute.

python benchmarks/attention_speed.py [--rows 4] [--length 2048]

Llama-2-7B's heads (32 of 128) in bfloat16: torch's flash and cuDNN, and FlashAttention 4 where the package
flash-attn-4 is installed (by itself: what torch 2.11 has for it knows an older one). Needed FLOPs: half of 4 T^2 d a
head forward, of 10 backward. Outputs and gradients are compared with flash's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from step_classes import seconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, SIZE = 32, 128


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    args = parser.parse_args()
    draw = torch.Generator("cuda").manual_seed(0)
    shape = (args.rows, args.length, HEADS, SIZE)
    q, k, v, dy = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=draw).transpose(1, 2)
        for _ in range(4)
    )
    given = [t.detach().requires_grad_() for t in (q, k, v)]
    flops = 2 * args.rows * HEADS * args.length**2 * SIZE
    expected: tuple[Tensor, ...] = ()
    for name in ("flash", "cuDNN", "FlashAttention 4"):
        try:
            attend = prepared(name)
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if name == "cuDNN" else SDPBackend.FLASH_ATTENTION):
                forward = seconds(lambda a=attend: a(*given))
                y = attend(*given)
                backward = seconds(lambda y=y: torch.autograd.grad(y, given, dy, retain_graph=True))
                found = (y.detach(), *torch.autograd.grad(y, given, dy))
        except Exception as error:  # not installed, or not for this card
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:150]}", flush=True)
            continue
        expected = expected or found
        apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
        print(
            f"{name}: forward {1000 * forward:.3f} ms, {flops / forward / 1e12:.0f} TFLOP/s; backward "
            f"{1000 * backward:.3f} ms, {2.5 * flops / backward / 1e12:.0f} TFLOP/s; apart from flash by {apart:.1e}",
            flush=True,
        )  # fmt: skip


def prepared(name: str) -> Callable[..., Tensor]:
    if name != "FlashAttention 4":
        return partial(F.scaled_dot_product_attention, is_causal=True)
    from flash_attn.cute.interface import flash_attn_func

    def attend(*tensors: Tensor) -> Tensor:
        found = flash_attn_func(*(t.transpose(1, 2) for t in tensors), causal=True)
        y: Tensor = found[0] if isinstance(found, tuple) else found
        return y.transpose(1, 2)

    return attend


if __name__ == "__main__":
    main()
