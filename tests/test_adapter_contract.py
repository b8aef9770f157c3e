"""What every adapter must hold over every frozen base, whatever its formula."""

import copy

import pytest
import torch

from decompft.adapters.base import Adapter
from decompft.adapters.formats import FORMAT_SPECS
from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.frozen.dense import DenseLinear
from decompft.adapters.frozen.fourbit import Fp4Linear, Nf4Linear
from decompft.adapters.frozen.fp8 import Fp8Linear
from decompft.adapters.frozen.int8 import Int8Linear
from decompft.adapters.inject import _adapter_class
from decompft.adapters.spec import ADAPTER_SPECS, AdapterConfig

OUT, IN, RANK = 24, 128, 4
BASES = {
    "dense-fp32": lambda: DenseLinear(IN, OUT, dtype=torch.float32, bias_dtype=torch.float32),
    "dense-bf16": lambda: DenseLinear(IN, OUT, dtype=torch.bfloat16, bias_dtype=None),
    "nf4": lambda: Nf4Linear(IN, OUT, block_size=64, double_quant=False, bias_dtype=torch.float32),
    "nf4-dq": lambda: Nf4Linear(IN, OUT, block_size=64, double_quant=True, bias_dtype=None),
    "nf4-dq-128": lambda: Nf4Linear(IN, OUT, block_size=128, double_quant=True, bias_dtype=None),
    "fp4": lambda: Fp4Linear(IN, OUT, block_size=64, double_quant=False, bias_dtype=torch.float32),
    "fp4-dq": lambda: Fp4Linear(IN, OUT, block_size=64, double_quant=True, bias_dtype=None),
    "int8": lambda: Int8Linear(IN, OUT, bias_dtype=torch.float32),
    "int8-outliers": lambda: Int8Linear(IN, OUT, outlier_threshold=2.0, bias_dtype=torch.float32),
    "fp8": lambda: Fp8Linear(IN, OUT, bias_dtype=torch.float32),
}
CASES = [(m, b) for m in ADAPTER_SPECS for b in BASES]
# all but the base that rounds its input, too: its product is no product with one weight
EXACT = [(m, b) for m, b in CASES if b != "int8-outliers"]


def make_base(name: str, weight: torch.Tensor) -> FrozenLinear:
    base = BASES[name]()
    with torch.no_grad():
        for parameter, rows in zip(base.storage(), base.pack(weight), strict=True):
            parameter.copy_(rows)
        if base.bias is not None:
            base.bias.copy_(torch.linspace(-1, 1, OUT))
    return base


def make_adapter(method: str, base: FrozenLinear, *, dropout: float = 0.0, **options: object) -> Adapter:
    spec = ADAPTER_SPECS[method]
    config = AdapterConfig(
        method=method, rank=RANK, alpha=8.0, dropout=dropout, options=spec.options(**options)
    )
    adapter: Adapter = _adapter_class(config)(base, config)
    norm = torch.linalg.norm(base.dense(torch.float64)).item()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in adapter.initial_values(generator, {"frobenius_norm": norm}).items():
            getattr(adapter, name).copy_(value)
    return adapter


def trained_away_from_start(adapter: Adapter) -> Adapter:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters(recurse=False):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return adapter


@pytest.fixture
def weight() -> torch.Tensor:
    return 0.05 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(3))


def test_every_format_is_here():
    here = {f"{type(b).__module__}:{type(b).__name__}" for b in (make() for make in BASES.values())}
    assert here == {spec.impl for spec in FORMAT_SPECS.values()}


@pytest.mark.parametrize(("method", "base_name"), CASES)
def test_starts_as_its_base(method, base_name, weight, x):
    base = make_base(base_name, weight)
    adapter = make_adapter(method, base)
    # MAP divides by N(W) + eps: equal up to eps / N(W)
    assert torch.allclose(adapter(x), base(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "base_name"), CASES)
def test_only_the_specs_tensors_train(method, base_name, weight, x):
    adapter = trained_away_from_start(make_adapter(method, make_base(base_name, weight)))
    adapter(x).square().sum().backward()
    with_gradient = {n for n, p in adapter.named_parameters() if p.grad is not None}
    assert with_gradient == set(ADAPTER_SPECS[method].tensors(OUT, IN, RANK))


@pytest.mark.parametrize("method", ADAPTER_SPECS)
def test_parameter_count_is_the_specs(method, weight):
    adapter = make_adapter(method, make_base("dense-fp32", weight))
    count = sum(p.numel() for p in adapter.parameters(recurse=False))
    assert count == ADAPTER_SPECS[method].num_params(OUT, IN, RANK)


@pytest.mark.parametrize("method", ADAPTER_SPECS)
def test_only_the_specs_zeros_have_no_slope_at_the_start(method, weight, x):
    adapter = make_adapter(method, make_base("nf4", weight))
    adapter(x).sin().sum().backward()
    zero = {n for n, p in adapter.named_parameters(recurse=False) if not p.grad.any()}
    assert zero == set(ADAPTER_SPECS[method].zero_grad_at_start)


