"""LoRA-Init and LoRA-TSD as METHODS 2.4 reads them: what the switch takes from the base, A and B start from."""

import pytest
import torch
from test_adapter_contract import IN, OUT, RANK, config_of, make_base, start, trained_away_from_start
from test_adapter_dash import launch

from decompft.adapters.inject import make_adapter
from decompft.adapters.spec import ADAPTER_SPECS

S = 8.0 / RANK
METHODS = ["lora_init", "lora_tsd"]


@pytest.fixture
def weight() -> torch.Tensor:
    return 0.05 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(7, IN, generator=torch.Generator().manual_seed(3))


def learned(method, frozen, weight, **options):
    """After the first phase."""
    return trained_away_from_start(start(make_adapter(frozen, config_of(method, **options)), weight))


def rewrite(adapter, weight):
    """As a resumed run and an inference do it, from the buffers alone."""
    values = {n: b.clone() for n, b in adapter.named_buffers(recurse=False)}
    with torch.no_grad():
        packed = adapter.base.pack(adapter.base_rows(weight, 0, values))
        for parameter, rows in zip(adapter.base.storage(), packed, strict=True):
            parameter.copy_(rows)


def taken(adapter, weight):
    """sum_{i in T} S_i u_i v_i^T in float64."""
    U, sigma, Vt = torch.linalg.svd(weight.double(), full_matrices=False)
    T = adapter.indices.long()[:RANK]
    return (U[:, T] * sigma[T]) @ Vt[T]


@pytest.mark.parametrize("method", METHODS)
def test_what_the_switch_takes_is_what_the_factors_start_from(method, weight):
    adapter = learned(method, make_base("nf4", weight), weight)
    launch(adapter, weight)
    assert torch.equal(adapter.A, adapter.A0) and torch.equal(adapter.B, adapter.B0)
    B, A = adapter.B.detach().double(), adapter.A.detach().double()
    torch.testing.assert_close(S * B @ A, taken(adapter, weight), rtol=1e-4, atol=1e-6)
    # the square root is shared: N(B0 column) = N(A0 row)
    torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base_name", ["dense-fp32", "nf4", "int8"])
def test_exact_is_the_base_again_after_the_switch(method, base_name, weight, x):
    base = make_base(base_name, weight)
    adapter = learned(method, base, weight)
    assert not torch.allclose(adapter(x), base(x), atol=1e-3)
    launch(adapter, weight)
    torch.testing.assert_close(adapter(x), base(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_residual_stores_the_rest_of_the_full_precision_weight(method, weight, x):
    adapter = learned(method, make_base("dense-fp32", weight), weight, base="residual")
    launch(adapter, weight)
    rewrite(adapter, weight)
    rest = weight.double() - taken(adapter, weight)
    torch.testing.assert_close(adapter.base.dense(torch.float64), rest, rtol=1e-4, atol=1e-6)
    whole = torch.nn.functional.linear(x, weight, adapter.base.bias)
    torch.testing.assert_close(adapter(x), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_residual_quantizes_the_rest_and_not_the_whole(method, weight):
    adapter = learned(method, make_base("nf4", weight), weight, base="residual")
    before = adapter.base.dense(torch.float32)
    rewrite(adapter, weight)  # a run resumed before the switch
    assert torch.equal(adapter.base.dense(torch.float32), before)
    launch(adapter, weight)
    rewrite(adapter, weight)
    rest = (weight.double() - taken(adapter, weight)).float()
    expected = make_base("nf4", rest).dense(torch.float32)
    # a number on the edge between two codes may fall on either side
    same = torch.isclose(adapter.base.dense(torch.float32), expected, rtol=1e-4, atol=1e-6)
    assert same.float().mean() > 0.999


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kept", ["exact", "residual"])
def test_forward_is_the_equation(method, kept, weight, x):
    adapter = learned(method, make_base("nf4", weight), weight, base=kept)
    launch(adapter, weight)
    rewrite(adapter, weight)
    trained_away_from_start(adapter)
    tensors = {
        n: t.double() for n, t in adapter.state_dict(keep_vars=True).items() if not n.startswith("base.")
    }
    W = adapter.base.dense(torch.float64) + S * tensors["B"] @ tensors["A"]
    if kept == "exact":
        W = W - S * tensors["B0"] @ tensors["A0"]
    if method == "lora_tsd":
        W = W + tensors["U_T"] * tensors["c"] @ tensors["V_T"].T
    y = x.double() @ W.T + adapter.base.bias.double()
    torch.testing.assert_close(adapter(x).double(), y, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    names = list(adapter.shapes)
    expected = {n: getattr(adapter, n).grad.clone() for n in names}
    adapter.zero_grad()
    adapter(x).square().sum().backward()
    for name in names:
        torch.testing.assert_close(getattr(adapter, name).grad, expected[name], rtol=1e-4, atol=1e-3)


def test_dash_takes_the_first_of_the_same_directions(weight):
    adapter = learned("lora_tsd", make_base("nf4", weight), weight, num_directions=2)
    launch(adapter, weight)
    U, _, Vt = torch.linalg.svd(weight, full_matrices=False)
    first = adapter.indices.long()[:2]
    assert (adapter.U_T.T @ U[:, first]).diagonal().abs().min() > 0.9999
    assert (adapter.V_T.T @ Vt[first].T).diagonal().abs().min() > 0.9999
    assert not adapter.c.any()


def test_lora_init_trains_as_many_numbers_as_lora():
    for method, more in (("lora_init", 0), ("lora_tsd", 8)):
        config = config_of(method)
        assert ADAPTER_SPECS[method].num_params(OUT, IN, config) == RANK * (OUT + IN) + more
    assert ADAPTER_SPECS["lora_init"].is_reading and ADAPTER_SPECS["lora_tsd"].is_reading
