"""MAP against its equation, written out again in float64 (METHODS 2.1)."""

from dataclasses import replace

import pytest
import torch
from test_adapter_contract import IN, OUT, RANK, config_of, make_adapter, make_base, trained_away_from_start

from decompft.adapters.base import Settling
from decompft.adapters.spec import ADAPTER_SPECS

S = 8.0 / RANK
EPS = 1e-6


@pytest.fixture
def weight() -> torch.Tensor:
    return 0.05 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(7, IN, generator=torch.Generator().manual_seed(3))


def equation(adapter, W: torch.Tensor) -> torch.Tensor:
    """W* = a W / (N(W) + eps) + b D / (N(D) + eps), D = s B A, all dense, all float64."""
    D = S * (adapter.B.double() @ adapter.A.double())
    N = torch.linalg.norm
    return adapter.a.double() * W / (N(W) + EPS) + adapter.b.double() * D / (N(D) + EPS)


@pytest.mark.parametrize("base_name", ["dense-fp32", "nf4", "nf4-dq"])
def test_forward_is_the_equation(base_name, weight, x):
    adapter = trained_away_from_start(make_adapter("map", make_base(base_name, weight)))
    W = adapter.base.dense(torch.float64)
    bias = 0 if adapter.base.bias is None else adapter.base.bias.double()
    y = x.double() @ equation(adapter, W).T + bias
    # float32 sums over 128 products: 2**-24 * sqrt(128) relative, times a few
    assert torch.allclose(adapter(x).double(), y, rtol=1e-5, atol=1e-6)


def settle_factor(adapter) -> float:
    wait = adapter.settling()["B"]
    return Settling.factors([wait]).item()


def test_magnitude_starts_at_the_norm_of_the_weight_that_is_used(weight):
    """Of a quantized base that is the dequantized weight, about 0.5 % off the original's norm."""
    base = make_base("nf4", weight)
    adapter = make_adapter("map", base)
    used = torch.linalg.norm(base.dense(torch.float64))
    assert torch.allclose(adapter.a.double(), used, rtol=1e-6)
    assert torch.equal(adapter.a, adapter.base_norm)
    assert not torch.allclose(used, torch.linalg.norm(weight.double()), rtol=1e-5)


def test_gradient_of_B_is_orthogonal_to_B(weight, x):
    """<dB, B> = 0: the update branch learns a direction only (METHODS 1.3, identity 4)."""
    adapter = trained_away_from_start(make_adapter("map", make_base("nf4", weight)))
    adapter(x).sin().sum().backward()
    for name in ("A", "B"):
        p = getattr(adapter, name)
        cosine = torch.sum(p.grad * p) / (torch.linalg.norm(p.grad) * torch.linalg.norm(p))
        assert abs(cosine.item()) < 1e-5, name


def test_gradients_are_those_of_identity_4(weight, x):
    adapter = trained_away_from_start(make_adapter("map", make_base("dense-fp32", weight)))
    G = torch.randn(7, OUT, generator=torch.Generator().manual_seed(9)).double()
    adapter(x).backward(G.float())
    A, B, X = adapter.A.double(), adapter.B.double(), x.double()
    W = adapter.base.dense(torch.float64)
    D = B @ A
    n, Gw = torch.linalg.norm(D), G.T @ X
    c = torch.sum(Gw * D)
    b = adapter.b.double()
    expected = {
        "B": (b / n) * (Gw @ A.T - (c / n**2) * B @ (A @ A.T)),
        "A": (b / n) * (B.T @ Gw - (c / n**2) * (B.T @ B) @ A),
        "b": c / n,
        "a": torch.sum(Gw * W) / torch.linalg.norm(W),
    }
    for name, value in expected.items():
        # the identity leaves eps out: 1e-6 / N(D)
        assert torch.allclose(getattr(adapter, name).grad.double(), value, rtol=1e-4, atol=1e-4), name


def test_norm_of_the_product_equals_the_dense_norm(weight, x):
    adapter = make_adapter("map", make_base("dense-fp32", weight))
    direction = torch.randn(OUT, RANK, generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 1e-4, 1e-8):  # a B that has taken one small step must not underflow
        with torch.no_grad():
            adapter.B.copy_(scale * direction)
        adapter(x)
        dense = torch.linalg.norm(S * adapter.B.double() @ adapter.A.double())
        assert torch.allclose(S * adapter.settling()["B"].size.double(), dense, rtol=1e-5, atol=0)


