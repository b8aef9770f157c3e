"""Which frozen linears multiply in fp8 (`quantization.compute: fp8`), and can this GPU? Asked once, before training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from decompft.adapters.base import Adapter
from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.frozen.dense import DenseLinear
from decompft.adapters.frozen.fp8_products import ALIGN, Fp8Products, fits_fp8
from decompft.adapters.kernels.fp8 import reason_without_triton
from decompft.launcher.errors import PlanError
from decompft.launcher.fp8_layers import INSTEAD, MIN_CAPABILITY, skipped
from decompft.launcher.recipe import QuantizationSection


def use_fp8(hf: Any, quantization: QuantizationSection, device: torch.device) -> str:
    """Give every frozen linear that can its fp8 products; "" for another compute, else what multiplies how, in words.

    Raises:
        PlanError: the GPU, or this torch on it, cannot.
        AdapterError: a pattern of `fp8_skip` matches nothing.
    """
    if quantization.compute != "fp8":
        return ""
    if device.type == "cuda":
        refuse_gpu(device)
    linears = dict(_linears(hf))
    named = skipped(list(linears), quantization.fp8_skip)
    odd = [n for n, (base, _) in linears.items() if n not in named and not fits_fp8(base)]
    own = [n for n, (_, its_own) in linears.items() if its_own and n not in named and n not in odd]
    left = {*named, *odd, *own}
    products = Fp8Products()
    for name, (base, _) in linears.items():
        if name not in left:
            base.products = products
    why = reason_without_triton(device)
    how = "emulated on a CPU" if device.type == "cpu" else "torch._scaled_mm, quantized by " + (
        f"torch ({why})" if why else "Triton")  # fmt: skip
    reasons = (
        (named, "named by quantization.fp8_skip"),
        (odd, f"a size that is no multiple of {ALIGN}"),
        (own, "their method multiplies with a changed weight"),
    )
    apart = [f"bfloat16 in {len(names)} ({text}: {_some(names)})" for names, text in reasons if names]
    return "; ".join(
        [f"fp8 products in {len(linears) - len(left)} of {len(linears)} linears ({how})", *apart]
    )


def refuse_gpu(device: torch.device) -> None:
    """One small product on the GPU beside its exact value.

    Raises:
        PlanError: the card has no fp8, torch refuses row-wise scales on it, or the numbers are wrong.
    """
    found = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    if found < MIN_CAPABILITY:
        needs = ".".join(map(str, MIN_CAPABILITY))
        raise PlanError(
            f"quantization.compute: fp8 needs a GPU of compute capability {needs} or higher, "
            f"{name} has {found[0]}.{found[1]}",
            INSTEAD,
        )
    try:
        error = product_error(device)
    except RuntimeError as refused:
        first = str(refused).partition("\n")[0]
        raise PlanError(f"quantization.compute: fp8: torch refuses on {name}: {first}", INSTEAD) from refused
    if not error < 0.1:
        raise PlanError(f"quantization.compute: fp8: a product on {name} is wrong by {error:.0%}", INSTEAD)


def product_error(device: torch.device) -> float:
    """Relative error of both products of a layer with random weights: 0.04 when right."""
    draw = torch.Generator().manual_seed(0)
    x, g, weight = (torch.randn(size, generator=draw).bfloat16() for size in ((48, 128), (48, 64), (64, 128)))
    layer = DenseLinear(128, 64, dtype=torch.bfloat16, bias_dtype=None)
    layer.products = Fp8Products()
    storage = (weight.to(device),)
    errors = []
    for found, exact in (
        (layer.product(x.to(device), storage, None), x.double() @ weight.double().T),
        (layer.product_back(g.to(device), storage, None), g.double() @ weight.double()),
    ):
        errors.append(float((found.cpu().double() - exact).norm() / exact.norm()))
    return max(errors)


def _linears(hf: Any) -> Iterator[tuple[str, tuple[FrozenLinear, bool]]]:
    """Each frozen linear under the name that the model has for it, and whether its method does its own product."""
    under = {
        id(m.base): (name, not m.uses_products) for name, m in hf.named_modules() if isinstance(m, Adapter)
    }
    for name, module in hf.named_modules():
        if isinstance(module, FrozenLinear):
            plain, its_own = under.get(id(module), (name, False))
            yield plain, (module, its_own)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