@pytest.mark.parametrize(("method", "base_name"), EXACT)
def test_merged_weight_reproduces_the_forward(method, base_name, weight, x):
    adapter = trained_away_from_start(make_adapter(method, make_base(base_name, weight)))
    merged = adapter.merged(adapter.base.dense(torch.float32))
    y = torch.nn.functional.linear(x, merged, adapter.base.bias)
    assert torch.allclose(adapter(x), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "base_name"), CASES)
def test_gradients_match_finite_differences(method, base_name, weight, x):
    """At B != 0, against central differences of the same formula in float64."""
    adapter = trained_away_from_start(make_adapter(method, make_base(base_name, weight)))
    probe = torch.randn(3, 5, OUT, generator=torch.Generator().manual_seed(4))
    x = x.requires_grad_(True)
    (adapter(x) * probe).sum().backward()
    twin = copy.deepcopy(adapter).double()
    dense = adapter.base.dense(torch.float64)
    bias = 0 if adapter.base.bias is None else adapter.base.bias.double()

    def value(t: torch.Tensor) -> torch.Tensor:
        p, q, _ = twin.scales(*twin.trained())
        p = 1.0 if p is None else p
        y = p * (t @ dense.T) + q * ((t @ twin.A.T) @ twin.B.T) + bias
        return (y * probe.double()).sum()

    step = 1e-5
    with torch.no_grad():
        for name, parameter in twin.named_parameters(recurse=False):
            flat = parameter.view(-1)
            for index in {0, flat.numel() // 2, flat.numel() - 1}:
                before = flat[index].item()
                flat[index] = before + step
                up = value(x.double())
                flat[index] = before - step
                down = value(x.double())
                flat[index] = before
                slope = (up - down) / (2 * step)
                found = getattr(adapter, name).grad.view(-1)[index]
                assert torch.allclose(found.double(), slope, rtol=2e-4, atol=2e-3), name
    exact = torch.autograd.grad(value(x64 := x.detach().double().requires_grad_(True)), x64)[0]
    assert torch.allclose(x.grad.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "base_name"), [(m, b) for m, b in EXACT if not b.startswith("dense")])
def test_quantizing_the_base_costs_what_the_quantizer_costs(method, base_name, weight, x):
    """The adapter over the quantized base is the adapter over the dequantized weight, nothing worse."""
    quantized = make_base(base_name, weight)
    over_packed = trained_away_from_start(make_adapter(method, quantized))
    dequantized = make_base("dense-fp32", quantized.dense(torch.float32))
    dequantized.bias = quantized.bias
    over_dense = copy.deepcopy(over_packed)
    over_dense.base = dequantized
    assert torch.allclose(over_packed(x), over_dense(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "base_name"), CASES)
def test_state_round_trip(method, base_name, weight, x):
    adapter = trained_away_from_start(make_adapter(method, make_base(base_name, weight)))
    other = make_adapter(method, make_base(base_name, torch.zeros_like(weight) + 1))
    other.load_state_dict(adapter.state_dict())
    assert torch.equal(adapter(x), other(x))


@pytest.mark.parametrize("method", ADAPTER_SPECS)
def test_dropout_acts_on_the_thin_branch_only(method, weight, x):
    """At the start the update is 0, so that whatever is dropped the layer still equals its base."""
    base = make_base("nf4", weight)
    adapter = make_adapter(method, base, dropout=0.5).train()
    assert torch.allclose(adapter(x), base(x), rtol=1e-5, atol=1e-5)
    trained_away_from_start(adapter)
    torch.manual_seed(0)
    first = adapter(x)
    assert not torch.allclose(first, adapter(x))
    adapter.eval()
    assert torch.equal(adapter(x), adapter(x))


@pytest.mark.parametrize("method", ADAPTER_SPECS)
def test_dropout_gradient_uses_the_dropped_input(method, weight, x):
    adapter = trained_away_from_start(
        make_adapter(method, make_base("dense-fp32", weight), dropout=0.5)
    ).train()
    torch.manual_seed(5)
    adapter(x).square().sum().backward()
    torch.manual_seed(5)
    dropped = torch.nn.functional.dropout(x, 0.5)
    twin = copy.deepcopy(adapter)
    twin.zero_grad()
    p, q, _ = twin.scales(*twin.trained())  # the same expression in plain autograd
    y = (1.0 if p is None else p) * (x @ adapter.base.dense(torch.float32).T) + q * (
        (dropped @ twin.A.T) @ twin.B.T
    )
    (y + adapter.base.bias).square().sum().backward()
    for name, parameter in twin.named_parameters(recurse=False):
        assert torch.allclose(getattr(adapter, name).grad, parameter.grad, rtol=1e-3, atol=1e-3), name


@pytest.mark.parametrize("base_name", BASES)
def test_no_dense_gradient_and_no_saved_dense_weight(base_name, weight, x):
    """What autograd keeps for one layer is x, the thin product and the packed storage itself."""
    adapter = trained_away_from_start(make_adapter("map", make_base(base_name, weight)))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapter(x.requires_grad_(True))
    own = {t.data_ptr() for t in (*adapter.base.storage(), *adapter.parameters())}
    dense = [
        t for t in saved if t.numel() >= OUT * IN and t.data_ptr() not in own and t.data_ptr() != x.data_ptr()
    ]
    assert not dense
