"""MAP over methods other than LoRA, against dense float64 twins (METHODS 2.1, combos)."""

import copy

import pytest
import torch
from test_adapter_contract import IN, OUT, RANK, VARIANTS, make_base, start, trained_away_from_start

from decompft.adapters.base import Adapter, Settling
from decompft.adapters.inject import adapters
from decompft.adapters.inject import make_adapter as adapter_of
from decompft.adapters.spec import ADAPTER_SPECS, AdapterConfig
from decompft.launcher.options import options_of

S = 8.0 / RANK
EPS = 1e-6
OVER = ("dora", "adalora", "trilora", "flora", "moslora")
# what keeps D at 0 in the beginning, and so settles
FIRST = {"dora": {"B", "m"}, "adalora": {"e"}, "trilora": {"e"}, "flora": {"M"}, "moslora": {"B"}}


@pytest.fixture
def weight() -> torch.Tensor:
    return 0.05 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(7, IN, generator=torch.Generator().manual_seed(3))


def make(over: str, base, inner: dict[str, object] | None = None, **options: object) -> Adapter:
    made = options_of("map", {"over": over, "inner": inner or {}, **options})
    return start(
        adapter_of(base, AdapterConfig(method="map", rank=RANK, alpha=8.0, dropout=0.0, options=made))
    )


def change(adapter: Adapter, W: torch.Tensor) -> torch.Tensor:
    """D, dense and differentiable in float64."""
    t = {n: p.double() for n, p in adapter.named_parameters(recurse=False)}
    A, B = t["A"], t["B"]
    match adapter.config.options.over:
        case "adalora":
            return 8.0 / (RANK + 1e-5) * B @ torch.diag(t["e"]) @ A
        case "trilora":
            return S * B @ torch.diag(t["e"]) @ A
        case "flora" | "moslora":
            return S * B @ t["M"] @ A
    V = W + S * B @ A
    n = torch.linalg.norm(V, dim=1).detach()
    return (t["m"] / n)[:, None] * V - W


