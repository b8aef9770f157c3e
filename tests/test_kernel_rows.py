"""DoRA's norms of rows and its factors: the kernel beside plain torch, which test_adapter_dora.py checks."""

from __future__ import annotations

import pytest
import torch

from decompft.adapters.kernels import rows


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
