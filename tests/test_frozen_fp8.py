"""The fp8 base: each weight is the nearest e4m3 number of its row's scale."""

import pytest
import torch

from decompft.adapters.frozen.fp8 import Fp8Linear


def e4m3() -> torch.Tensor:
    """All positive numbers of the format from its definition (Micikevicius et al., 2022, arXiv:2209.05433)."""
    subnormal = [m / 8 * 2.0**-6 for m in range(8)]
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    return torch.tensor((subnormal + normal)[:-1], dtype=torch.float64)  # the last code is NaN


def used(rows: torch.Tensor) -> torch.Tensor:
    made = Fp8Linear(rows.shape[1], rows.shape[0], bias_dtype=None)
    return made.unpack(made.pack(rows), torch.float64)


@pytest.fixture(params=[256, 127])
def rows(request) -> torch.Tensor:
    made = torch.randn(12, request.param, generator=torch.Generator().manual_seed(0))
    return made * torch.logspace(-6, 3, 12)[:, None] * made.abs() ** 3  # many binades in a row


def test_each_weight_is_the_nearest_number(rows):
    exact = rows.double()
    scale = exact.abs().amax(1, keepdim=True) / 448
    found, table = used(rows), e4m3()
    assert table[-1] == 448
    distance = ((exact / scale).abs()[..., None] - table).abs().amin(-1) * scale
    # the float32 quotient may pick the other of two numbers that are equally near
    assert ((found - exact).abs() <= distance + 1e-6 * exact.abs()).all()


def test_error_is_a_sixteenth_or_near_zero_a_thousandth_of_the_scale(rows):
    exact = rows.double()
    scale = exact.abs().amax(1, keepdim=True) / 448
    error = (used(rows) - exact).abs()
    assert (error <= torch.maximum(exact.abs() / 16, scale / 1024) * (1 + 1e-6)).all()
    assert (error > exact.abs() / 64).any()  # the bound is of the right size


def test_the_largest_weight_of_a_row_is_kept(rows):
    place = rows.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(used(rows).gather(1, place), rows.double().gather(1, place), rtol=1e-6, atol=0)


def test_bfloat16_holds_every_code():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(codes.to(torch.bfloat16).double().nan_to_num(), codes.double().nan_to_num())
