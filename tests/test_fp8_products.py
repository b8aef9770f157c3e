"""`compute: fp8`: what is rounded, and by how much at most, for every format; a GPU's product beside the CPU's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from decompft.adapters.frozen import fp8_products
from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.frozen.dense import DenseLinear
from decompft.adapters.frozen.fourbit import FourBitLinear, Fp4Linear, Nf4Linear
from decompft.adapters.frozen.fp8 import Fp8Linear
from decompft.adapters.frozen.fp8_products import Fp8Products, fits_fp8
from decompft.adapters.frozen.int8 import Int8Linear
from decompft.adapters.frozen.linear import Member, frozen_linear, frozen_linears
from decompft.adapters.inject import make_adapter
from decompft.adapters.kernels.fp8 import Rows, fourbit_columns, fourbit_rows, quantize_rows
from decompft.adapters.spec import ADAPTER_SPECS, AdapterConfig

OUT, IN, TOKENS = 48, 128, 21
FORMATS = {
    "dense-fp32": lambda: DenseLinear(IN, OUT, dtype=torch.float32, bias_dtype=None),
    "dense-bf16": lambda: DenseLinear(IN, OUT, dtype=torch.bfloat16, bias_dtype=None),
    "nf4": lambda: Nf4Linear(IN, OUT, block_size=64, double_quant=False, bias_dtype=None),
    "nf4-dq": lambda: Nf4Linear(IN, OUT, block_size=64, double_quant=True, bias_dtype=None),
    "nf4-dq-128": lambda: Nf4Linear(IN, OUT, block_size=128, double_quant=True, bias_dtype=None),
    "fp4-dq": lambda: Fp4Linear(IN, OUT, block_size=64, double_quant=True, bias_dtype=None),
    "int8": lambda: Int8Linear(IN, OUT, bias_dtype=None),
    "fp8": lambda: Fp8Linear(IN, OUT, bias_dtype=None),
}
FOUR_BIT = [name for name in FORMATS if name.startswith(("nf4", "fp4"))]
SCALES = {"none": None, "one": torch.tensor([1.3]), "rows": torch.linspace(-0.5, 2, OUT).view(-1, 1)}
# half a step of three bits of mantissa; near 0, half of e4m3's smallest number, 2^-9, in units of the scale
RELATIVE, ABSOLUTE = 2.0**-4, 2.0**-10
BFLOAT16 = 2.0**-8  # half a step of an output
FLOAT32 = 2.0**-20  # sums and quotients


def filled(name: str) -> FrozenLinear:
    made = FORMATS[name]()
    rows = 0.02 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
    rows[3] = 0
    rows[:, 5] *= 30  # an input whose weights are extreme
    rows *= torch.logspace(-2, 1, OUT)[:, None]
    with torch.no_grad():
        for parameter, values in zip(made.storage(), made.pack(rows), strict=True):
            parameter.copy_(values)
    made.products = Fp8Products()
    return made


def tokens(width: int, seed: int = 1) -> Tensor:
    made = torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(seed))
    made *= torch.logspace(-4, 2, TOKENS)[:, None]
    made[2] = 0
    return made.bfloat16()


def rounding(values: Tensor, scale: Tensor) -> Tensor:
    """The most by which a row's numbers may be off, in float64."""
    near_zero = ABSOLUTE * scale.double()[:, None].expand(values.shape)
    return torch.maximum(RELATIVE * values.abs(), near_zero) * (1 + FLOAT32)


def values(rows: Rows) -> Tensor:
    return rows.codes.double() * rows.scale.double()[:, None]


def assert_near_product(found: Tensor, left: Tensor, off: Tensor, right: Tensor, right_off: Tensor) -> None:
    """found = left right^T, where both factors are off by so much at most."""
    exact, size = left @ right.T, (left.abs() + off) @ (right.abs() + right_off).T
    bound = size - left.abs() @ right.abs().T + (BFLOAT16 + FLOAT32) * size
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("with_times", [False, True])
def test_rows_are_within_half_a_step(dtype: torch.dtype, with_times: bool) -> None:
    x = tokens(IN).to(dtype)
    times = torch.linspace(-2, 2, IN) if with_times else None
    exact = x.double() if times is None else x.double() * times.double()
    found = quantize_rows(x, times)
    torch.testing.assert_close(found.scale.double(), exact.abs().amax(1).clamp_min(1e-30) / 448)
    assert ((values(found) - exact).abs() <= rounding(exact, found.scale) + 1e-6 * exact.abs()).all()
    assert (values(found)[2] == 0).all()


