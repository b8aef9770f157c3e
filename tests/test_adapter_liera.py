"""LieRA and HiRA against their equation (METHODS 2.5), identity 5, peft's HiRA, and a count of what is made."""

import copy

import pytest
import torch
from test_adapter_contract import BASES, IN, OUT, RANK, make_adapter, make_base, trained_away_from_start
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from decompft.adapters import liera
from decompft.adapters.liera_conv import LieraConv2d

S = 8.0 / RANK
ORDERS = ("liera", "liera-exact", "hira")


@pytest.fixture
def weight() -> torch.Tensor:
    return 0.05 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=[1 << 22, 7 * IN], ids=["one tile", "tiles of 7 rows"], autouse=True)
def tiles(request, monkeypatch):
    monkeypatch.setattr(liera, "TILE_NUMBERS", request.param)


def equation(variant: str, A, B, W):
    D = S * (B @ A)
    return W * torch.exp(D.clamp(-8, 8)) if variant == "liera-exact" else W * (1 + D)


@pytest.mark.parametrize("base_name", [b for b in BASES if b != "int8-outliers"])
@pytest.mark.parametrize("variant", ORDERS)
def test_forward_and_gradients_are_the_equations(variant, base_name, weight, x):
    adapter = trained_away_from_start(make_adapter(variant, make_base(base_name, weight)))
    x.requires_grad_(True)
    adapter(x).sin().sum().backward()
    W = adapter.base.dense(torch.float64)
    A, B, x64 = (t.detach().double().requires_grad_(True) for t in (adapter.A, adapter.B, x))
    bias = 0 if adapter.base.bias is None else adapter.base.bias.double()
    y = x64 @ equation(variant, A, B, W).T + bias
    torch.testing.assert_close(adapter(x).double(), y, rtol=1e-5, atol=1e-5)
    y.sin().sum().backward()
    for found, expected in ((adapter.A, A), (adapter.B, B), (x, x64)):
        torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ORDERS)
def test_dropout_acts_on_the_update_alone(variant, weight, x):
    adapter = trained_away_from_start(make_adapter(variant, make_base("nf4", weight), dropout=0.5)).train()
    x.requires_grad_(True)
    torch.manual_seed(5)
    adapter(x).sin().sum().backward()
    A, B, x64 = (t.detach().double().requires_grad_(True) for t in (adapter.A, adapter.B, x))
    torch.manual_seed(5)
    kept = F.dropout(torch.ones_like(x), 0.5).double()
    W = adapter.base.dense(torch.float64)
    y = x64 @ W.T + (x64 * kept) @ (equation(variant, A, B, W) - W).T + adapter.base.bias
    y.sin().sum().backward()
    for found, expected in ((adapter.A, A), (adapter.B, B), (x, x64)):
        torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-4, atol=1e-4)


def test_beyond_the_clamp_the_factor_stands_still(weight, x):
    adapter = make_adapter("liera-exact", make_base("dense-fp32", weight))
    with torch.no_grad():
        adapter.A.fill_(1.0)
        adapter.B.fill_(10.0)  # D = s r 10 = 80
    adapter(x).sum().backward()
    assert not adapter.A.grad.any() and not adapter.B.grad.any()
    W = adapter.base.dense(torch.float32)
    torch.testing.assert_close(adapter.merged(W), W * torch.exp(torch.tensor(8.0)))


