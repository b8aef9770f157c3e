"""The int8 base: rows in steps of absmax / 127, and the product with outliers apart."""

import pytest
import torch
from test_adapter_contract import make_adapter, trained_away_from_start

from decompft.adapters.frozen.int8 import Int8Linear

THRESHOLD = 6.0


def layer(rows: torch.Tensor, **options: float) -> Int8Linear:
    made = Int8Linear(rows.shape[1], rows.shape[0], bias_dtype=None, **options)
    for parameter, values in zip(made.storage(), made.pack(rows), strict=True):
        parameter.copy_(values)
    return made


@pytest.fixture
def rows() -> torch.Tensor:
    return 0.02 * torch.randn(12, 256, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def x() -> torch.Tensor:
    """Tokens with outliers in two inputs, as a trained model's hidden states have them."""
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(1))
    x[2, 40], x[5, 40], x[6, 200] = 80.0, -60.0, 9.0
    return x


def steps(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 (n, k) -> whole steps of each row, and the step (n, 1)."""
    step = values.abs().amax(1, keepdim=True) / 127
    return (values / step).round(), step


def outlier_product(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """Dettmers et al. 2022, equation 8, in float64: outlier inputs apart, the others token by token in int8."""
    out = (x.abs() >= THRESHOLD).any(0)
    whole, step = steps(torch.where(out, 0, x))
    W_whole, W_step = steps(W)
    return (whole @ W_whole.T) * step * W_step.T + x[:, out] @ (W_whole * W_step)[:, out].T


@pytest.mark.parametrize("in_", [256, 127])
def test_each_weight_is_within_half_a_step(in_):
    rows = torch.randn(12, in_, generator=torch.Generator().manual_seed(0))
    whole, step = steps(rows.double())
    used = layer(rows).dense(torch.float64)
    # the float32 quotient may move a tie: half a step and 127 roundings of float32
    assert ((used - rows.double()).abs() <= step / 2 * (1 + 1e-4)).all()
    torch.testing.assert_close(used, whole * step, rtol=1e-6, atol=0)


def test_the_largest_weight_of_a_row_is_kept(rows):
    place = rows.abs().argmax(1, keepdim=True)
    used = layer(rows).dense(torch.float64)
    torch.testing.assert_close(used.gather(1, place), rows.double().gather(1, place), rtol=1e-12, atol=0)


def test_rows_that_bitsandbytes_quantized_are_stored_without_loss(rows):
    import bitsandbytes.functional as bnb

    codes, absmax, _ = bnb.int8_vectorwise_quant(rows.half())
    made = layer(rows)
    used = made.unpack(made.store(codes, absmax[:, None]), torch.float64)
    assert torch.equal(used, codes.double() * (absmax.double()[:, None] / 127))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_product_with_outliers_apart_is_the_formula(rows, x, dtype):
    # numbers that float16 and bfloat16 both hold: the operators take float16
    x = x.bfloat16().to(dtype)
    y = layer(rows, outlier_threshold=THRESHOLD)(x)
    assert y.dtype == dtype
    expected = outlier_product(x.double(), rows.double())
    # bitsandbytes' CPU constant for 1 / 127**2 is 2e-5 off; in bfloat16 the result is rounded twice
    rtol = 2**-7 if dtype == torch.bfloat16 else 5e-5
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=rtol)


def test_outliers_apart_are_nearer_than_outliers_in_int8(rows, x):
    W = rows.double()
    exact = x.double() @ W.T
    found = layer(rows, outlier_threshold=THRESHOLD)(x)
    everything = layer(rows, outlier_threshold=1e6)(x)  # no number is an outlier
    error, error_without = (torch.linalg.norm(y.double() - exact) for y in (found, everything))
    assert error < 0.5 * error_without
    assert error / torch.linalg.norm(exact) < 0.02


@pytest.mark.parametrize("tokens", [1, 5])
def test_tokens_without_outliers_and_tokens_of_zeros(rows, tokens):
    x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(2)).clamp(-4, 4)
    x[0] = 0
    y = layer(rows, outlier_threshold=THRESHOLD)(x)
    assert not y[0].any()
    if tokens > 1:
        torch.testing.assert_close(
            y[1:].double(), outlier_product(x.half().double(), rows.double())[1:], rtol=5e-5, atol=5e-5
        )


@pytest.mark.parametrize("in_", [127, 130])
def test_outliers_in_odd_widths(in_):
    rows = torch.randn(8, in_, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, in_, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    x[1, in_ - 1] = 50.0
    y = layer(rows, outlier_threshold=THRESHOLD)(x)
    torch.testing.assert_close(y.double(), outlier_product(x.double(), rows.double()), rtol=5e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_input_is_left_alone(rows, x, dtype):
    """Other layers have saved it for their backward pass, and autograd counts writes."""
    x = x.to(dtype)
    before, version = x.clone(), x._version
    layer(rows, outlier_threshold=THRESHOLD)(x)
    assert torch.equal(x, before) and x._version == version


def test_backward_is_that_of_the_dequantized_weight(rows, x):
    made = layer(rows, outlier_threshold=THRESHOLD)
    x.requires_grad_(True)
    y = made(x)
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    y.backward(probe)
    torch.testing.assert_close(x.grad, probe @ made.dense(torch.float32), rtol=1e-5, atol=1e-6)


def test_map_scales_the_product_with_outliers_apart(x):
    """p W x + q B A x: p multiplies the int8 part and the outliers' part alike."""
    rows = 0.05 * torch.randn(24, 128, generator=torch.Generator().manual_seed(0))
    x = x[:, :128].bfloat16().float()
    adapter = trained_away_from_start(make_adapter("map", layer(rows, outlier_threshold=THRESHOLD)))
    with torch.no_grad():
        adapter.a.mul_(-3)
    found = adapter.effective(torch.empty(0))
    thin = found.q * ((x @ adapter.A.T) @ adapter.B.T)
    expected = found.row.double() * outlier_product(x.double(), rows.double()) + thin.double()
    torch.testing.assert_close(adapter(x).double(), expected, rtol=1e-4, atol=1e-3)
