"""silu(gate) * up with branches added in passing: the kernels, and the node of autograd that they stand in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_joint import IN, JOINABLE, OUT, member
from torch import Tensor, nn

from decompft.adapters.base import Adapter
from decompft.adapters.joint import join, together
from decompft.adapters.kernels import swiglu as kernel

NAMES = ("gate", "up")
DTYPES = (torch.bfloat16, torch.float16)
RANKS = ((16, 16), (5, 0), (0, 48), (0, 0), (kernel.MAX_RANK, 3))
SHAPES = ((1, 1), (3, 129), (300, 272), (1000, 11008))
TOKENS = 6


class Twins:
    """In the kernels' place, on a CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.branches: list[tuple[bool, bool]] = []  # of each forward pass
        self.dots: list[tuple[bool, bool]] = []  # of each backward pass
        monkeypatch.setattr(kernel, "fits", lambda x: True)
        monkeypatch.setattr(kernel, "forward", self.forward)
        monkeypatch.setattr(kernel, "backward", self.backward)

    def forward(self, gate_TO: Tensor, up_TO: Tensor, *branches: kernel.Branch | None) -> Tensor:
        assert gate_TO.dim() == 2 and gate_TO.is_contiguous() and up_TO.is_contiguous()
        self.branches.append((branches[0] is not None, branches[1] is not None))
        return kernel.plain_forward(gate_TO, up_TO, *branches)

    def backward(self, dy: Tensor, gate: Tensor, up: Tensor, *rest: Any) -> Any:
        assert dy.is_contiguous() and dy.shape == gate.shape == up.shape
        self.dots.append(rest[-1])
        return kernel.plain_backward(dy, gate, up, *rest)


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> Twins:
    return Twins(monkeypatch)


def drawn(*sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=draw).to(dtype) for size in sizes]


# --- the twins ---


@pytest.mark.parametrize("ranks", RANKS)
def test_the_twins_are_autograds(ranks: tuple[int, int]) -> None:
    gate, up, dy = drawn((7, 40), (7, 40), (7, 40))
    branches = [tuple(drawn((7, r), (40, r))) if r else None for r in ranks]
    given = [t.clone().requires_grad_() for t in (gate, up)]
    whole = [y if b is None else y + b[0] @ b[1].T for y, b in zip(given, branches, strict=True)]
    expected = nn.functional.silu(whole[0]) * whole[1]
    torch.testing.assert_close(kernel.plain_forward(gate, up, *branches), expected.detach())
    slopes = torch.autograd.grad(expected, given, dy)
    for dots in ((False, False), (True, False), (True, True)):
        arrays = gate.clone(), up.clone()
        sums = kernel.plain_backward(dy, *arrays, *branches, dots)
        for array, slope, was, found, is_wanted in zip(arrays, slopes, (gate, up), sums, dots, strict=True):
            torch.testing.assert_close(array, slope)
            assert (found is not None) == is_wanted
            if found is not None:
                torch.testing.assert_close(found, (slope * was).sum(0))


def test_a_cpu_takes_the_plain_way() -> None:
    assert not kernel.fits(torch.randn(7, 40, dtype=torch.bfloat16))


def test_which_branches_are_taken() -> None:
    h, w = drawn((7, 80), (40, 80), dtype=torch.bfloat16)
    assert kernel.takes(h[:, 8:24], w[:, :16].contiguous())
    assert not kernel.takes(h, w), "a rank above the largest"
    assert not kernel.takes(h[:, :0], w[:, :0]), "none"
    assert not kernel.takes(h[:, :16], w[:, :16].float())
    assert not kernel.takes(h[:, :16], w[:16].T), "ranks lie apart"


# --- the node ---


class Gated(nn.Module):
    def __init__(self, gate: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.gate, self.up = gate, up

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.gate(x)) * self.up(x)


def pair(*variants: str | None, base_name: str = "dense-fp32", joined: bool = True, **kwargs: Any) -> Gated:
    made = Gated(*(member(v, base_name, seed, **kwargs) for seed, v in enumerate(variants)))
    assert not joined or join(made, [NAMES]) == 1
    return made