def test_first_order_is_r_scaled_passes_of_the_base(weight, x):
    """METHODS 1.3, identity 5: (W o (B A)) x = sum_k diag(B_:k) W (A_k: o x)."""
    adapter = trained_away_from_start(make_adapter("liera", make_base("nf4", weight)))
    base, x = adapter.base, x.double()
    W = base.dense(torch.float64)
    A, B = adapter.A.double(), adapter.B.double()
    passes = sum(((x * A[k]) @ W.T) * B[:, k] for k in range(RANK))
    expected = x @ W.T + base.bias.double() + S * passes
    torch.testing.assert_close(adapter(x.float()).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base_name", ["dense-bf16", "nf4"])
def test_a_small_factor_moves_a_bfloat16_weight(base_name, weight):
    """1 + D rounded to bfloat16 would be 1 for every |D| < 1/512, and over weights on the grid W (1 + D) would be W."""
    adapter = trained_away_from_start(make_adapter("liera", make_base(base_name, weight)))
    with torch.no_grad():
        adapter.B.mul_(0.005)
    D = S * (adapter.B @ adapter.A)
    assert D.abs().max() < 2**-9
    low = torch.randn(4000, IN, generator=torch.Generator().manual_seed(6)).bfloat16()
    W = adapter.base.dense(torch.float64)
    wanted = low.double() @ (W * D).T
    found = adapter(low).double() - adapter.base(low).double()
    # outputs are rounded, too; over 96,000 of them that averages out
    slope = torch.sum(found * wanted) / torch.sum(wanted * wanted)
    if base_name == "nf4":
        assert slope.item() == pytest.approx(1.0, abs=0.2)
    else:  # as with lora, what is less than half a bfloat16 step of an output is lost; of the weights all would be
        assert slope.item() > 0.05


def test_zeros_of_the_base_are_counted_and_said(weight):
    weight = weight.clone()
    weight[:6] = 0  # a quarter of the rows
    adapter = make_adapter("liera", make_base("nf4", weight))
    expected = (adapter.base.dense(torch.float32) == 0).double().mean().item()
    assert adapter.zero_fraction == pytest.approx(expected)
    assert expected > 0.25
    (line,) = adapter.remarks([("model.layer", adapter)])
    assert f"{expected:.1%} of the adapted weights are exactly 0" in line
    assert make_adapter("liera", make_base("dense-fp32", weight[6:].repeat(2, 1)[:OUT])).remarks([]) == []


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if torch.is_tensor(tensor) and not func.is_view:
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_no_tensor_of_the_weights_size_is_made(weight, x, monkeypatch):
    monkeypatch.setattr(liera, "TILE_NUMBERS", 4 * IN)
    adapter = trained_away_from_start(make_adapter("liera", make_base("nf4", weight)))
    small = x[0, :2].requires_grad_(True)
    with Largest() as largest:
        adapter(small).sum().backward()
    assert largest.numbers <= max(4 * IN, RANK * IN, 2 * IN) < OUT * IN


def test_hira_equals_the_installed_pefts(weight, x):
    import peft

    layer = torch.nn.Linear(IN, OUT)
    with torch.no_grad():
        layer.weight.copy_(weight)
    model = torch.nn.Sequential(layer)
    config = peft.HiraConfig(r=RANK, target_modules=["0"], hira_dropout=0.0)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    ours = trained_away_from_start(make_adapter("hira", make_base("dense-fp32", weight)))
    with torch.no_grad():
        ours.base.bias.copy_(layer.bias)
        state = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
        down, up = sorted(state)
        # peft's HiRA has no alpha / r: it goes into B
        state[down].copy_(ours.A)
        state[up].copy_(S * ours.B)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    ours(x).sin().sum().backward()
    theirs(x).sin().sum().backward()
    torch.testing.assert_close(ours.A.grad, state[down].grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.B.grad, S * state[up].grad, rtol=1e-3, atol=1e-4)
    merged = theirs.merge_and_unload()[0].weight
    torch.testing.assert_close(ours.merged(weight), merged, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.parametrize(("groups", "stride", "padding_mode"), [(1, 1, "zeros"), (2, 2, "reflect")])
def test_a_kernel_is_the_reading(is_exact, groups, stride, padding_mode):
    conv = torch.nn.Conv2d(4, 6, 3, stride=stride, padding=1, groups=groups, padding_mode=padding_mode)
    layer = LieraConv2d(copy.deepcopy(conv), rank=2, alpha=4.0, is_exact=is_exact)
    image = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(image), conv(image))
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 2 * 3 * (6 + 4 // groups) * 3
    with torch.no_grad():
        layer.B += 0.1
    D = 2.0 * (layer.B.double() @ layer.A.double()).view(conv.weight.shape)
    conv.weight.data = (conv.weight * (torch.exp(D) if is_exact else 1 + D)).float()
    torch.testing.assert_close(layer(image), conv(image))
    layer(image).sum().backward()
    assert layer.A.grad.any() and layer.base.weight.grad is None


def test_a_kernel_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match="3 x 5"):
        LieraConv2d(torch.nn.Conv2d(2, 2, (3, 5)), rank=1, alpha=1.0)
