"""What a launch costs the host, by Triton and remembered (adapters/kernels/launch.py). One GPU, some seconds.

python benchmarks/launch_speed.py

Microseconds, the mean of 300 launches in a row, with what the kernel's own Python prepares; torch's operators beside.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from unittest.mock import patch

import torch

from decompft.adapters.kernels import combine, dequantize, launch, visit


def main() -> None:
    device = torch.device("cuda", 0)
    dy = torch.randn(64, 64, device=device, dtype=torch.bfloat16)
    up, hq = (torch.randn(64, 16, device=device, dtype=torch.bfloat16) for _ in range(2))
    gu, square = torch.empty_like(hq), torch.randn(8, 8, device=device)
    codes, scales = dequantize.example_storage(device, double_quant=True)
    kernels: dict[str, Callable[[], object]] = {
        "visit (two launches)": lambda: visit.visit(dy, up, hq, gu, 0.5),
        "dequantize": lambda: dequantize.dequantize(
            codes, scales, "nf4", 64, torch.bfloat16, double_quant=True
        ),
        "combine": lambda: combine.add_([dy], None, (hq, up.T)),
    }
    for name, work in kernels.items():
        with patch.object(launch, "_stream", lambda device: None):
            by_triton = microseconds(work)
        print(f"{name}: {by_triton:.1f} us by Triton, {microseconds(work):.1f} us remembered")
    for name, work in {"mul_": lambda: square.mul_(1.0), "mm": lambda: square @ square}.items():
        print(f"torch's {name}: {microseconds(work):.1f} us")


def microseconds(work: Callable[[], object], times: int = 300) -> float:
    for _ in range(20):
        work()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        work()
    took = time.perf_counter() - began
    torch.cuda.synchronize()
    return took / times * 1e6


if __name__ == "__main__":
    main()
