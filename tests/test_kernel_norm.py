"""MAP's scales from two Gram matrices: the kernel beside plain torch, which test_adapter_map.py holds to equations."""

from __future__ import annotations

import pytest
import torch
from test_adapter_contract import IN, OUT, make_adapter, make_base, trained_away_from_start
from torch import Tensor

from decompft.adapters.kernels import norm

CASES = ((1, 64, 48), (16, 4096, 4096), (16, 4096, 11008), (40, 300, 1000), (64, 11008, 4096))


def scales_by_the_twin(*given: Tensor, **options: float) -> tuple[Tensor, Tensor]:
    *scalars, AAt, BtB = norm.plain(*given, **options)
    return torch.stack([AAt, BtB]), torch.stack(scalars)


def pull_by_the_twin(A, B, grams, scalars, dq, drow, dA, dB):
    found = norm.views(grams, scalars)
    dB *= found.q
    return norm.plain_pull_(A, B, found, dq, drow, dA, dB)


def test_a_layer_takes_the_kernels_way_to_the_same_slopes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, with the twin in the kernel's place: what the layer does with its results."""
    weight = 0.05 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))
    layer = trained_away_from_start(make_adapter("map", make_base("nf4", weight)))
    x, g = torch.randn(7, IN), torch.randn(7, OUT)

    def passes() -> dict[str, Tensor]:
        layer.zero_grad()
        given = x.clone().requires_grad_(True)
        y = layer(given)
        y.backward(g)
        return {"y": y.detach(), "x": given.grad} | {
            n: p.grad for n, p in layer.named_parameters(recurse=False)
        }

    plain = passes()
    monkeypatch.setattr(norm, "fits", lambda A, B: not torch.is_grad_enabled())
    monkeypatch.setattr(norm, "scales", scales_by_the_twin)
    monkeypatch.setattr(norm, "pull_", pull_by_the_twin)
    found = passes()
    for name, tensor in plain.items():
        # float32, summed in another order
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize(("rank", "num_in", "num_out"), CASES)
def test_scales_and_slopes_on_a_gpu(rank: int, num_in: int, num_out: int) -> None:
    draw = torch.Generator().manual_seed(rank)
    A, dA = (torch.randn(rank, num_in, generator=draw).cuda() for _ in range(2))
    B, dB = (torch.randn(num_out, rank, generator=draw).cuda() for _ in range(2))
    a, b, base_norm, dq, drow = (torch.tensor([v], device="cuda") for v in (3.0, 0.7, 2.5, 0.3, -1.1))
    options = {"eps": 1e-6, "s": 2.0}
    wide = [t.double() for t in (A, B, a, b, base_norm)]
    exact = norm.plain(*wide, **options)
    slopes = [dA.double(), exact.q * dB.double()]
    of_a, of_b = norm.plain_pull_(*wide[:2], exact, dq.double(), drow.double(), *slopes)
    with torch.no_grad():
        assert norm.fits(A, B), norm.PROVED.reason(A.device, A.dtype)
        grams, scalars = norm.scales(A, B, a, b, base_norm, **options)
        found = norm.pull_(A, B, grams, scalars, dq, drow, dA, dB)
    made = (*norm.views(grams, scalars), *found, dA, dB)
    for one, right in zip(made, (*exact, of_a, of_b, *slopes), strict=True):
        # float32 sums of up to 11008 terms, over 32 stretches
        torch.testing.assert_close(one.double(), right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))
    again = norm.scales(A, B, a, b, base_norm, **options)
    assert torch.equal(again[0], grams)
    for one, same in zip(norm.views(*again), norm.views(grams, scalars), strict=True):
        assert torch.equal(one, same)


def test_what_is_differentiated_or_on_a_cpu_takes_the_plain_way() -> None:
    A, B = torch.randn(4, 32), torch.randn(16, 4)
    with torch.no_grad():
        assert not norm.fits(A, B)
    assert not norm.fits(A.requires_grad_(), B)