def slopes(made: Gated, *, as_one: bool, dy: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    x, drawn_dy = drawn((2, TOKENS, IN), (2, TOKENS, OUT), dtype=torch.float32)
    x.requires_grad_()
    if as_one:
        found = together(x, (made.gate, made.up))
        assert found is not None
        y, again = found
        assert torch.equal(again(), y.detach())
    else:
        y = made(x)
    y.backward(drawn_dy if dy is None else dy)
    grads = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
    made.zero_grad()
    return y.detach(), grads | {"x": x.grad}


def assert_close(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, slope in expected[1].items():
        apart = float((found[1][name] - slope).norm())
        assert apart <= 2e-5 * float(slope.norm()) + 1e-6, name


@pytest.mark.parametrize("base_name", ["dense-fp32", "nf4-dq"])
@pytest.mark.parametrize("variant", JOINABLE)
def test_every_method_has_the_slopes_of_branches_that_are_written(twins: Twins, variant, base_name) -> None:
    made = pair(variant, variant, base_name=base_name)
    assert_close(slopes(made, as_one=True), slopes(made, as_one=False))
    assert len(twins.branches) == 2  # once to see that it is made again as it was


def test_a_slope_that_is_one_number_is_written_out_for_the_kernel(twins: Twins) -> None:
    made, ones = pair("lora", "dora"), torch.ones(()).expand(2, TOKENS, OUT)
    assert_close(slopes(made, as_one=True, dy=ones), slopes(made, as_one=False, dy=ones))


@pytest.mark.parametrize("variants", [("lora", None), (None, "map"), ("dora", "lora")])
def test_members_may_differ(twins: Twins, variants) -> None:
    made = pair(*variants)
    assert_close(slopes(made, as_one=True), slopes(made, as_one=False))
    assert set(twins.branches) == {(variants[0] is not None, variants[1] is not None)}


def test_branches_that_are_not_taken_are_written(twins: Twins, monkeypatch) -> None:
    monkeypatch.setattr(kernel, "takes", lambda h, w: False)
    made = pair("lora", "map")
    assert_close(slopes(made, as_one=True), slopes(made, as_one=False))
    assert set(twins.branches) == {(False, False)}


def test_only_a_rows_slope_wants_dots(twins: Twins) -> None:
    for variants, wanted in (
        (("lora", "map"), (False, False)),
        (("dora", "dora"), (True, True)),
        (("lora", "ssb"), (False, True)),
    ):
        slopes(pair(*variants, base_name="nf4-dq"), as_one=True)
        assert twins.dots.pop() == wanted, variants


def test_a_biased_linear_is_kept_without_its_bias(twins: Twins) -> None:
    made = pair("dora", "dora", base_name="nf4-dq")
    bias = torch.linspace(-1, 1, OUT)
    for linear in (made.gate, made.up):
        linear.base.bias = nn.Parameter(bias.clone(), requires_grad=False)
    assert_close(slopes(made, as_one=True), slopes(made, as_one=False))
    assert twins.dots == [(False, False)]


def test_what_computes_alone_is_not_put_together(twins: Twins) -> None:
    x = torch.randn(TOKENS, IN)
    apart = pair("lora", "lora", joined=False)
    assert together(x, (apart.gate, apart.up)) is None
    drops = pair("lora", "lora", dropout=0.5)
    assert together(x, (drops.gate, drops.up)) is None
    assert together(x, (drops.eval().gate, drops.up)) is not None
    other = pair("lora", "lora")
    assert together(x, (drops.gate, other.up)) is None
    assert isinstance(other.gate, Adapter)


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("size", SHAPES)
def test_kernels_on_a_gpu(size: tuple[int, int], ranks: tuple[int, int], dtype: torch.dtype) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.zeros(size, device=device, dtype=dtype)
    assert kernel.fits(x), kernel.PROVED.reason(device, dtype)
    kernel.example(device, dtype, size, ranks)


@pytest.mark.gpu
def test_what_does_not_fit_on_a_gpu() -> None:
    x = torch.zeros(4, 8, device="cuda", dtype=torch.bfloat16)
    assert kernel.fits(x)
    assert not kernel.fits(x.float()) and not kernel.fits(x[:0])
