"""DoRA against its equation, written out again in float64 (METHODS 1.1, 1.3 and 3), and against peft."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_adapter_contract import IN, OUT, RANK, config_of, make_adapter, make_base, trained_away_from_start
from torch import nn

from decompft.adapters.base import Adapter
from decompft.adapters.dora import row_norms
from decompft.adapters.frozen.base import weight_times
from decompft.adapters.frozen.factors import Factors
from decompft.adapters.spec import ADAPTER_SPECS

S = 8.0 / RANK


@pytest.fixture
def weight() -> torch.Tensor:
    return 0.05 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(7, IN, generator=torch.Generator().manual_seed(3))


def equation(adapter, W: torch.Tensor) -> torch.Tensor:
    """W* = diag(m / n) (W + s B A), n the bracket's row norms, a constant; dense, float64."""
    V = W + S * adapter.B.double() @ adapter.A.double()
    n = torch.linalg.norm(V, dim=1, keepdim=True).detach()
    return adapter.m.double()[:, None] / n * V


@pytest.mark.parametrize("base_name", ["dense-fp32", "nf4", "nf4-dq", "int8", "fp8"])
def test_forward_and_gradients_are_the_equations(base_name, weight, x):
    adapter = trained_away_from_start(make_adapter("dora", make_base(base_name, weight)))
    y = adapter(x)
    y.sin().sum().backward()
    bias = 0 if adapter.base.bias is None else adapter.base.bias.double()
    exact = x.double() @ equation(adapter, adapter.base.dense(torch.float64)).T + bias
    # float32 sums over 128 products: 2**-24 * sqrt(128) relative, times a few
    assert torch.allclose(y.double(), exact, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(exact.sin().sum(), adapter.trained())
    for name, grad in zip("ABm", grads, strict=True):
        assert torch.allclose(getattr(adapter, name).grad, grad, rtol=1e-4, atol=1e-5), name


def test_the_norm_is_a_constant_to_autograd(weight, x):
    """With the norm in the graph the gradient of B is another one: the paper leaves that part out."""
    adapter = trained_away_from_start(make_adapter("dora", make_base("dense-fp32", weight)))
    adapter(x).sin().sum().backward()
    V = weight.double() + S * adapter.B.double() @ adapter.A.double()
    n = torch.linalg.norm(V, dim=1, keepdim=True)
    y = x.double() @ (adapter.m.double()[:, None] / n * V).T + adapter.base.bias.double()
    (through,) = torch.autograd.grad(y.sin().sum(), adapter.B)
    assert not torch.allclose(adapter.B.grad, through, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-6])
def test_row_norms_are_identity_2_and_column_norms_identity_3(scale, weight):
    draw = torch.Generator().manual_seed(0)
    A, B = torch.randn(RANK, IN, generator=draw), scale * torch.randn(OUT, RANK, generator=draw)
    V = weight.double() + S * B.double() @ A.double()
    found = row_norms(A, B, weight.square().sum(1), weight_times(weight, A), S)
    assert torch.allclose(found.double(), torch.linalg.norm(V, dim=1), rtol=1e-5)
    # of the transpose A^T is the left factor, and Q = W^T B takes P's place
    found = row_norms(B.T, A.T.contiguous(), weight.square().sum(0), weight_times(weight.T, B.T), S)
    assert torch.allclose(found.double(), torch.linalg.norm(V, dim=0), rtol=1e-5)


def test_a_row_that_the_update_cancels_does_not_break_the_root(weight):
    B = torch.zeros(OUT, 1)
    B[3] = -1 / S
    A = weight[3:4].clone()
    found = row_norms(A, B, weight.square().sum(1), weight_times(weight, A), S)
    assert torch.isfinite(found).all() and found[3] < 1e-3 * weight[3].norm()


def test_a_row_of_zeros_stays_a_row_of_zeros(weight, x):
    weight[5] = 0
    adapter = make_adapter("dora", make_base("dense-bf16", weight))
    y = adapter(x)
    y.sin().sum().backward()
    assert not y[:, 5].any()
    assert all(torch.isfinite(p.grad).all() for p in adapter.trained())


def test_starts_with_a_ratio_of_exactly_one(weight):
    """m / n is 1 to the last bit: MAP over DoRA divides what is left of m / n - 1 by its own norm."""
    for base_name in ("dense-fp32", "nf4-dq", "int8"):
        adapter = make_adapter("dora", make_base(base_name, weight))
        noted = adapter.note(
            adapter.trained(), adapter.fixed(), partial(weight_times, adapter.base.dense(torch.float32))
        )
        row = adapter.factors(adapter.trained(), (*adapter.fixed(), *noted)).row
        assert torch.equal(row, torch.ones(OUT))


def test_merged_into_another_weight_rows_have_norm_m(weight):
    """DoRA of the weight that is merged into, as PEFT's over it would be: not the trained base's norms over it."""
    adapter = trained_away_from_start(make_adapter("dora", make_base("nf4", weight)))
    norms = torch.linalg.norm(adapter.merged(weight), dim=1)
    torch.testing.assert_close(norms, adapter.m.detach().abs(), rtol=1e-5, atol=1e-6)
    used = torch.linalg.norm(adapter.merged(adapter.base.dense(torch.float32)), dim=1)
    torch.testing.assert_close(used, adapter.m.detach().abs(), rtol=1e-5, atol=1e-6)


