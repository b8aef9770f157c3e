"""TriLoRA, FLoRA, MoSLoRA and DeLoRA against their equations, written out again in float64 (METHODS 1.1 and 3)."""

from dataclasses import replace

import pytest
import torch
from test_adapter_contract import (
    IN,
    OUT,
    RANK,
    config_of,
    make_adapter,
    make_base,
    start,
    trained_away_from_start,
)

from decompft.adapters.base import Adapter
from decompft.adapters.frozen.factors import Factors
from decompft.adapters.inject import make_adapter as adapter_of
from decompft.adapters.spec import ADAPTER_SPECS

S = 8.0 / RANK
FACTORED = ("trilora", "flora", "moslora", "delora")


@pytest.fixture
def weight() -> torch.Tensor:
    return 0.05 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(7, IN, generator=torch.Generator().manual_seed(3))


def change(adapter: Adapter, W: torch.Tensor) -> torch.Tensor:
    """W* - W, dense, float64."""
    A, B, third = (t.detach().double() for t in adapter.trained())
    match adapter.config.method:
        case "trilora":
            return S * B @ torch.diag(third) @ A
        case "flora" | "moslora":
            return S * B @ third @ A
    strength = [third.item() / (RANK * A[i].norm() * B[:, i].norm()) for i in range(RANK)]
    return B @ torch.diag(torch.stack(strength)) @ A @ torch.diag(W.norm(dim=0))


@pytest.mark.parametrize("base_name", ["dense-fp32", "nf4-dq"])
@pytest.mark.parametrize("method", FACTORED)
def test_forward_is_the_equation(method, base_name, weight, x):
    adapter = trained_away_from_start(make_adapter(method, make_base(base_name, weight)))
    W = adapter.base.dense(torch.float64)
    bias = 0 if adapter.base.bias is None else adapter.base.bias.double()
    y = x.double() @ (W + change(adapter, W)).T + bias
    # float32 sums over 128 products: 2**-24 * sqrt(128) relative, times a few
    assert torch.allclose(adapter(x).double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [*FACTORED, "vera", "mpc_n", "bitfit"])
def test_written_out_gradients_are_those_of_the_formula(method, weight):
    """`pull_back` against the default, which differentiates `factors`, in float64."""
    adapter = trained_away_from_start(make_adapter(method, make_base("dense-fp32", weight))).double()
    trained, fixed = adapter.trained(), adapter.fixed()
    with torch.no_grad():
        found = adapter.factors(trained, fixed)
    draw = torch.Generator().manual_seed(5)
    grads = Factors(
        **{
            name: torch.randn(value.shape, generator=draw, dtype=torch.float64)
            for name in ("up", "down", "bias")
            if (value := getattr(found, name)) is not None
        }
    )
    written = adapter.pull_back(trained, fixed, found, grads, None)
    for mine, expected in zip(
        written, Adapter.pull_back(adapter, trained, fixed, found, grads, None), strict=True
    ):
        assert torch.allclose(mine, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "options", "zero", "bound", "std"),
    [
        ("trilora", {}, "e", {"A": IN**-0.5, "B": RANK**-0.5}, {}),
        ("flora", {}, "M", {"A": IN**-0.5, "B": RANK**-0.5}, {}),
        ("flora", {"init": "normal"}, "M", {}, {"A": 0.02, "B": 0.02}),
        ("moslora", {}, "B", {}, {"A": 0.02, "M": 0.02}),
        ("moslora", {"init": "kaiming"}, "B", {"A": IN**-0.5, "M": RANK**-0.5}, {}),
        ("delora", {}, "B", {"A": IN**-0.5}, {}),
    ],
)
def test_starts_as_the_papers_do(method, options, zero, bound, std, weight):
    adapter = make_adapter(method, make_base("dense-fp32", weight), **options)
    assert not getattr(adapter, zero).any()
    for name, limit in bound.items():  # Kaiming-uniform with a = sqrt(5)
        assert 0.8 * limit < getattr(adapter, name).abs().max() <= limit
    for name, deviation in std.items():
        # 16 numbers or more: within 3 standard errors
        assert getattr(adapter, name).std().item() == pytest.approx(deviation, rel=0.55)


def test_moslora_may_start_with_an_orthogonal_mixer(weight):
    M = make_adapter("moslora", make_base("dense-fp32", weight), init="orthogonal").M
    assert torch.allclose(M @ M.T, torch.eye(RANK), atol=1e-5)


@pytest.mark.parametrize("method", ["trilora", "flora", "moslora"])
def test_rslora_scales_by_the_root_of_the_rank(method, weight):
    adapter = make_adapter(method, make_base("dense-fp32", weight), scaling="rslora")
    assert adapter.effective(torch.empty(0)).q == 8.0 / RANK**0.5


