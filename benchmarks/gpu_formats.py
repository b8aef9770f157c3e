"""Every format of the frozen base on a GPU: does it compute what the CPU computes, and how fast does it unpack?

    python benchmarks/gpu_formats.py --out benchmarks/results/gpu_formats.jsonl

Exit code 1 when a check failed; the row says which and by how much. Speeds are medians over 20 runs,
bytes read and written a second, beside a device copy of the same call. With --device cpu and a small
--width the script tests itself.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  its operators
import torch
from torch import Tensor

from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.map import MapLinear
from decompft.adapters.spec import ADAPTER_SPECS, AdapterConfig
from decompft.launcher.recipe import QuantizationSection
from decompft.launcher.worker.build import frozen_maker

FORMATS: dict[str, dict[str, Any]] = {
    "none": {"format": "none"},
    "int8": {"format": "int8"},
    "int8-outliers": {"format": "int8", "outlier_threshold": 6.0},
    "fp8": {"format": "fp8"},
    **{
        f"{kind}-{block}{'-double' if double else ''}": {
            "format": kind, "block_size": block, "double_quant": double,
        }
        for kind in ("nf4", "fp4") for block in (64, 128) for double in (False, True)
    },
}  # fmt: skip
OUT, IN, TOKENS, RUNS = 384, 512, 96, 20
THRESHOLD = 6.0
# one rounding to bfloat16, and what float32 adds
BF16 = 1.01 * 2.0**-8


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=int, default=8192, help="of the square matrix that is timed")
    args = parser.parse_args()
    device = torch.device(args.device)
    rows = [machine(device), copy_speed(device, args.width)]
    for name, fields in FORMATS.items():
        row = {"case": name, **checks(name, fields, device), **speeds(fields, device, args.width)}
        row["failed"] = [check for check, value in row["checks"].items() if not value["ok"]]
        rows.append(row)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w") as file:
        for row in rows:
            print(json.dumps(row), flush=True)
            file.write(json.dumps(row) + "\n")
    failed = [f"{row['case']}: {', '.join(row['failed'])}" for row in rows if row.get("failed")]
    print("FAILED " + "; ".join(failed) if failed else f"all checks of {len(FORMATS)} formats passed")
    sys.exit(1 if failed else 0)


def machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "case": "machine", "device": name, "torch": torch.__version__,
        "bitsandbytes": importlib.metadata.version("bitsandbytes"),
    }  # fmt: skip


# -- checks -----------------------------------------------------------------------------------


def checks(name: str, fields: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Each check: the number found, the limit, whether it holds."""
    layer = make(fields, IN, OUT)
    weight = normal((OUT, IN), seed=0) * 0.02
    weight[5] = 0
    here = layer.pack(weight)
    there = tuple(t.cpu() for t in layer.pack(weight.to(device)))
    # bitsandbytes' 4-bit kernels round near a boundary the other way on another device (found on an H200: up to
    # 1.4 % of fp4's bytes, at differences that the next check bounds); ours are the same arithmetic
    same = sum(int((bits(a) != bits(b)).sum()) for a, b in zip(here, there, strict=True))
    total = sum(bits(a).numel() for a in here)
    is_4bit = fields["format"] in ("nf4", "fp4")
    found = {
        "bytes that differ when packed": limit(same / total, 2e-2 if is_4bit else 0.0),
        "dequantized of both": limit(
            relative(layer.unpack(there, torch.float64), layer.unpack(here, torch.float64)),
            5e-3 if is_4bit else 0.0,
        ),
    }
    moved = tuple(t.to(device) for t in here)
    # bitsandbytes' CUDA kernels spell their levels with six digits
    for dtype, allowed in ((torch.float64, 2e-6), (torch.float32, 2e-6), (torch.bfloat16, BF16)):
        unpacked = layer.unpack(moved, dtype).cpu()
        found[f"unpacked to {str(dtype)[6:]}"] = limit(
            largest(unpacked, layer.unpack(here, torch.float64)), allowed
        )
    shifted = tuple(torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape) for t in moved)
    exact = torch.equal(layer.unpack(shifted, torch.float32), layer.unpack(moved, torch.float32))
    found["unpacked from an odd place of a buffer"] = limit(float(not exact), 0.0)
    empty = layer.unpack(layer.pack(weight[:0].to(device)), torch.bfloat16)
    found["no rows at all"] = limit(float(tuple(empty.shape) != (0, IN)), 0.0)
    found["a row of zeros"] = limit(float(layer.unpack(moved, torch.bfloat16)[5].abs().max()), 0.0)
    return {"checks": found | adapter_checks(name, fields, layer, here, device)}


