"""What every adapter must hold over every frozen base, whatever its formula."""

import copy
import dataclasses
from functools import partial

import pytest
import torch
from _pytest.mark import ParameterSet

from decompft.adapters.base import Adapter
from decompft.adapters.formats import FORMAT_SPECS
from decompft.adapters.frozen.base import FrozenLinear, weight_times
from decompft.adapters.frozen.dense import DenseLinear
from decompft.adapters.frozen.fourbit import Fp4Linear, Nf4Linear
from decompft.adapters.frozen.fp8 import Fp8Linear
from decompft.adapters.frozen.int8 import Int8Linear
from decompft.adapters.inject import make_adapter as adapter_of
from decompft.adapters.spec import ADAPTER_SPECS, AdapterConfig, spec_of

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
# every method at its defaults, and those options that change its formula: name -> (method, options)
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    **{name: (name, {}) for name in ADAPTER_SPECS},
    "rslora": ("lora", {"scaling": "rslora"}),
    "liera-exact": ("liera", {"order": "exact"}),
    "map-dora": ("map", {"over": "dora"}),
    "map-trilora": ("map", {"over": "trilora"}),
    "map-flora": ("map", {"over": "flora"}),
    "speclora-additive": ("speclora", {"spec_mode": "additive"}),
    "svft-banded": ("svft", {"pattern": "banded", "k": 6}),
    "pissa-exact": ("pissa", {"base": "exact"}),
}
CASES = [(v, b) for v in VARIANTS for b in BASES]
# in the quick tier these stand for all: the formats of one family differ in their own tests, not here
COMMON = {"dense-fp32", "nf4-dq", "int8-outliers"}
THOROUGH = {"lora", "map", "dora"}


def spread(cases: list[tuple[str, str]]) -> list[ParameterSet]:
    """All of them over the three tiers together."""
    return [
        pytest.param(v, b, marks=() if b in COMMON or v in THOROUGH else pytest.mark.slow) for v, b in cases
    ]


# the formula has a part that is a constant to autograd, and moves under differences: their own tests have a twin
DETACHED = {"map-dora"}
# all but the base that rounds its input, too: its product is no product with one weight
EXACT = [(v, b) for v, b in CASES if b != "int8-outliers"]
# these do not start as their base, but near it: their own tests say how near
STARTS_ELSEWHERE: set[str] = {"pissa", "milora", "olora", "svft", "svft-banded"}
# no weight (out, in) is what they compute
NOT_MERGEABLE = {v for v, (m, _) in VARIANTS.items() if not ADAPTER_SPECS[m].mergeable}
# the update is not up (down x): dropout and gradients have tests of their own
OWN_FORWARD: set[str] = {"liera", "liera-exact", "hira"}


def has_thin_branch(variant: str) -> bool:
    config = config_of(variant)
    return spec_of(config).num_columns(OUT, IN, config) > 0


def make_base(name: str, weight: torch.Tensor) -> FrozenLinear:
    base = BASES[name]()
    with torch.no_grad():
        for parameter, rows in zip(base.storage(), base.pack(weight), strict=True):
            parameter.copy_(rows)
        if base.bias is not None:
            base.bias.copy_(torch.linspace(-1, 1, OUT))
    return base


def config_of(variant: str, *, dropout: float = 0.0, **options: object) -> AdapterConfig:
    method, chosen = VARIANTS[variant]
    made = ADAPTER_SPECS[method].options(**chosen, **options)
    return AdapterConfig(method=method, rank=RANK, alpha=8.0, dropout=dropout, options=made)


def keeps_output(variant: str) -> bool:
    config = config_of(variant)
    return spec_of(config).keeps_output(config)


# the slope of a scale per row is the product itself, which one base takes with a rounded input
SMOOTH = [(v, b) for v, b in CASES if v not in DETACHED and not (b == "int8-outliers" and keeps_output(v))]


def make_adapter(variant: str, base: FrozenLinear, *, dropout: float = 0.0, **options: object) -> Adapter:
    return start(adapter_of(base, config_of(variant, dropout=dropout, **options)))