def equation(adapter: Adapter, W: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
    """W* = a W / (N(W) + eps) + b D / (N(D) + eps)."""
    N = torch.linalg.norm
    return adapter.a.double() * W / (N(W) + EPS) + adapter.b.double() * D / (N(D) + EPS)


def test_every_method_that_map_takes_is_here():
    choices = ADAPTER_SPECS["map"].options.__dataclass_fields__["over"]
    assert "lora" == choices.default
    known = {"lora", *OVER}
    for over in set(ADAPTER_SPECS) - known:
        with pytest.raises(ValueError, match="over"):
            options_of("map", {"over": over})
    assert {o.get("over", "lora") for m, o in VARIANTS.values() if m == "map"} <= known


@pytest.mark.parametrize("base_name", ["dense-fp32", "nf4-dq", "int8"])
@pytest.mark.parametrize("over", OVER)
def test_forward_and_gradients_are_the_equations(over, base_name, weight, x):
    """Of all tensors, DoRA's P = W A^T included, which A has a slope through."""
    adapter = trained_away_from_start(make(over, make_base(base_name, weight)))
    y = adapter(x)
    y.sin().sum().backward()
    W = adapter.base.dense(torch.float64)
    bias = 0 if adapter.base.bias is None else adapter.base.bias.double()
    exact = x.double() @ equation(adapter, W, change(adapter, W)).T + bias
    assert torch.allclose(y.double(), exact, rtol=1e-5, atol=1e-5)
    names = [n for n, _ in adapter.named_parameters(recurse=False)]
    grads = torch.autograd.grad(exact.sin().sum(), adapter.trained())
    for name, grad in zip(names, grads, strict=True):
        assert torch.allclose(getattr(adapter, name).grad, grad, rtol=1e-4, atol=2e-5), name


@pytest.mark.parametrize("over", OVER)
def test_merged_weight_is_the_equation(over, weight):
    adapter = trained_away_from_start(make(over, make_base("nf4", weight)))
    W = adapter.base.dense(torch.float64)
    merged = adapter.merged(adapter.base.dense(torch.float32))
    assert torch.allclose(merged.double(), equation(adapter, W, change(adapter, W)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("over", [o for o in OVER if o != "dora"])
def test_the_update_learns_a_direction_only(over, weight, x):
    """D is homogeneous in each of its factors, and its norm is divided out: no gradient along the factor itself."""
    adapter = trained_away_from_start(make(over, make_base("nf4", weight)))
    adapter(x).sin().sum().backward()
    for name in set(adapter.shapes) - {"a", "b"}:
        p = getattr(adapter, name)
        cosine = torch.sum(p.grad * p) / (torch.linalg.norm(p.grad) * torch.linalg.norm(p))
        assert abs(cosine.item()) < 1e-4, name


@pytest.mark.parametrize("over", OVER)
def test_slope_at_the_start_is_the_inner_methods_over_eps_and_settles(over, weight, x):
    """DoRA's own slope has the factor rho = 1 there; what settles is what moves D away from 0."""
    adapter = make(over, make_base("dense-fp32", weight))
    alone = AdapterConfig(
        method=over, rank=RANK, alpha=8.0, dropout=0.0, options=ADAPTER_SPECS[over].options()
    )
    inner = start(adapter_of(make_base("dense-fp32", weight), alone))
    for layer in (inner, adapter):
        layer(x).sin().sum().backward()
    waits = adapter.settling()
    assert set(waits) == FIRST[over]
    for name, wait in waits.items():
        grad = getattr(adapter, name).grad
        assert torch.isfinite(grad).all()
        assert torch.allclose(grad, getattr(inner, name).grad / EPS, rtol=1e-3, atol=1e-1), name
        assert Settling.factors([wait]).item() == pytest.approx(EPS / 1e-3)
    adapter = trained_away_from_start(adapter)
    adapter(x)
    assert Settling.factors(list(adapter.settling().values())).unique().tolist() == [1.0]


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("scale", [1e-3, 1e-6])
def test_a_small_change_has_the_norm_b_as_well(over, scale, weight):
    """One small step from the start: N(D) must neither underflow nor drown in what rounds off."""
    adapter = make(over, make_base("dense-fp32", weight))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in FIRST[over]:
            p = getattr(adapter, name)
            p += scale * torch.randn(p.shape, generator=draw)
    adapter.effective(weight)
    norm = torch.linalg.norm(change(adapter, weight.double()))
    found = next(iter(adapter.settling().values())).size.double()
    # DoRA's m / n - 1 has lost what float32 rounds off 1: 2**-24 of the weight's norm
    lost = 2**-24 * torch.linalg.norm(weight) if over == "dora" else 0.0
    assert torch.allclose(found, norm, rtol=1e-4, atol=float(lost))


def test_warmup_of_b(weight, x):
    adapter = trained_away_from_start(make("flora", make_base("nf4-dq", weight), b_warmup_steps=4))
    W = adapter.base.dense(torch.float64)
    D = change(adapter, W)
    for step, part in ((0, 0.25), (1, 0.5), (9, 1.0)):
        adapter.on_step(step)
        twin = copy.deepcopy(adapter)
        with torch.no_grad():
            twin.b *= part
        assert torch.allclose(adapter(x).double(), x.double() @ equation(twin, W, D).T, rtol=1e-5, atol=1e-5)


def test_the_inner_methods_options_count(weight, x):
    base = make_base("nf4-dq", weight)
    W = base.dense(torch.float64)
    adapter = trained_away_from_start(make("flora", base, {"init": "normal", "scaling": "rslora"}, eps=1.0))
    t = {n: p.double() for n, p in adapter.named_parameters(recurse=False)}
    D = 8.0 / RANK**0.5 * t["B"] @ t["M"] @ t["A"]
    N = torch.linalg.norm
    exact = x.double() @ (t["a"] * W / (N(W) + 1.0) + t["b"] * D / (N(D) + 1.0)).T
    assert torch.allclose(adapter(x).double(), exact, rtol=1e-5, atol=1e-5)
    over_lora = make("lora", base, {"scaling": "rslora", "lr_ratio": 4.0}, lr_ratio=2.0)
    assert over_lora.lr_scales() == {"B": 8.0, "a": 1.0, "b": 1.0}
    over_dora = make("dora", base, {"lr_ratio": 4.0, "magnitude_lr_ratio": 3.0}, magnitude_lr_ratio=0.5)
    assert over_dora.lr_scales() == {"B": 4.0, "m": 3.0, "a": 0.5, "b": 0.5}


def test_eps_over_lora_is_divided_by_the_inner_scaling(weight, x):
    adapter = trained_away_from_start(
        make("lora", make_base("nf4-dq", weight), {"scaling": "rslora"}, eps=1.0)
    )
    W, N = adapter.base.dense(torch.float64), torch.linalg.norm
    D = 8.0 / RANK**0.5 * adapter.B.double() @ adapter.A.double()
    exact = x.double() @ (adapter.a.double() * W / (N(W) + 1.0) + adapter.b.double() * D / (N(D) + 1.0)).T
    assert torch.allclose(adapter(x).double(), exact, rtol=1e-5, atol=1e-5)


def test_adaloras_regulariser_counts(weight, x):
    adapter = trained_away_from_start(make("adalora", make_base("dense-fp32", weight)))
    adapter.num_siblings = 3
    plain, shared = copy.deepcopy(adapter), copy.deepcopy(adapter)
    shared.penalty_share = 0.5
    for layer in (plain, shared):
        layer(x).sin().sum().backward()
    A, B = (getattr(adapter, n).detach().double().requires_grad_(True) for n in "AB")
    one, N = torch.eye(RANK).double(), torch.linalg.norm
    term = 0.5 * 0.1 / (2 * 3) * (N(A @ A.T - one) + N(B.T @ B - one))
    for name, grad in zip("AB", torch.autograd.grad(term, (A, B)), strict=True):
        found = getattr(shared, name).grad - getattr(plain, name).grad
        assert torch.allclose(found.double(), grad, rtol=1e-3, atol=1e-4), name


def test_there_is_one_adapter_with_one_set_of_tensors(weight):
    adapter = make("dora", make_base("nf4", weight))
    assert [n for n, _ in adapters(torch.nn.Sequential(adapter))] == ["0"]
    assert {n for n, _ in adapter.named_parameters(recurse=False)} == {"A", "B", "m", "a", "b"}
    assert {n for n, _ in adapter.named_buffers(recurse=False)} == {"rn2", "base_norm"}
    assert [n for n, _ in adapter.named_children()] == ["base"]


def test_options_without_effect_are_refused():
    with pytest.raises(ValueError, match="inner.target_rank has no effect"):
        options_of("map", {"over": "adalora", "inner": {"target_rank": 4}})
    assert options_of("map", {"over": "adalora", "inner": {"orth_weight": 0.2}}).inner["orth_weight"] == 0.2
