"""DoRA's norms of rows and its factors: the kernel beside plain torch, which test_adapter_dora.py checks."""

from __future__ import annotations

import pytest
import torch
from test_adapter_contract import IN, OUT, make_adapter, make_base, trained_away_from_start
from torch import Tensor

from decompft.adapters.kernels import rows


def test_a_layer_takes_the_kernels_way_to_the_same_slopes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, with the twin in the kernel's place: what the layer does with its results."""
    weight = 0.05 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))
    layer = trained_away_from_start(make_adapter("dora", make_base("nf4", weight)))
    x, g = torch.randn(7, IN), torch.randn(7, OUT)

    def passes() -> dict[str, Tensor]:
        layer.zero_grad()
        given = x.clone().requires_grad_(True)
        y = layer(given)
        y.backward(g)
        return {"y": y.detach(), "x": given.grad} | {
            n: p.grad for n, p in layer.named_parameters(recurse=False)
        }

    plain, merged = passes(), layer.merged(layer.base.dense(torch.float32))
    monkeypatch.setattr(rows, "fits", lambda A, B: not torch.is_grad_enabled())
    monkeypatch.setattr(rows, "factors", rows.plain)
    monkeypatch.setattr(rows, "pull_", rows.plain_pull_)
    found = passes()
    for name, tensor in plain.items():
        # float32, summed in the same order
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6 * float(tensor.abs().max()))
    torch.testing.assert_close(layer.merged(layer.base.dense(torch.float32)), merged)


@pytest.mark.gpu
@pytest.mark.parametrize(("rank", "num_out"), [(1, 48), (16, 4096), (16, 11008), (40, 1000), (64, 4096)])
def test_factors_and_slopes_on_a_gpu(rank: int, num_out: int) -> None:
    draw = torch.Generator().manual_seed(rank)
    W, A = (
        torch.randn(num_out, 512, generator=draw).cuda(),
        0.1 * torch.randn(rank, 512, generator=draw).cuda(),
    )
    B, dup = (torch.randn(num_out, rank, generator=draw).cuda() for _ in range(2))
    m, drow = torch.rand(num_out, generator=draw).cuda(), torch.randn(num_out, generator=draw).cuda()
    given = [
        W.double() @ A.double().T,
        A.double() @ A.double().T,
        B.double(),
        W.double().square().sum(1),
        m.double(),
    ]
    exact, wide = rows.plain(*given, 0.5), dup.double()
    dm = rows.plain_pull_(wide, B.double(), drow.double(), exact.n, exact.per_B, 0.5)
    with torch.no_grad():
        assert rows.fits(A, B), rows.PROVED.reason(A.device, A.dtype)
        found = rows.factors(*(t.float() for t in given), 0.5)
        found_dm = rows.pull_(dup, B, drow, found.n, found.per_B, 0.5)
    for one, right in zip((*found, found_dm, dup), (*exact, dm, wide), strict=True):
        # float32 sums of up to 64 terms of a square that is larger than its terms
        torch.testing.assert_close(one.double(), right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))


def test_at_zero_n_is_the_root_of_the_squares() -> None:
    squares, m = torch.rand(7) + 1, torch.rand(7)
    found = rows.plain(torch.randn(7, 3), torch.randn(3, 3), torch.zeros(7, 3), squares, m, 2.0)
    assert torch.equal(found.n, squares.sqrt()) and torch.equal(found.row, m / squares.sqrt())


def test_what_is_differentiated_or_on_a_cpu_takes_the_plain_way() -> None:
    A, B = torch.randn(4, 32), torch.randn(16, 4)
    with torch.no_grad():
        assert not rows.fits(A, B)
    assert not rows.fits(A.requires_grad_(), B)
