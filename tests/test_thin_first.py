"""The thin branch is written first, and the product with the weight added onto it in the multiplication itself."""

from __future__ import annotations

import pytest
import torch
from test_adapter_contract import BASES, IN, OUT, make_adapter, make_base, trained_away_from_start
from test_joint import holder
from torch.utils._python_dispatch import TorchDispatchMode

from decompft.adapters.frozen.fp8_products import Fp8Products
from decompft.adapters.lora import scaling

TOKENS = 6


class Added(TorchDispatchMode):
    """Inner sizes of products that are added to something, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.addmm_.default:
            self.sizes.append(args[1].shape[1])
        return func(*args, **(kwargs or {}))


def weight(seed: int = 0) -> torch.Tensor:
    return 0.05 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))


def tokens(width: int, dtype: torch.dtype = torch.float32, seed: int = 5) -> torch.Tensor:
    return torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scales(name: str) -> list[torch.Tensor | None]:
    base = make_base(name, weight())
    row = torch.linspace(0.5, 2.0, OUT).view(-1, 1)
    return [None, torch.tensor([1.5]), *([row] if base.folds(base.storage()) else [])]


@pytest.mark.parametrize("name", BASES)
def test_what_a_base_adds_to_is_what_it_makes_and_what_was_there(name):
    base, x, there = make_base(name, weight()), tokens(IN), tokens(OUT, seed=6)
    for scale in scales(name):
        if not base.adds(base.storage(), scale):
            continue
        made = base.product(x, base.storage(), scale)
        into = there.clone()
        assert base.product(x, base.storage(), scale, into_TO=into) is into
        torch.testing.assert_close(into, there + made, rtol=1e-5, atol=1e-5)


def test_which_bases_do_not_add():
    no = {n for n in BASES for s in scales(n) if not (b := make_base(n, weight())).adds(b.storage(), s)}
    # a product whose scale multiplies what it made, and one of bitsandbytes'
    assert no == {"dense-bf16", "int8-outliers"}
    base = make_base("nf4", weight())
    base.products = Fp8Products()
    assert not base.adds(base.storage(), None) and not base.adds_back
    with pytest.raises(AssertionError):
        base.product(tokens(IN), base.storage(), None, into_TO=tokens(OUT))


@pytest.mark.parametrize("variant", ["lora", "dora", "vera"])
@pytest.mark.parametrize("base_name", ["dense-fp32", "nf4-dq"])
def test_no_thin_product_is_added_to_what_is_wide(variant, base_name):
    adapter = trained_away_from_start(make_adapter(variant, make_base(base_name, weight())))
    x = tokens(IN).requires_grad_()
    with Added() as forward:
        y = adapter(x)
    dy = tokens(OUT)
    with Added() as backward:
        y.backward(dy)
    assert forward.sizes == [IN]
    assert backward.sizes == [OUT]


def test_linears_of_one_x_add_to_what_their_branches_left():
    model, x = holder("lora", "lora", "lora", base_name="nf4-dq"), tokens(IN)
    with Added() as forward:
        model(x)
    assert forward.sizes == [IN] * 3


def test_bfloat16_is_nearer_to_float64_than_what_is_rounded_before_the_branch_is_added():
    adapter = trained_away_from_start(make_adapter("lora", make_base("nf4-dq", weight())))
    with torch.no_grad():
        adapter.B *= 0.1  # small beside y, as after any training that deserves the name
    x = torch.randn(2048, IN, generator=torch.Generator().manual_seed(1)).bfloat16()
    dense, A, B = adapter.base.dense(torch.bfloat16), adapter.A.detach(), adapter.B.detach()
    s = scaling(adapter.config)
    exact = x.double() @ dense.double().T + s * (x.double() @ A.double().T) @ B.double().T
    h = (x @ A.bfloat16().T).mul_(s)
    afterwards = (x @ dense.T).addmm_(h, B.bfloat16().T)
    first = adapter(x).detach()
    assert (first - exact).norm() < 0.95 * (afterwards - exact).norm()