def test_magnitude_starts_at_the_row_norms_of_the_weight_that_is_used(weight):
    base = make_base("nf4", weight)
    adapter = make_adapter("dora", base)
    used = torch.linalg.norm(base.dense(torch.float64), dim=1)
    assert torch.allclose(adapter.m.double(), used, rtol=1e-6)
    assert torch.allclose(adapter.rn2.double(), used.square(), rtol=1e-6)
    assert not torch.allclose(used, torch.linalg.norm(weight.double(), dim=1), rtol=1e-4)


def test_what_bfloat16_costs_the_norm_is_bounded(weight):
    """At most about 2**-8 of the update's part in the row (the module's first lines)."""
    adapter = trained_away_from_start(make_adapter("dora", make_base("dense-bf16", weight)))
    with torch.no_grad():
        adapter.B *= 0.1  # an update of a third of the base, far beyond what fine-tuning does
    W = adapter.base.dense(torch.bfloat16)
    (n,) = adapter.note(adapter.trained(), adapter.fixed(), partial(weight_times, W))
    update = S * adapter.B.double() @ adapter.A.double()
    exact = torch.linalg.norm(W.double() + update, dim=1)
    part = torch.linalg.norm(update, dim=1) / torch.linalg.norm(W.double(), dim=1)
    assert ((n.double() / exact - 1).abs() <= 2**-8 * part).all()
    assert 0.1 < part.max() < 1


def test_pull_back_is_the_derivative_of_the_factors(weight):
    adapter = trained_away_from_start(make_adapter("dora", make_base("dense-fp32", weight)))
    trained, fixed = adapter.trained(), (*adapter.fixed(), adapter.m.detach() * 1.1)
    with torch.no_grad():
        found = adapter.factors(trained, fixed)
    draw = torch.Generator().manual_seed(4)
    grads = {n: torch.randn(getattr(found, n).shape, generator=draw) for n in ("up", "down", "row")}
    default = Adapter.pull_back(adapter, trained, fixed, found, Factors(**copy.deepcopy(grads)), weight)
    written = adapter.pull_back(trained, fixed, found, Factors(**grads), weight)
    for one, other in zip(default, written, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_dropout_leaves_the_scaled_base_alone(weight, x):
    """y = (m / n) (W x + s B A x_d) + bias; the authors' code drops in (m / n - 1) W as well."""
    adapter = trained_away_from_start(
        make_adapter("dora", make_base("dense-fp32", weight), dropout=0.5)
    ).train()
    torch.manual_seed(0)
    y = adapter(x)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    f = adapter.effective(weight)
    expected = f.row * (x @ weight.T) + dropped @ f.down.T @ f.up.T + adapter.base.bias
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_learning_rates(weight):
    adapter = make_adapter("dora", make_base("dense-fp32", weight), lr_ratio=16.0, magnitude_lr_ratio=0.1)
    assert adapter.lr_scales() == {"B": 16.0, "m": 0.1}


def test_parameter_count_of_the_papers():
    """LLaMA-7B q, k, v, up, down: 876,544 numbers more than LoRA (METHODS section 6)."""

    def count(out: int, in_: int, method: str) -> int:
        return ADAPTER_SPECS[method].num_params(out, in_, replace(config_of(method), rank=16))

    shapes = [(4096, 4096)] * 3 + [(11008, 4096), (4096, 11008)]
    assert 32 * sum(count(o, i, "dora") - count(o, i, "lora") for o, i in shapes) == 876_544


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("base_name", ["dense-fp32", "nf4-dq"])
def test_outputs_gradients_and_merged_weight_are_pefts(base_name, rslora, weight, x):
    options = {"scaling": "rslora"} if rslora else {}
    ours = trained_away_from_start(make_adapter("dora", make_base(base_name, weight), **options))
    linear = nn.Linear(IN, OUT, bias=ours.base.bias is not None)
    dense = ours.base.dense(torch.float32)
    linear.weight.data.copy_(dense)
    if ours.base.bias is not None:
        linear.bias.data.copy_(ours.base.bias)
    config = LoraConfig(r=RANK, lora_alpha=8, use_dora=True, use_rslora=rslora, target_modules=["0"])
    model = get_peft_model(nn.Sequential(linear), config)
    layer = model.base_model.model[0]
    pairs = {
        "A": layer.lora_A["default"].weight,
        "B": layer.lora_B["default"].weight,
        "m": layer.lora_magnitude_vector["default"].weight,
    }
    start = pairs["m"].detach().clone()
    for name, theirs in pairs.items():
        theirs.data.copy_(getattr(ours, name))
    y, other = ours(x), model(x)
    assert torch.allclose(y, other, rtol=1e-5, atol=1e-5)
    y.sin().sum().backward()
    other.sin().sum().backward()
    for name, theirs in pairs.items():
        assert torch.allclose(getattr(ours, name).grad, theirs.grad, rtol=1e-4, atol=1e-4), name
    layer.merge()
    assert torch.allclose(ours.merged(dense), layer.base_layer.weight, rtol=1e-5, atol=1e-6)
    assert torch.allclose(make_adapter("dora", ours.base).m, start, rtol=1e-6)