def test_slope_at_B_zero_is_finite_and_scaled_by_one_over_eps(weight, x):
    """METHODS 2.1: 1/eps times LoRA's; `settling` undoes it for the optimizer."""
    lora = make_adapter("lora", make_base("dense-fp32", weight))
    adapter = make_adapter("map", make_base("dense-fp32", weight))
    for layer in (lora, adapter):
        layer(x).sin().sum().backward()
    assert torch.allclose(adapter.B.grad, lora.B.grad / EPS, rtol=1e-3)
    assert settle_factor(adapter) == pytest.approx(EPS / 1e-3)
    assert torch.isfinite(adapter.B.grad).all()


def test_settling_ends_when_the_update_has_a_norm(weight, x):
    adapter = trained_away_from_start(make_adapter("map", make_base("dense-fp32", weight)))
    adapter(x)
    assert settle_factor(adapter) == 1.0
    assert make_adapter("map", make_base("dense-fp32", weight), settle_norm=0.0).settling() == {}


def test_warmup_of_b_is_off_by_default_and_linear_when_on(weight, x):
    plain = trained_away_from_start(make_adapter("map", make_base("dense-fp32", weight)))
    plain.on_step(0)
    assert plain.warmup == 1.0
    warm = trained_away_from_start(make_adapter("map", make_base("dense-fp32", weight), b_warmup_steps=4))
    base = warm.base(x)
    updates = []
    for step in (0, 1, 3, 9):
        warm.on_step(step)
        updates.append(torch.linalg.norm(warm(x) - base * (warm.a / (warm.base_norm + EPS))
                                         + (warm.a / (warm.base_norm + EPS) - 1) * warm.base.bias))  # fmt: skip
    ratios = torch.stack(updates) / updates[-1]
    assert torch.allclose(ratios, torch.tensor([0.25, 0.5, 1.0, 1.0]), rtol=1e-4)


def test_parameter_counts_of_the_papers():
    def count(out: int, in_: int, rank: int, method: str = "map") -> int:
        config = replace(config_of(method), rank=rank)
        return ADAPTER_SPECS[method].num_params(out, in_, config)

    # DeBERTaV3-base, 72 matrices, r=2 (METHODS 2.1 iv): 12 layers of q, k, v, o, up, down
    total = 12 * (4 * count(768, 768, 2) + count(3072, 768, 2) + count(768, 3072, 2))
    assert total == 331_920
    # LLaMA-7B q, k, v, up, down: 160 matrices, 320 scalars more than LoRA
    shapes = [(4096, 4096)] * 3 + [(11008, 4096), (4096, 11008)]
    assert 32 * sum(count(o, i, 16) - count(o, i, 16, "lora") for o, i in shapes) == 320


@pytest.mark.parametrize("base_name", ["dense-bf16", "nf4", "int8"])
def test_a_small_change_of_a_reaches_a_bfloat16_product(base_name, weight):
    """a / N(W) rounded to bfloat16, or times weights on its grid and rounded again, would be 1 up to 1 + 1/256."""
    adapter = make_adapter("map", make_base(base_name, weight))
    many = torch.randn(4000, IN, generator=torch.Generator().manual_seed(8)).bfloat16()
    exact = many.double() @ adapter.base.dense(torch.float64).T
    with torch.no_grad():
        gains = []
        for factor in (1.0, 1.002):
            adapter.a.copy_(adapter.base_norm * factor)
            y = adapter(many).double() - (
                0 if adapter.base.bias is None else adapter.base.bias.bfloat16().double()
            )
            gains.append(torch.sum(y * exact) / torch.sum(exact * exact))
    assert (gains[1] / gains[0]).item() == pytest.approx(1.002, abs=2e-4)


def test_over_a_weight_of_zeros_nothing_is_divided_by_zero(weight, x):
    adapter = trained_away_from_start(make_adapter("map", make_base("nf4", 0 * weight)))
    start = make_adapter("map", make_base("dense-fp32", 0 * weight))
    for layer in (adapter, start):
        layer(x.requires_grad_(True)).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters(recurse=False))