def start(adapter: Adapter, weight: torch.Tensor | None = None) -> Adapter:
    """As loading does it: facts of the weight that is used, factors of the full-precision one.

    Args:
        weight: the full-precision one; default the one that is used.
    """
    used = adapter.base.dense(torch.float64)
    full = used.float() if weight is None else weight
    facts = {
        "frobenius_norm": torch.linalg.norm(used).item(),
        "row_norms": torch.linalg.norm(used, dim=1).float(),
        "column_norms": torch.linalg.norm(used, dim=0).float(),
        "zero_fraction": (used == 0).double().mean().item(),
    }
    if "full_weight" in spec_of(adapter.config).needs(adapter.config):
        facts |= adapter.facts_of(full, lambda kind, k, make: make(), torch.Generator().manual_seed(7))
    values = adapter.initial_values(torch.Generator().manual_seed(0), facts)
    with torch.no_grad():
        if adapter.rewrites_base:
            rows = adapter.base.pack(adapter.base_rows(full, 0, values))
            for parameter, packed in zip(adapter.base.storage(), rows, strict=True):
                parameter.copy_(packed)
        for name, value in (values | adapter.derived()).items():
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


def plain(
    adapter: Adapter, x: torch.Tensor, dense: torch.Tensor, dropped: torch.Tensor | None = None
) -> torch.Tensor:
    """The layer in plain operations that autograd sees, in the dtype of `x`, over the weight `dense`."""
    fixed = adapter.fixed()
    if adapter.reads_weight:
        noted = adapter.note(adapter.trained(), fixed, partial(weight_times, dense))
        fixed = (*fixed, *(noted if adapter.note_has_slope else (n.detach() for n in noted)))
    f = adapter.factors(adapter.trained(), fixed)
    y = (x if f.col is None else x * f.col) @ dense.T
    y = y if f.row is None else y * f.row
    if f.up is not None and f.down is not None:
        h = (x if dropped is None else dropped) @ f.down.T
        y = y + f.q * ((h.relu() if f.relu else h) @ f.up.T)
    for bias in (adapter.base.bias, f.bias):
        y = y if bias is None else y + bias.to(x.dtype)
    return y


