"""SSL, (IA)^3 and SSB against their equations, written out again in float64 (METHODS 2.3), and against peft."""

import pytest
import torch
from peft import IA3Config, get_peft_model
from test_adapter_contract import BASES, IN, OUT, config_of, make_adapter, make_base, trained_away_from_start
from torch import nn

from decompft.adapters.kernels.columns import times_columns
from decompft.adapters.spec import ADAPTER_SPECS

SCALED = ("ssl", "ia3", "ssb")


@pytest.fixture
def weight() -> torch.Tensor:
    return 0.05 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(7, IN, generator=torch.Generator().manual_seed(3))


def equation(adapter, W: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """l_out o (W (l_in o x)) + bias, one of both vectors or both."""
    l_in, l_out = (getattr(adapter, n, torch.ones(1)).double() for n in ("l_in", "l_out"))
    y = (W @ (l_in * x.double()).T).T * l_out
    return y if adapter.base.bias is None else y + adapter.base.bias.double()


@pytest.mark.parametrize("base_name", ["dense-fp32", "nf4-dq", "int8"])
@pytest.mark.parametrize("method", SCALED)
def test_forward_is_the_equation(method, base_name, weight, x):
    adapter = trained_away_from_start(make_adapter(method, make_base(base_name, weight)))
    y = equation(adapter, adapter.base.dense(torch.float64), x)
    # float32 sums over 128 products: 2**-24 * sqrt(128) relative, times a few
    assert torch.allclose(adapter(x).double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", SCALED)
def test_gradients_are_those_of_the_equation(method, weight, x):
    adapter = trained_away_from_start(make_adapter(method, make_base("nf4", weight)))
    adapter(x).sin().sum().backward()
    found = [p.grad.clone() for p in adapter.trained()]
    y = equation(adapter, adapter.base.dense(torch.float64), x)
    exact = torch.autograd.grad(y.sin().sum(), adapter.trained())
    for grad, other in zip(found, exact, strict=True):
        assert torch.allclose(grad, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", SCALED)
def test_starts_bit_for_bit_as_its_base(method, weight, x):
    base = make_base("nf4", weight)
    assert torch.equal(make_adapter(method, base)(x), base(x))


def test_the_slope_of_a_row_is_the_product_with_the_rounded_input(weight, x):
    """LLM.int8 rounds x in its product: d l_out is what came out of that, not what should have."""
    base = make_base("int8-outliers", weight)
    adapter = make_adapter("ia3", base)
    adapter(x).sum().backward()
    product = (base(x) - base.bias).sum(0)
    assert torch.allclose(adapter.l_out.grad, product, rtol=1e-4, atol=1e-5)
    unrounded = (x @ base.dense(torch.float32).T).sum(0)
    assert not torch.allclose(adapter.l_out.grad, unrounded, rtol=1e-4, atol=1e-5)


def test_ssb_has_one_scale_too_many(weight, x):
    adapter = trained_away_from_start(make_adapter("ssb", make_base("dense-fp32", weight)))
    before = adapter(x)
    with torch.no_grad():
        adapter.l_out *= 3
        adapter.l_in /= 3
    assert torch.allclose(adapter(x), before, rtol=1e-5, atol=1e-5)


def test_parameter_counts_of_the_paper():
    """Key, value and the first MLP matrix of RoBERTa-base: 0.44, 0.22 and 0.66 permil of 125M."""

    def count(method: str) -> int:
        spec, config = ADAPTER_SPECS[method], config_of(method)
        return 12 * sum(
            spec.num_params(out, in_, config) for out, in_ in [(768, 768), (768, 768), (3072, 768)]
        )

    assert {m: count(m) for m in SCALED} == {"ia3": 55_296, "ssl": 27_648, "ssb": 82_944}


def peft_layer(weight: torch.Tensor, bias: torch.Tensor | None, *, is_mlp: bool) -> nn.Module:
    linear = nn.Linear(IN, OUT, bias=bias is not None)
    linear.weight.data.copy_(weight)
    if bias is not None:
        linear.bias.data.copy_(bias)
    names = ["0"] if is_mlp else []
    return get_peft_model(nn.Sequential(linear), IA3Config(target_modules=["0"], feedforward_modules=names))


@pytest.mark.parametrize(("method", "is_mlp"), [("ia3", False), ("ssl", True)])
@pytest.mark.parametrize("base_name", [b for b in BASES if b.startswith("nf4")])
def test_outputs_gradients_and_merged_weight_are_pefts(method, is_mlp, base_name, weight, x):
    """peft's IA3 of a feed-forward module scales the input, which is SSL; without a bias the other is (IA)^3."""
    ours = trained_away_from_start(make_adapter(method, make_base(base_name, weight)))
    ours.base.bias = None
    dense = ours.base.dense(torch.float32)
    model = peft_layer(dense, None, is_mlp=is_mlp)
    layer = model.base_model.model[0]
    (vector,) = ours.trained()
    layer.ia3_l["default"].data.copy_(vector.view_as(layer.ia3_l["default"]))
    theirs = model(x)
    assert torch.allclose(ours(x), theirs, rtol=1e-5, atol=1e-6)
    ours(x).sin().sum().backward()
    theirs.sin().sum().backward()
    grad = layer.ia3_l["default"].grad.view(-1)
    assert torch.allclose(vector.grad, grad, rtol=1e-4, atol=1e-5)
    layer.merge()
    assert torch.allclose(ours.merged(dense), layer.base_layer.weight, rtol=1e-6, atol=1e-7)


def test_peft_scales_the_bias_and_the_paper_does_not(weight, x):
    ours = trained_away_from_start(make_adapter("ia3", make_base("dense-fp32", weight)))
    model = peft_layer(weight, ours.base.bias, is_mlp=False)
    model.base_model.model[0].ia3_l["default"].data.copy_(ours.l_out.view(-1, 1))
    difference = (ours.l_out - 1) * ours.base.bias
    assert torch.allclose(model(x) - ours(x), difference.expand(7, OUT), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", [(1,), (IN,)], ids=["number", "vector"])
def test_a_scale_is_not_rounded_to_the_dtype_of_what_it_scales(x, shape):
    """1.0055 in bfloat16 is 1.0078: what a scale has learned so far would be up to half as much again."""
    scale = torch.full(shape, 1.0055)
    x = x.bfloat16()
    exact = x.double() * scale.double()
    found = times_columns(x, scale)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.float().bfloat16())
    # rounded once: 2**-9 of each number either way, which is 0 on average
    assert abs((found.double() / x.double()).mean().item() - 1.0055) < 2**-9 / 4
    # float64, as the twin tests have it
    torch.testing.assert_close(times_columns(x.double(), scale.double()), exact, rtol=1e-15, atol=0)


@pytest.mark.parametrize("method", SCALED)
def test_scales_over_a_bfloat16_base_keep_what_bfloat16_has_no_number_for(method, weight, x):
    """Of the whole layer: the mean of many outputs shows what each one's own rounding hides."""
    x = x.repeat(20, 1).bfloat16()
    x += 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).bfloat16()
    adapter = make_adapter(method, make_base("dense-bf16", weight))
    start = adapter(x).detach().double()
    with torch.no_grad():
        for vector in adapter.trained():
            vector.fill_(1.0055)
    found = adapter(x).detach().double()
    ratio = (found * start).sum() / start.square().sum()
    assert ratio.item() == pytest.approx(1.0055 ** len(adapter.trained()), abs=5e-4)