def test_what_is_not_finite_stays_so() -> None:
    x = tokens(IN)
    x[0, 3], x[1, 4] = torch.nan, torch.inf
    found = values(quantize_rows(x))
    assert found[:2].isnan().any(1).all() and found[2:].isfinite().all()
    layer = filled("nf4-dq")
    y = layer.product(x, layer.storage(), None)
    assert not y[:2].isfinite().any() and y[2:].isfinite().all()


def test_surplus_rows_are_zero() -> None:
    found = quantize_rows(tokens(IN), pad_to=32)
    assert found.codes.shape == (32, IN) and not values(found)[TOKENS:].any()


@pytest.mark.parametrize("name", FOUR_BIT)
def test_codes_become_fp8_as_their_weight_would(name: str) -> None:
    layer = filled(name)
    assert isinstance(layer, FourBitLinear)
    used, given = layer.dense(torch.float64), layer.four_bit(layer.storage())
    rows, columns = fourbit_rows(given), fourbit_columns(given)
    for found, exact in ((rows, used), (columns, used.T)):
        assert found.codes.is_contiguous() and found.codes.shape == exact.shape
        assert ((values(found) - exact).abs() <= rounding(exact, found.scale) + 1e-6 * exact.abs()).all()
        assert (found.codes.float().abs() <= 448).all()
    # a row's largest block has a code of 1: the bound is met
    torch.testing.assert_close(
        rows.scale.double(), used.abs().amax(1).clamp_min(1e-30) / 448, rtol=1e-5, atol=0
    )
    # no input has a scale that its block's extreme does not ask for
    high = used.abs().amax(0).view(-1, layer.block_size).amax(1).repeat_interleave(layer.block_size)
    torch.testing.assert_close(columns.scale.double(), high / 448, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scale", SCALES)
def test_forward_product(name: str, scale: str) -> None:
    layer, x, s = filled(name), tokens(IN), SCALES[scale]
    used = layer.dense(torch.float64)
    off = rounding(used, used.abs().amax(1) / 448)
    if name.startswith("dense-fp32") or name in ("int8", "fp8"):
        off += 2.0**-8 * (used.abs() + off)  # by way of bfloat16
    times = 1 if s is None else s.double()
    found = layer.product(x, layer.storage(), s)
    assert found.dtype == x.dtype
    exact_x = x.double()
    x_off = rounding(exact_x, exact_x.abs().amax(1) / 448)
    assert_near_product(found, exact_x, x_off, used * times, off * (times if s is None else times.abs()))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scale", SCALES)
def test_backward_product(name: str, scale: str) -> None:
    layer, g, s = filled(name), tokens(OUT), SCALES[scale]
    used = layer.dense(torch.float64)
    found = layer.product_back(g, layer.storage(), s)
    columns = layer.fp8_columns(layer.storage())
    off = rounding(used.T, columns.scale)
    if name not in FOUR_BIT:
        off += 2.0**-8 * (used.T.abs() + off)
    # the rows' scale is given to g, and only then is g rounded
    scaled = g.double() if s is None else g.double() * s.double().view(-1)
    assert_near_product(found, scaled, rounding(scaled, scaled.abs().amax(1) / 448), used.T, off)


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_that_is_given_is_the_one(name: str) -> None:
    layer, x, g = filled(name), tokens(IN), tokens(OUT)
    weight = layer.dense(torch.bfloat16)
    for found, given in (
        (layer.product(x, layer.storage(), None), layer.product(x, layer.storage(), None, weight)),
        (layer.product_back(g, layer.storage(), None), layer.product_back(g, layer.storage(), None, weight)),
    ):
        torch.testing.assert_close(given, found, rtol=2.0**-6, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_the_node_s_gradients_are_those_of_its_products(name: str) -> None:
    """frozen_linear in fp8: its output and input gradient are the products above, bit for bit."""
    layer, x, dy = filled(name), tokens(IN).requires_grad_(True), tokens(OUT)
    y = frozen_linear(x, layer)
    y.backward(dy)
    assert torch.equal(y, layer.product(x.detach(), layer.storage(), None))
    assert x.grad is not None and torch.equal(x.grad, layer.product_back(dy, layer.storage(), None))


def adapted(layer: FrozenLinear, method: str):
    torch.manual_seed(0)
    options = ADAPTER_SPECS[method].options()
    adapter = make_adapter(
        layer, AdapterConfig(method=method, rank=4, alpha=8.0, dropout=0.0, options=options)
    )
    used = layer.dense(torch.float64)
    facts = {
        "frobenius_norm": torch.linalg.norm(used).item(),
        "row_norms": torch.linalg.norm(used, dim=1).float(),
        "column_norms": torch.linalg.norm(used, dim=0).float(),
        "zero_fraction": 0.0,
    }
    values = adapter.initial_values(torch.Generator().manual_seed(0), facts)
    with torch.no_grad():
        for name, value in (values | adapter.derived()).items():
            getattr(adapter, name).copy_(value)
        for parameter in adapter.parameters(recurse=False):
            parameter += 0.05 * torch.randn(parameter.shape)
    return adapter


def mild(name: str) -> FrozenLinear:
    """A weight without extremes, whose gradients compare by norm."""
    made = FORMATS[name]()
    rows = 0.1 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter, packed in zip(made.storage(), made.pack(rows), strict=True):
            parameter.copy_(packed)
    return made


def test_linears_of_one_x_round_it_once_and_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded: list[int] = []
    monkeypatch.setattr(
        fp8_products, "quantize_rows", lambda x, *a, **k: rounded.append(id(x)) or quantize_rows(x, *a, **k)
    )
    bases, x = [filled(name) for name in ("nf4", "int8", "nf4-dq")], tokens(IN)
    alone = [frozen_linear(x, base) for base in bases]
    shared = Fp8Products()
    for base in bases:
        base.products = shared
    rounded.clear()
    ys = frozen_linears(x, [Member(base) for base in bases])
    assert len(rounded) == 1 and all(torch.equal(a, b) for a, b in zip(alone, ys, strict=True))
    assert shared._last is None
    # an x that was written to in between is another
    with torch.no_grad():
        first = bases[0].product(x, bases[0].storage(), None)
        x += 1
        again = bases[0].product(x, bases[0].storage(), None)
    assert not torch.equal(first, again)


@pytest.mark.parametrize("name", ["dense-bf16", "nf4-dq", "int8", "fp8"])
@pytest.mark.parametrize("method", ["lora", "map", "dora", "ssb", "ia3", "delora"])
def test_every_method_s_gradients_are_near_those_of_the_dequantized_weight(method: str, name: str) -> None:
    """By norm. Each factor of a product is off by at most RELATIVE of itself, and a slope of a row's or the
    whole weight's scale is an inner product with such a product; dy leans on y, so that it does not cancel."""
    x = torch.randn(256, IN, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(256, OUT, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        dy = adapted(mild(name), method)(x) + 0.1 * noise
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        layer = mild(name)
        if dtype == torch.bfloat16:
            layer.products = Fp8Products()
        adapter, leaf = adapted(layer, method), x.to(dtype, copy=True).requires_grad_(True)
        y = adapter(leaf)
        y.backward(dy.to(dtype))
        grads.append([y, leaf.grad, *(p.grad for p in adapter.parameters(recurse=False))])
    bound = (1 + RELATIVE) ** 2 - 1 + 4 * BFLOAT16
    for exact, found in zip(*grads, strict=True):
        apart = torch.linalg.norm(found.double() - exact.double()) / torch.linalg.norm(exact.double())
        assert apart <= bound, (tuple(exact.shape), float(apart))


def test_sizes_that_a_gpu_does_not_take() -> None:
    assert fits_fp8(mild("fp8"))
    assert not fits_fp8(Fp8Linear(120, 32, bias_dtype=None)) and not fits_fp8(
        Fp8Linear(32, 120, bias_dtype=None)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scale", SCALES)
def test_a_gpu_multiplies_as_the_cpu_does(name: str, scale: str) -> None:
    layer, x, g, s = filled(name), tokens(IN), tokens(OUT), SCALES[scale]
    there = filled(name).cuda()
    on_gpu = None if s is None else s.cuda()
    for found, expected in (
        (there.product(x.cuda(), there.storage(), on_gpu), layer.product(x, layer.storage(), s)),
        (there.product_back(g.cuda(), there.storage(), on_gpu), layer.product_back(g, layer.storage(), s)),
    ):
        # a code in the middle of two may be rounded the other way: rare, and up to an eighth of one of many factors
        size = torch.linalg.norm(expected.double(), dim=1)
        error = torch.linalg.norm(found.cpu().double() - expected.double(), dim=1)
        assert (error <= 5e-2 * size).all() and (error <= 5e-3 * size).double().mean() > 0.8


@pytest.mark.gpu
@pytest.mark.parametrize("name", FOUR_BIT)
@pytest.mark.parametrize("size", [(4096, 4096), (4096, 11008), (11008, 4096), (1024, 8192), (48, 192)])
def test_kernels_quantize_codes_as_torch_does(name: str, size: tuple[int, int]) -> None:
    out, in_ = size
    made = FORMATS[name]()
    if in_ % made.block_size:
        pytest.skip("blocks do not divide it")
    layer = type(made)(in_, out, block_size=made.block_size, double_quant=made.double_quant, bias_dtype=None)
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(0)) * 0.02
    storage = layer.pack(weight)
    here = layer.four_bit(storage)
    there = layer.four_bit(tuple(s.cuda() for s in storage))
    for quantize in (fourbit_rows, fourbit_columns):
        found, expected = quantize(there), quantize(here)
        torch.testing.assert_close(found.scale.cpu(), expected.scale, rtol=1e-6, atol=0)
        one, other = found.codes.cpu().float(), expected.codes.float()
        assert (one != other).float().mean() < 1e-3
        assert ((one - other).abs() <= 0.13 * other.abs() + 2.0**-9).all()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 16), (7, 48), (300, 4096), (64, 11008), (32, 28672)])
@pytest.mark.parametrize("with_times", [False, True])
def test_kernel_quantizes_rows_as_torch_does(shape: tuple[int, int], with_times: bool) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    times = torch.linspace(-2, 2, shape[1]) if with_times else None
    found = quantize_rows(x.cuda(), None if times is None else times.cuda())
    expected = quantize_rows(x, times)
    torch.testing.assert_close(found.scale.cpu(), expected.scale, rtol=1e-6, atol=0)
    one, other = found.codes.cpu().float(), expected.codes.float()
    assert (one != other).float().mean() < 1e-3
    assert ((one - other).abs() <= 0.13 * other.abs() + 2.0**-9).all()


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 17, 127, 256, 257, 8192])
@pytest.mark.parametrize("size", [(3072, 9216), (4096, 11008), (11008, 4096), (1024, 8192)])
def test_a_gpu_takes_any_number_of_tokens(size: tuple[int, int], num_tokens: int) -> None:
    out, in_ = size
    layer = DenseLinear(in_, out, dtype=torch.bfloat16, bias_dtype=None).cuda()
    layer.weight.data.normal_(std=0.02)
    layer.products = Fp8Products()
    x = torch.randn(num_tokens, in_, device="cuda", dtype=torch.bfloat16)
    exact = x.float() @ layer.weight.float().T
    found = layer.product(x, layer.storage(), None)
    assert found.shape == exact.shape and torch.linalg.norm(found - exact) <= 0.06 * torch.linalg.norm(exact)
    g = torch.randn(num_tokens, out, device="cuda", dtype=torch.bfloat16)
    back = layer.product_back(g, layer.storage(), None)
    exact = g.float() @ layer.weight.float()
    assert torch.linalg.norm(back - exact) <= 0.06 * torch.linalg.norm(exact)
