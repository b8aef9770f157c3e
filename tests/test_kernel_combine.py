"""Parts of a slope, a thin product and dots in one pass: what the nodes do with it, and the kernel beside float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from test_adapter_contract import make_adapter, trained_away_from_start
from test_joint import NAMES, Holder, holder, inputs, results
from torch import Tensor, nn

from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.frozen.fourbit import Nf4Linear
from decompft.adapters.frozen.fp8_products import Fp8Products
from decompft.adapters.frozen.slope import Slope
from decompft.adapters.joint import join
from decompft.adapters.kernels import combine

Calls = list[tuple[int, bool, int]]  # arrays, with dots, inner size of the thin product


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """On a CPU, with the twin in the kernel's place."""
    made: Calls = []

    def twin(owns: Sequence[Tensor], x_TC: Tensor | None, thin: combine.Product | None) -> Tensor | None:
        assert len({own.data_ptr() for own in owns}) == len(owns) <= combine.MOST
        made.append((len(owns), x_TC is not None, 0 if thin is None else thin[0].shape[1]))
        return combine.plain_(owns, x_TC, thin)

    monkeypatch.setattr(combine, "add_", twin)
    return made


def both_ways(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """By torch's operators, and through the twin."""
    found = []
    for fits in (False, True):
        model.zero_grad()
        monkeypatch.setattr(combine, "fits", lambda x_TC, thin, fits=fits: fits)
        found.append({n: t.clone() for n, t in results(model, x).items()})
    return found


def assert_alike(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch, near: float) -> None:
    plain, found = both_ways(model, x, monkeypatch)
    assert plain.keys() == found.keys()
    for name, tensor in plain.items():
        atol = near * float(tensor.abs().max())
        torch.testing.assert_close(
            found[name], tensor, rtol=near, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def in_fp8(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, FrozenLinear):
            module.products = Fp8Products()
    return model


RANK = 4
WAYS: dict[str, tuple[tuple[str | None, ...], Calls]] = {
    "map": (("map",) * 3, [(3, True, 3 * RANK)]),
    # what can be added as it is multiplied is one of the arrays
    "lora-bare-map": (("lora", None, "map"), [(2, True, 2 * RANK)]),
    "lora": (("lora",) * 3, []),  # written first, and added to
    "map-dora": (("map-dora",) * 3, []),
    "map-ssl-map": (("map", "ssl", "map"), []),  # a scale of columns takes the plain way
}


@pytest.mark.parametrize("name", WAYS)
def test_members_of_one_x(name: str, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    variants, expected = WAYS[name]
    # float64: another order of sums, and nothing else
    assert_alike(holder(*variants).double(), inputs(), monkeypatch, 1e-12)
    assert calls == expected


@pytest.mark.parametrize(
    ("variants", "expected"),
    [
        (("lora",) * 3, [*[(1, False, RANK)] * 3, (3, False, 3 * RANK)]),
        (("map",) * 3, [*[(1, False, RANK)] * 3, (3, True, 3 * RANK)]),
        ((None,) * 3, [(3, False, 0)]),
    ],
    ids=["lora", "map", "bare"],
)
def test_products_that_cannot_add(
    variants: tuple[str | None, ...], expected: Calls, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both passes: the thin branch comes after the product, and the products after one another."""
    model = in_fp8(holder(*variants, base_name="nf4-dq"))
    assert_alike(model, inputs(torch.float32), monkeypatch, 1e-5)  # float32, rounded at other places
    assert calls == expected


def test_one_linear_alone_and_one_after_dropout(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combine, "fits", lambda x_TC, thin: True)
    model = holder("map", "map", "map").double()
    x = inputs().requires_grad_(True)
    model.q(x).sum().backward()
    assert calls == [(1, True, RANK)]
    calls.clear()
    dropping = holder("map", "map", "map", dropout=0.5).double().train()
    dropping.q(x).sum().backward()
    assert calls == []


def test_nothing_is_put_aside_for_an_x_that_needs_no_slope(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(combine, "fits", lambda x_TC, thin: True)
    model = holder("map", "map", "map").double()
    model(inputs()).sum().backward()
    assert calls == [] and all(m.a.grad is not None for m in (model.q, model.k, model.v))


def test_more_parts_than_one_pass_takes(calls: Calls) -> None:
    """The first three become one; what adds needs room as well; dots are found where they were asked for."""
    draw = torch.Generator().manual_seed(0)
    x, *parts = (torch.randn(6, 8, generator=draw, dtype=torch.float64) for _ in range(6))
    for adds_at in range(5):
        slope, places = Slope(x, True, None, in_one_pass=True), {}
        for k, part in enumerate(parts):
            if k == adds_at:
                slope.add(lambda into, p=part: p.clone() if into is None else into.add_(p), adds=True)
            elif k % 2:
                slope.add_own(part.clone())
            else:
                places[k] = slope.dot_and_add(part.clone())
        slope.finish(None)
        assert slope.sum_TI is not None
        torch.testing.assert_close(slope.sum_TI, sum(parts), rtol=1e-12, atol=1e-12)
        for k, place in places.items():
            torch.testing.assert_close(slope.dots[place], (parts[k] * x).sum(), rtol=1e-12, atol=1e-12)
    assert all(num <= combine.MOST for num, _, _ in calls)


def test_a_cpu_takes_the_plain_way() -> None:
    x = torch.randn(4, 32)
    assert not combine.fits(x, None)
    y, left, right = torch.randn(4, 32), torch.randn(4, 2), torch.randn(2, 32)
    expected = torch.addmm(y, left, right)
    assert combine.add_product_(y, left, right) is y and torch.equal(y, expected)


SIZES = ((8192, 4096), (2048, 11008), (1000, 300), (1, 64))
CASES = (
    (1, False, 16, True),
    (1, False, 192, True),
    (1, True, 16, False),
    (2, True, 32, False),
    (3, False, 0, False),
    (3, False, 48, False),
    (3, True, 48, False),
)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("num", "dots", "inner", "tall"), CASES)
def test_the_kernel_on_a_gpu(
    size: tuple[int, int], num: int, dots: bool, inner: int, tall: bool, dtype: torch.dtype
) -> None:
    cuda = torch.device("cuda", 0)
    like = torch.empty(size, device=cuda, dtype=dtype)
    left, right = like.new_empty(size[0], inner), like.new_empty(inner, size[1])
    if not combine.fits(like, (left, right) if inner else None):
        assert dtype == torch.float32 and inner > 32, combine.PROVED.reason(cuda, dtype)
        return
    combine.example(cuda, dtype, num=num, dots=dots, inner=inner, tall=tall, size=size)


@pytest.mark.gpu
def test_the_same_input_gives_the_same_bits_on_a_gpu() -> None:
    draw = torch.Generator().manual_seed(0)
    *owns, x = (torch.randn(3000, 4096, generator=draw).cuda().bfloat16() for _ in range(4))
    thin = torch.randn(3000, 48).cuda().bfloat16(), torch.randn(48, 4096).cuda().bfloat16()
    found = []
    for _ in range(3):
        given = [own.clone() for own in owns]
        dots = combine.add_(given, x, thin)
        assert dots is not None
        found.append((given[0], dots))
        assert all(torch.equal(a, b) for a, b in zip(given[1:], owns[1:], strict=True))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["map", "lora"])
@pytest.mark.parametrize("fp8", [False, True])
def test_a_node_on_a_gpu_is_no_further_from_float32_than_torchs_operators(
    variant: str, fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16; with fp8, whose rounding is the same both ways, beside each other."""
    members = []
    for seed in range(3):
        base = Nf4Linear(512, 192, block_size=64, double_quant=True, bias_dtype=None)
        draw = torch.Generator().manual_seed(seed)
        rows = base.pack(0.05 * torch.randn(192, 512, generator=draw))
        for parameter, packed in zip(base.storage(), rows, strict=True):
            parameter.data.copy_(packed)
        members.append(trained_away_from_start(make_adapter(variant, base)))
    model = Holder(*members).cuda()
    join(model, [NAMES])
    x = torch.randn(2000, 512, generator=torch.Generator().manual_seed(3)).cuda().bfloat16()
    fits, ways = combine.fits, []
    for used in (False, True):
        model.zero_grad()
        monkeypatch.setattr(combine, "fits", fits if used else lambda x_TC, thin: False)
        ways.append({n: t.double() for n, t in results(in_fp8(model) if fp8 else model, x).items()})
    model.zero_grad()
    plain, found = ways
    exact = plain if fp8 else {n: t.double() for n, t in results(model, x.float()).items()}
    for kind in sorted({name.rpartition(".")[2] for name in exact}):
        # of all members: a slope of one number may be what is left of a sum that cancels
        right, near, before = (
            torch.cat([t.flatten() for name, t in way.items() if name.rpartition(".")[2] == kind])
            for way in (exact, found, plain)
        )
        apart, bound = (near - right).norm() / right.norm(), float((before - right).norm() / right.norm())
        assert apart <= (2e-2 if fp8 else max(1.2 * bound, 1e-3)), f"{kind}: {apart:.2e}, {bound:.2e}"


def test_the_padded_inner_size() -> None:
    assert [combine.padded(k) for k in (0, 1, 16, 17, 48, 192)] == [16, 16, 16, 32, 64, 256]
