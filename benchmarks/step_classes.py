"""A step's kernels by class, beside the least time that each class could take on this card.

A class's limit is its floating-point operations over the rate of a large product, or its bytes (each array read or
written once) over the rate of a large copy, both timed on the card in the same process. Products are counted from the
operators' shapes; what a Llama's block reads and writes apart from them is counted from the model's sizes.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

# a product with a side of no more is an adapter's
THIN = 256
# by a kernel's name, the first that fits
_NAMES = (
    ("attention", r"sdpa|flash|fmha|attention|cudnn"),
    ("unpack the weights", r"dequant|unpack|^changed|^weight_times"),
    ("round to float8", r"quantize|fp8|^fourbit_|^rows$|^block_highs"),
    ("parts of dx, thin branches of y", r"^combine"),
    ("scales of rows and columns", r"^columns"),
    ("small tensors of MAP and DoRA", r"^(gram|finish|pull|factors)$"),
    ("norms", r"rms_?norm|layer_?norm"),
    ("rotary", r"rope|rotary"),
    ("activation", r"swiglu|silu|geglu"),
    ("cross-entropy", r"cross_entropy|nll|softmax"),
    ("optimizer", r"multi_tensor|adam|lpnorm"),
    ("thin products, two at once", r"^visit_"),
    ("products", r"nvjet|gemm|cutlass|splitK|gemv"),
)


@dataclass
class Class:
    ms: float = 0.0
    launches: int = 0
    flops: float = 0.0  # in bfloat16
    fp8_flops: float = 0.0
    bytes: float = 0.0
    kernels: dict[str, float] = field(default_factory=lambda: defaultdict(float))


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of this card, measured: FLOP/s and bytes/s."""

    bfloat16: float
    fp8: float
    memory: float


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a Llama's step."""

    tokens: int
    length: int
    hidden: int
    inner: int
    layers: int
    vocab: int