@pytest.mark.parametrize(("variant", "base_name"), spread([c for c in CASES if c[0] not in STARTS_ELSEWHERE]))
def test_starts_as_its_base(variant, base_name, weight, x):
    base = make_base(base_name, weight)
    adapter = make_adapter(variant, base)
    # MAP divides by N(W) + eps: equal up to eps / N(W)
    assert torch.allclose(adapter(x), base(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("variant", "base_name"), spread(CASES))
def test_only_the_specs_tensors_train(variant, base_name, weight, x):
    adapter = trained_away_from_start(make_adapter(variant, make_base(base_name, weight)))
    adapter(x).square().sum().backward()
    with_gradient = {n for n, p in adapter.named_parameters() if p.grad is not None}
    assert with_gradient == set(spec_of(adapter.config).tensors(OUT, IN, adapter.config))


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensors_are_the_specs(variant, weight):
    adapter = make_adapter(variant, make_base("dense-fp32", weight))
    spec = spec_of(adapter.config)
    assert sum(p.numel() for p in adapter.trained()) == spec.num_params(OUT, IN, adapter.config)
    shapes = {n: tuple(b.shape) for n, b in adapter.named_buffers(recurse=False)}
    assert shapes.items() >= spec.buffers(OUT, IN, adapter.config).items()
    kept = {n: tuple(t.shape) for n, t in adapter.state_dict().items() if not n.startswith("base.")}
    assert kept == {**spec.tensors(OUT, IN, adapter.config), **spec.buffers(OUT, IN, adapter.config)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_specs_zeros_have_no_slope_at_the_start(variant, weight, x):
    adapter = make_adapter(variant, make_base("nf4", weight))
    adapter(x).sin().sum().backward()
    zero = {n for n, p in adapter.named_parameters(recurse=False) if not p.grad.any()}
    assert zero == set(spec_of(adapter.config).zero_grad_at_start(adapter.config))


@pytest.mark.parametrize(("variant", "base_name"), spread([c for c in EXACT if c[0] not in NOT_MERGEABLE]))
def test_merged_weight_reproduces_the_forward(variant, base_name, weight, x):
    adapter = trained_away_from_start(make_adapter(variant, make_base(base_name, weight)))
    merged = adapter.merged(adapter.base.dense(torch.float32))
    y = torch.nn.functional.linear(x, merged, adapter.merged_bias(adapter.base.bias))
    assert torch.allclose(adapter(x), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("variant", "base_name"), spread([c for c in SMOOTH if c[0] not in OWN_FORWARD]))
def test_gradients_match_finite_differences(variant, base_name, weight, x):
    """Away from the start, against central differences of the same formula in float64."""
    adapter = trained_away_from_start(make_adapter(variant, make_base(base_name, weight)))
    probe = torch.randn(3, 5, OUT, generator=torch.Generator().manual_seed(4))
    x = x.requires_grad_(True)
    (adapter(x) * probe).sum().backward()
    twin = copy.deepcopy(adapter).double()
    dense = adapter.base.dense(torch.float64)
    if twin.reads_weight and not twin.note_has_slope:  # constants of the pass stay what they were
        noted = twin.note(twin.trained(), twin.fixed(), partial(weight_times, dense))
        twin.note = lambda *_: noted

    def value(t: torch.Tensor) -> torch.Tensor:
        return (plain(twin, t, dense) * probe.double()).sum()

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
                assert torch.allclose(found.double(), slope, rtol=3e-4, atol=2e-3), name
    exact = torch.autograd.grad(value(x64 := x.detach().double().requires_grad_(True)), x64)[0]
    assert torch.allclose(x.grad.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("variant", "base_name"), spread([c for c in EXACT if not c[1].startswith("dense")]))
def test_quantizing_the_base_costs_what_the_quantizer_costs(variant, base_name, weight, x):
    """The adapter over the quantized base is the adapter over the dequantized weight, nothing worse."""
    quantized = make_base(base_name, weight)
    over_packed = trained_away_from_start(make_adapter(variant, quantized))
    dequantized = make_base("dense-fp32", quantized.dense(torch.float32))
    dequantized.bias = quantized.bias
    over_dense = copy.deepcopy(over_packed)
    over_dense.base = dequantized
    assert torch.allclose(over_packed(x), over_dense(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("variant", "base_name"), spread(CASES))
def test_state_round_trip(variant, base_name, weight, x):
    adapter = trained_away_from_start(make_adapter(variant, make_base(base_name, weight)))
    other = make_adapter(variant, make_base(base_name, torch.zeros_like(weight) + 1))
    other.load_state_dict(adapter.state_dict())
    assert torch.equal(adapter(x), other(x))


THIN = [v for v in VARIANTS if v not in OWN_FORWARD and has_thin_branch(v)]


@pytest.mark.parametrize("variant", THIN)
def test_dropout_acts_on_the_thin_branch_only(variant, weight, x):
    adapter = trained_away_from_start(make_adapter(variant, make_base("nf4", weight), dropout=0.5)).train()
    torch.manual_seed(0)
    first = adapter(x)
    assert not torch.allclose(first, adapter(x))
    adapter.eval()
    assert torch.equal(adapter(x), adapter(x))


@pytest.mark.parametrize("variant", [v for v in THIN if v not in STARTS_ELSEWHERE])
def test_dropout_leaves_the_start_alone(variant, weight, x):
    """At the start the update is 0, so that whatever is dropped the layer still equals its base."""
    base = make_base("nf4", weight)
    adapter = make_adapter(variant, base, dropout=0.5).train()
    assert torch.allclose(adapter(x), base(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in OWN_FORWARD])
def test_gradients_are_those_of_plain_operations(variant, weight, x):
    """Under dropout: the thin branch's gradient uses the dropped input."""
    adapter = trained_away_from_start(
        make_adapter(variant, make_base("dense-fp32", weight), dropout=0.5)
    ).train()
    torch.manual_seed(5)
    adapter(x).square().sum().backward()
    torch.manual_seed(5)
    dropped = torch.nn.functional.dropout(x, 0.5)
    twin = copy.deepcopy(adapter)
    twin.zero_grad()
    plain(twin, x, adapter.base.dense(torch.float32), dropped).square().sum().backward()
    for name, parameter in twin.named_parameters(recurse=False):
        assert torch.allclose(getattr(adapter, name).grad, parameter.grad, rtol=1e-3, atol=1e-3), name


@pytest.mark.parametrize("variant", [v for v, (m, _) in VARIANTS.items() if m != "map"])
def test_alpha_acts_where_the_spec_says_so(variant, weight, x):
    """Not asked of MAP, whose D / N(D) nearly cancels it."""
    config = config_of(variant)
    one, other = (
        start(adapter_of(make_base("dense-fp32", weight), c))
        for c in (config, dataclasses.replace(config, alpha=9.0))
    )
    other.load_state_dict(trained_away_from_start(one).state_dict())
    assert torch.equal(one(x), other(x)) != spec_of(config).has_alpha(config)


@pytest.mark.parametrize(("variant", "base_name"), spread(CASES))
def test_no_dense_weight_is_saved(variant, base_name, weight, x):
    """What autograd keeps for one layer is x, thin products and the packed storage itself."""
    adapter = trained_away_from_start(make_adapter(variant, make_base(base_name, weight)))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapter(x.requires_grad_(True))
    own = {t.data_ptr() for t in (*adapter.base.storage(), *adapter.parameters(), *adapter.buffers())}
    dense = [
        t for t in saved if t.numel() >= OUT * IN and t.data_ptr() not in own and t.data_ptr() != x.data_ptr()
    ]
    assert not dense