@pytest.mark.parametrize("method", ["trilora", "flora", "moslora"])
def test_delta_is_a_plain_lora_of_the_same_rank(method, weight):
    adapter = trained_away_from_start(make_adapter(method, make_base("dense-fp32", weight)))
    up, down = adapter.delta()
    assert up.shape == (OUT, RANK) and down.shape == (RANK, IN)
    assert torch.allclose((up @ down).double(), change(adapter, weight.double()), rtol=1e-4, atol=1e-6)


def test_parameter_counts_of_the_table():
    """METHODS 1.1: r (d_in + d_out) and r, r^2, 1 more; VeRA d_out + r; BitFit d_out."""

    def count(method: str) -> int:
        return ADAPTER_SPECS[method].num_params(3072, 768, replace(config_of(method), rank=16))

    low_rank = 16 * (768 + 3072)
    assert count("trilora") == low_rank + 16
    assert count("flora") == count("moslora") == low_rank + 16**2
    assert count("delora") == low_rank + 1
    assert count("mpc_n") == count("mpc_o") == count("mpc_d") == low_rank
    assert count("vera") == 3072 + 16
    assert count("bitfit") == 3072


# -- DeLoRA --


def peft_delora(adapter: Adapter) -> torch.nn.Module:
    """The installed peft's layer with the same tensors."""
    from peft import DeloraConfig, get_peft_model

    linear = torch.nn.Linear(IN, OUT)
    with torch.no_grad():
        linear.weight.copy_(adapter.base.dense(torch.float32))
        linear.bias.copy_(adapter.base.bias)
    config = DeloraConfig(r=RANK, delora_lambda=15, target_modules=["0"])
    layer = get_peft_model(torch.nn.Sequential(linear), config).base_model.model[0]
    with torch.no_grad():
        layer.delora_A["default"].copy_(adapter.A)
        layer.delora_B["default"].copy_(adapter.B)
        layer.delora_lambda["default"].copy_(adapter.lam)
    return layer


@pytest.mark.parametrize("is_started", [True, False])
def test_delora_is_pefts(is_started, weight, x):
    """Outputs, gradients (at B = 0 as well: the norms are clamped alike) and the merged weight."""
    adapter = make_adapter("delora", make_base("dense-fp32", weight))
    if not is_started:
        trained_away_from_start(adapter)
    layer = peft_delora(adapter)
    y, expected = adapter(x), layer(x)
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-5)
    for output in (y, expected):
        output.sin().sum().backward()
    theirs = {"A": layer.delora_A, "B": layer.delora_B, "lam": layer.delora_lambda}
    for name, tensors in theirs.items():
        grad = tensors["default"].grad
        assert torch.allclose(getattr(adapter, name).grad, grad, rtol=1e-3, atol=1e-4 * grad.abs().max()), (
            name
        )
    merged = adapter.base.dense(torch.float32) + layer.get_delta_weight("default")
    assert torch.allclose(adapter.merged(adapter.base.dense(torch.float32)), merged, rtol=1e-4, atol=1e-6)


def test_delora_measures_the_weight_that_is_used(weight):
    """Of a quantized base the dequantized one, and not again after the start."""
    base = make_base("nf4", weight)
    adapter = make_adapter("delora", base)
    assert torch.allclose(adapter.column_norms, base.dense(torch.float32).norm(dim=0), rtol=1e-5)
    assert not torch.allclose(adapter.column_norms, weight.norm(dim=0), rtol=1e-4)


def test_delora_bounds_the_update_by_lam(weight):
    """Each direction has norm lam / r before the columns are scaled, whatever A and B are."""
    for scale in (1e-2, 1.0, 1e3):
        adapter = trained_away_from_start(make_adapter("delora", make_base("dense-fp32", weight)))
        with torch.no_grad():
            adapter.B.mul_(scale)
        up, down = adapter.delta()
        norms = up.norm(dim=0) * (down / adapter.column_norms).norm(dim=1)
        assert torch.allclose(norms, adapter.lam / RANK, rtol=1e-4)


def test_options_of_delora_arrive(weight):
    config = config_of("delora", lambda_init=3.0, eps=0.5, lambda_lr_ratio=7.0)
    adapter = start(adapter_of(make_base("dense-fp32", weight), config))
    assert adapter.lam.item() == 3.0
    assert adapter.lr_scales() == {"lam": 7.0}
    with torch.no_grad():
        adapter.B.fill_(1e-3)  # norms below eps divide by eps
    k = adapter.effective(torch.empty(0)).up / adapter.B
    expected = 3.0 / (RANK * adapter.A.norm(dim=1).clamp_min(0.5) * 0.5)
    assert torch.allclose(k[0], expected, rtol=1e-5)