def measured_rates() -> Rates:
    """Random bfloat16 numbers: zeros multiply faster."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    bfloat16 = 2 * 8192**3 / seconds(lambda: a @ b)
    one = torch.ones(8192, 1, device="cuda")
    codes = [t.to(torch.float8_e4m3fn) for t in (a, b)]
    try:
        fp8 = 2 * 8192**3 / seconds(
            lambda: torch._scaled_mm(
                codes[0], codes[1].t(), scale_a=one, scale_b=one.t(), out_dtype=torch.bfloat16, use_fast_accum=True
            )
        )  # fmt: skip
    except RuntimeError:  # a card without
        fp8 = bfloat16
    return Rates(bfloat16=bfloat16, fp8=fp8, memory=copy_rate())


def copy_rate() -> float:
    """Bytes/s of a copy of 2 GiB, read and written."""
    large = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(large)
    return 2 * large.nbytes / seconds(lambda: other.copy_(large))


def seconds(work: Any, repeats: int = 20) -> float:
    """The median of single runs, by events on the device."""
    for _ in range(3):
        work()
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / 1000)
    return statistics.median(found)


def replayed(launches: Sequence[Callable[[], object]]) -> float:
    """Seconds of one."""
    for launch in launches:  # compiled before the capture
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    return seconds(graph.replay) / len(launches)


def classes(events: Iterable[Any], sizes: Sizes, steps: int) -> dict[str, Class]:
    """Of a profile with shapes over so many steps; figures are of one."""
    found: dict[str, Class] = defaultdict(Class)
    for event in events:
        kernels = [k for k in event.kernels or () if not k.name.startswith(("Memset", "Memcpy"))]
        product = _product(event)
        for kernel in kernels:
            name = _class_of(kernel.name, product, sizes)
            found[name].ms += kernel.duration / 1000 / steps
            found[name].launches += 1
            found[name].kernels[kernel.name[:90]] += kernel.duration / 1000 / steps
        if kernels and product is not None:
            _count(found[_class_of(kernels[-1].name, product, sizes)], event.name, product, steps)
    for each in found.values():
        each.launches = round(each.launches / steps)
    for name, bytes_ in _block_bytes(sizes).items():
        if name in found:
            found[name].bytes = bytes_
    if "attention" in found:  # causal: half the pairs; forward 4 a pair and width, backward 10
        found["attention"].flops = 7 * sizes.tokens * sizes.length * sizes.hidden * sizes.layers
    return found


def table(found: dict[str, Class], rates: Rates) -> str:
    lines = [
        f"limits measured here: bfloat16 {rates.bfloat16 / 1e12:.0f} TFLOP/s, fp8 {rates.fp8 / 1e12:.0f} TFLOP/s, "
        f"memory {rates.memory / 1e12:.2f} TB/s",
        f"{'class':<34}{'ms':>9}{'launches':>10}{'limit ms':>10}{'of it':>8}",
    ]
    for name, each in sorted(found.items(), key=lambda item: -item[1].ms):
        limit = limit_ms(each, rates)
        said = f"{limit:10.2f}{limit / each.ms:8.0%}" if limit else f"{'not counted':>18}"
        lines.append(f"{name:<34}{each.ms:9.2f}{each.launches:10d}{said}")
    total, least = sum(c.ms for c in found.values()), sum(limit_ms(c, rates) for c in found.values())
    lines.append(
        f"{'all':<34}{total:9.2f}{sum(c.launches for c in found.values()):10d}{least:10.2f}{least / total:8.0%}"
    )
    return "\n".join(lines)


def limit_ms(each: Class, rates: Rates) -> float:
    """The larger of arithmetic and bytes; 0 where nothing was counted."""
    arithmetic = each.flops / rates.bfloat16 + each.fp8_flops / rates.fp8
    return 1000 * max(arithmetic, each.bytes / rates.memory)


def _product(event: Any) -> tuple[int, int, int] | None:
    """(rows, inner, columns) of a matrix product."""
    at = {"aten::mm": 0, "aten::_scaled_mm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::bmm": 0}.get(
        event.name
    )
    shapes: Sequence[Sequence[int]] = event.input_shapes
    if at is None or len(shapes) < at + 2 or len(shapes[at]) < 2 or len(shapes[at + 1]) < 2:
        return None
    (*_, rows, inner), columns = shapes[at], shapes[at + 1][-1]
    return int(rows), int(inner), int(columns)


def _count(into: Class, operator: str, product: tuple[int, int, int], steps: int) -> None:
    rows, inner, columns = product
    width = 1 if operator == "aten::_scaled_mm" else 2
    flops = 2.0 * rows * inner * columns / steps
    if width == 1:
        into.fp8_flops += flops
    else:
        into.flops += flops
    out = 2 * rows * columns * (2 if "add" in operator else 1)
    into.bytes += (width * (rows * inner + inner * columns) + out) / steps


def _class_of(kernel: str, product: tuple[int, int, int] | None, sizes: Sizes) -> str:
    if product is not None:
        if min(product) <= THIN:
            return "thin products"
        return "products of the head" if sizes.vocab in product else "products with the weights"
    for name, pattern in _NAMES:
        if re.search(pattern, kernel, re.IGNORECASE):
            return name
    if re.search(r"reduce|dot", kernel):
        return "sums"
    return "additions, casts and the rest"


def _block_bytes(sizes: Sizes) -> dict[str, float]:
    """bfloat16, each array once: forward and backward of all blocks, nf4 with one byte a block of 64 for scales."""
    h, i, every = sizes.hidden, sizes.inner, sizes.tokens * sizes.layers
    weights = sizes.layers * (4 * h * h + 3 * h * i)
    return {
        "norms": every * 2 * (2 + 3) * 2 * h,
        "rotary": every * 2 * 4 * 2 * h,
        "activation": every * (3 + 5) * 2 * i,
        "unpack the weights": 2 * weights * (0.5 + 1 / 64 + 2),
        # each weight in both orders; x of four nodes and dy of seven linears, read in bfloat16
        "round to float8": 2 * weights * (0.5 + 1 / 64 + 1) + every * (8 * h + 3 * i) * (2 + 1),
        "cross-entropy": sizes.tokens * sizes.vocab * 2 * 2,
        "thin products, two at once": every * (5 * h + 2 * i) * 2,
    }