def adapter_checks(
    name: str, fields: dict[str, Any], layer: FrozenLinear, storage: tuple[Tensor, ...], device: torch.device
) -> dict[str, Any]:
    """MAP over the base in bfloat16 on the device, against its formula in float64 on the CPU."""
    adapter = MapLinear(
        layer,
        AdapterConfig(method="map", rank=8, alpha=16.0, dropout=0.0, options=ADAPTER_SPECS["map"].options()),
    )
    W = layer.unpack(storage, torch.float64)
    facts = {"frobenius_norm": float(torch.linalg.norm(W))}
    with torch.no_grad():
        for own, value in adapter.initial_values(torch.Generator().manual_seed(0), facts).items():
            getattr(adapter, own).copy_(value)
        adapter.B.copy_(0.1 * normal((OUT, 8), seed=1))
        adapter.a.mul_(0.7)
        for parameter, values in zip(layer.storage(), storage, strict=True):
            parameter.copy_(values)
    x = normal((TOKENS, IN), seed=2)
    x[7, 40], x[50, 300] = 70.0, -30.0
    x = x.bfloat16()
    probe = normal((TOKENS, OUT), seed=3).bfloat16()
    # the formula, by autograd in float64
    x64 = x.double().requires_grad_(True)
    A, B, a, b = (getattr(adapter, n).detach().double().requires_grad_(True) for n in ("A", "B", "a", "b"))
    D, eps, norm = 2.0 * (B @ A), adapter.config.options.eps, adapter.base_norm.double()
    y64 = x64 @ (a * W / (norm + eps) + b * D / (torch.linalg.norm(D) + eps)).T
    y64.backward(probe.double())
    expected = y64.detach()
    if "outlier_threshold" in fields:
        expected = expected - (a / (norm + eps)).detach() * (
            x.double() @ W.T - outlier_product(x.double(), W)
        )
    adapter.to(device)
    x_there = x.to(device).requires_grad_(True)
    y = adapter(x_there)
    y.backward(probe.to(device))
    # less than what rounding x to int8 costs: a product that does it must agree with a formula that does
    found = {"MAP forward": limit(relative(y.detach().cpu(), expected), 1.5 * BF16)}
    assert x_there.grad is not None
    found["MAP gradient of x"] = limit(relative(x_there.grad.cpu(), x64.grad), 2 * BF16)
    for own, exact in (("A", A), ("B", B), ("a", a), ("b", b)):
        grad = getattr(adapter, own).grad.cpu()
        # a and b sum over all tokens and outputs, so that roundings cancel less than the sum does
        found[f"MAP gradient of {own}"] = limit(relative(grad, exact.grad), (8 if own in "ab" else 4) * BF16)
    return found


def outlier_product(x: Tensor, W: Tensor) -> Tensor:
    """LLM.int8's product in float64 (arXiv:2208.07339, equation 8), W already in whole steps of its rows."""
    out = (x.abs() >= THRESHOLD).any(0)
    inside = torch.where(out, 0, x)
    step = inside.abs().amax(1, keepdim=True) / 127
    return ((inside / step).round() * step) @ W.T + x[:, out] @ W[:, out].T


# -- speed ------------------------------------------------------------------------------------


def copy_speed(device: torch.device, width: int) -> dict[str, Any]:
    source = torch.empty(2 * width, width, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), device)
    return {"case": "copy", "copy_gb_per_s": round(2 * source.nbytes / seconds / 1e9, 1)}


def speeds(fields: dict[str, Any], device: torch.device, width: int) -> dict[str, Any]:
    """Of a width x width matrix: pack and unpack; and the forward product of 4,096 tokens, with its peak memory."""
    layer = make(fields, width, width)
    weight = (torch.randn(width, width, device=device) * 0.02).bfloat16()
    packed = layer.pack(weight)
    layer.to(device)
    with torch.no_grad():
        for parameter, values in zip(layer.storage(), packed, strict=True):
            parameter.copy_(values)
    pack_peak = peak(lambda: layer.pack(weight), device)
    unpack = timed(lambda: layer.dense(torch.bfloat16), device)
    num_bytes = sum(p.nbytes for p in packed) + width * width * 2
    x = torch.randn(width // 2, width, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        product = timed(lambda: layer(x), device)
        product_peak = peak(lambda: layer(x), device)
    row = {
        "bytes_a_weight": round(sum(p.nbytes for p in packed) / width**2, 4),
        "unpack_us": round(unpack * 1e6, 1), "unpack_gb_per_s": round(num_bytes / unpack / 1e9, 1),
        "product_us": round(product * 1e6, 1), "product_tokens": width // 2,
    }  # fmt: skip
    if device.type == "cuda":
        row |= {"pack_peak_mib": round(pack_peak / 2**20), "product_peak_mib": round(product_peak / 2**20)}
    return row


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(RUNS + 3):
        settle(device)
        began = time.perf_counter()
        run()
        settle(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[3:])


def peak(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call holds at once beyond what was there, its result included."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    settle(device)
    return torch.cuda.max_memory_allocated(device) - before


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- small things -----------------------------------------------------------------------------


def make(fields: dict[str, Any], in_: int, out: int) -> FrozenLinear:
    return frozen_maker(QuantizationSection(**fields), torch.bfloat16)("layer", in_, out, None)


def normal(shape: tuple[int, int], *, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def limit(value: float, allowed: float) -> dict[str, Any]:
    return {"found": float(f"{value:.3g}"), "limit": float(f"{allowed:.3g}"), "ok": value <= allowed}


def relative(found: Tensor, expected: Tensor | None) -> float:
    assert expected is not None
    return float(torch.linalg.norm(found.double() - expected) / torch.linalg.norm(expected))


def largest(found: Tensor, expected: Tensor) -> float:
    """The largest difference of a number, over that number."""
    difference = (found.double() - expected).abs()
    return float((difference / expected.abs().clamp_min(1e-30)).max())


if __name__ == "__main__":
    main()
