"""Both of a thin branch's products with dy from one reading: what the layers do with it; the kernel on a GPU."""

from __future__ import annotations

import pytest
import torch
from test_adapter_contract import IN, OUT, make_adapter, make_base, trained_away_from_start
from test_joint import holder
from torch import Tensor, nn

from decompft.adapters.frozen.factors import Factors
from decompft.adapters.frozen.thin import add_thin, thin_back
from decompft.adapters.kernels import visit

# rows, columns, rank: a linear of 7B's shape at two micro batches, a wide one, small models, odd sides
SHAPES = ((8192, 4096, 16), (2048, 4096, 16), (2048, 11008, 32), (512, 576, 8), (300, 1000, 16), (77, 131, 5))


class Twin:
    """In the kernel's place, on a CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.visits = 0
        monkeypatch.setattr(visit, "fits", lambda dy_TO, up_OR, hq_TR: True)
        monkeypatch.setattr(visit, "visit", self.visit)

    def visit(self, dy_TO: Tensor, *others: Tensor | float) -> Tensor:
        self.visits += 1
        return visit.plain(dy_TO, *others)


def slopes(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    given = x.clone().requires_grad_(True)
    y = model(given)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype))
    return {"x": given.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_slopes(model: nn.Module, monkeypatch: pytest.MonkeyPatch, num_visits: int) -> None:
    x = torch.randn(7, IN, generator=torch.Generator().manual_seed(2))
    plain = slopes(model, x)
    twin = Twin(monkeypatch)
    found = slopes(model, x)
    assert twin.visits == num_visits and found.keys() == plain.keys()
    for name, tensor in plain.items():
        # float32, summed and scaled in another order
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max()))


@pytest.mark.parametrize("variant", ["lora", "map", "dora", "mpc_n", "vera"])
def test_a_layer_takes_the_kernels_way_to_the_same_slopes(variant, monkeypatch):
    weight = 0.05 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))
    assert_same_slopes(
        trained_away_from_start(make_adapter(variant, make_base("nf4", weight))), monkeypatch, 1
    )


@pytest.mark.parametrize(
    "variants", [("lora",) * 3, ("map",) * 3, ("lora", None, "dora"), ("lora", "map", "dora")]
)
def test_linears_of_one_x_are_visited_one_by_one(variants, monkeypatch):
    assert_same_slopes(holder(*variants), monkeypatch, sum(v is not None for v in variants))


def test_a_member_that_nobody_used_is_not_visited(monkeypatch):
    draw = torch.Generator().manual_seed(4)
    factors = [
        Factors(
            up=torch.randn(OUT, rank, generator=draw),
            down=torch.randn(rank, IN, generator=draw),
            q=0.5,
            relu=relu,
        )
        for rank, relu in ((4, False), (3, False), (5, True))
    ]
    x = torch.randn(7, IN, generator=draw)
    gs = [torch.randn(7, OUT, generator=draw), None, torch.randn(7, OUT, generator=draw)]
    added = add_thin(x, factors, [None] * 3)
    plain = thin_back(gs, x, factors, added.tensors(), added.scale)
    twin = Twin(monkeypatch)
    found = thin_back(gs, x, factors, added.tensors(), added.scale)
    assert twin.visits == 2 and found.grads[1] == plain.grads[1] == (None,) * 3
    torch.testing.assert_close(found.slope(), plain.slope())
    torch.testing.assert_close(
        [*found.grads[0][:2], *found.grads[2][:2]], [*plain.grads[0][:2], *plain.grads[2][:2]]
    )


def test_gradients_of_ups_are_not_rounded_to_the_compute_dtype(monkeypatch):
    draw = torch.Generator().manual_seed(5)
    factors = [Factors(up=torch.randn(OUT, 4, generator=draw), down=torch.randn(4, IN, generator=draw))]
    x, g = (torch.randn(7, width, generator=draw).bfloat16() for width in (IN, OUT))
    added = add_thin(x, factors, [None])
    Twin(monkeypatch)
    d_up, d_down, _ = thin_back([g], x, factors, added.tensors(), added.scale).grads[0]
    assert d_up.dtype == d_down.dtype == torch.float32
    torch.testing.assert_close(d_up, g.float().T @ added.h_TK.float())


def test_small_arrays_make_many_programs_and_large_ones_few_parts():
    assert [visit._tiles_of(*shape) for shape in ((77, 131), (2048, 4096), (2048, 11008), (8192, 4096))] == [
        1,
        2,
        4,
        8,
    ]
    assert visit._tiles_of(10**6, 11008) == 8


def test_a_cpu_takes_the_plain_way():
    dy, up, hq = torch.randn(7, 40), torch.randn(40, 4), torch.randn(7, 4)
    assert not visit.fits(*(t.bfloat16() for t in (dy, up, hq)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "num_columns", "rank"), SHAPES)
def test_both_products_on_a_gpu(num_rows, num_columns, rank, dtype):
    draw = torch.Generator().manual_seed(rank)
    sizes = ((num_rows, num_columns), (num_columns, rank), (num_rows, 3 * rank))
    dy, up, h = (torch.randn(size, generator=draw).cuda().to(dtype) for size in sizes)
    hq, gu = (t.split(rank, 1)[1] for t in (h, torch.empty_like(h)))  # the second of three members
    assert visit.fits(dy, up, hq), visit.PROVED.reason(dy.device, dtype)
    d_up = visit.visit(dy, up, hq, gu, 0.7)
    exact = torch.empty(gu.shape, dtype=torch.float64, device="cuda")
    exact_d_up = visit.plain(dy.double(), up.double(), hq.double(), exact, 0.7)
    # float32 sums of up to 11008 terms, and gu is rounded once more
    spacing = torch.finfo(dtype).eps
    torch.testing.assert_close(gu.double(), exact, rtol=spacing, atol=1e-5 * float(exact.abs().max()))
    torch.testing.assert_close(
        d_up.double(), exact_d_up, rtol=1e-4, atol=1e-5 * float(exact_d_up.abs().max())
    )
    again = torch.empty_like(gu)
    assert torch.equal(visit.visit(dy, up, hq, again, 0.7), d_up) and torch.equal(again, gu)


@pytest.mark.gpu
def test_what_does_not_fit_on_a_gpu():
    dy, up, hq = (torch.randn(size, device="cuda").bfloat16() for size in ((64, 40), (40, 4), (64, 4)))
    assert visit.fits(dy, up, hq)
    assert not visit.fits(dy.float(), up.float(), hq.float()), "left to torch"
    assert not visit.fits(dy.sum().expand(64, 40), up, hq), "no two numbers beside each other"
    wide = visit.MAX_RANK + 1
    assert not visit.fits(dy, up.new_zeros(40, wide), hq.new_zeros(64, wide))
