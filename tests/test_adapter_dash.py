"""LoRA-Dash against its equation, written out again in float64 (METHODS 2.4; 1.3, identity 6)."""

import pytest
import torch
from pydantic import ValidationError
from test_adapter_contract import IN, OUT, RANK, config_of, make_adapter, make_base, trained_away_from_start

from decompft.adapters import spectra
from decompft.adapters.launched import scores
from decompft.adapters.spec import ADAPTER_SPECS, AdapterConfig
from decompft.launcher.options import options_of

S = 8.0 / RANK
K = 8


@pytest.fixture
def weight() -> torch.Tensor:
    return 0.05 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(7, IN, generator=torch.Generator().manual_seed(3))


def launch(adapter, weight):
    """As between two steps of a run, over the full-precision weight."""
    found = adapter.directions(weight, adapter.A.detach(), adapter.B.detach(), lambda kind, k, make: make())
    with torch.no_grad():
        for name, value in adapter.launched(found).items():
            getattr(adapter, name).copy_(value)
    return found


def dense_scores(adapter, weight):
    """u_i^T (s B A) v_i of the dense product, all in float64."""
    U, sigma, Vt = torch.linalg.svd(weight.double(), full_matrices=False)
    D = S * adapter.B.detach().double() @ adapter.A.detach().double()
    return (U.T @ D @ Vt.T).diagonal().abs() / (sigma + 1e-6)


def test_scores_are_those_of_the_dense_product(weight):
    adapter = trained_away_from_start(make_adapter("lora_dash", make_base("nf4", weight)))
    U, sigma, V = spectra.full(weight)
    found = scores(U.T, sigma, V.T, adapter.A.detach(), adapter.B.detach(), s=S, eps=1e-6)
    torch.testing.assert_close(found.double(), dense_scores(adapter, weight), rtol=1e-4, atol=1e-6)


def test_directions_are_the_ones_that_score_highest(weight):
    adapter = trained_away_from_start(make_adapter("lora_dash", make_base("nf4", weight)))
    found = launch(adapter, weight)
    best = dense_scores(adapter, weight).topk(K).indices
    assert found["indices"].long().tolist() == best.tolist() == adapter.indices.long().tolist()
    W = weight.double()
    # u_i^T W v_i = S_i: they are singular pairs of the full-precision weight
    coordinates = (adapter.U_T.double().T @ W @ adapter.V_T.double()).diagonal()
    torch.testing.assert_close(coordinates, torch.linalg.svdvals(W)[best], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("base_name", ["dense-fp32", "nf4"])
def test_forward_is_the_equation(base_name, weight, x):
    adapter = trained_away_from_start(make_adapter("lora_dash", make_base(base_name, weight)))
    launch(adapter, weight)
    trained_away_from_start(adapter)
    A, B, c, U, V = (getattr(adapter, n).double() for n in ("A", "B", "c", "U_T", "V_T"))
    W = adapter.base.dense(torch.float64) + S * B @ A
    for i in range(K):
        W = W + c[i] * torch.outer(U[:, i], V[:, i])
    y = x.double() @ W.T + (0 if adapter.base.bias is None else adapter.base.bias.double())
    # float32 sums over 128 products: 2**-24 * sqrt(128) relative, times a few
    torch.testing.assert_close(adapter(x).double(), y, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    expected = {n: getattr(adapter, n).grad.clone() for n in ("A", "B", "c")}
    adapter.zero_grad()
    adapter(x).square().sum().backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(getattr(adapter, name).grad, gradient, rtol=1e-4, atol=1e-3)


def test_the_switch_changes_nothing_by_itself(weight, x):
    adapter = trained_away_from_start(make_adapter("lora_dash", make_base("nf4", weight)))
    with torch.no_grad():
        adapter.c.zero_()
    before = adapter(x)
    launch(adapter, weight)
    torch.testing.assert_close(adapter(x), before, rtol=1e-6, atol=1e-6)


def test_coordinates_have_a_slope_only_after_the_switch(weight, x):
    adapter = make_adapter("lora_dash", make_base("nf4", weight))
    with torch.no_grad():
        adapter.B.normal_(generator=torch.Generator().manual_seed(1))
    adapter(x).square().sum().backward()
    assert not adapter.c.grad.any()
    assert adapter.asleep(99) == ("c",) and adapter.asleep(100) == ()
    launch(adapter, weight)
    adapter.zero_grad()
    adapter(x).square().sum().backward()
    assert adapter.c.grad.all()


def test_a_weight_of_low_rank_has_finite_scores(weight):
    """The authors' code divides by S alone: a direction that the weight does not have scores infinity."""
    low = weight[:, :5] @ torch.randn(5, IN, generator=torch.Generator().manual_seed(4))
    adapter = trained_away_from_start(make_adapter("lora_dash", make_base("nf4", weight)))
    found = launch(adapter, low)
    assert all(torch.isfinite(t).all() for t in found.values())


@pytest.mark.parametrize("method", ["lora_dash", "lora_init", "lora_tsd"])
def test_directions_that_the_weight_does_not_have_are_taken_last(method, weight):
    """Their singular values are rounding, and so small under the score that they would all win."""
    rank = 12
    factors = torch.randn(rank, IN, generator=torch.Generator().manual_seed(4))
    low = (weight[:, :rank].double() @ factors.double()).float()
    adapter = trained_away_from_start(make_adapter(method, make_base("nf4", weight)))
    best = dense_scores(adapter, low)
    found = launch(adapter, low)
    T = found["indices"].long()
    assert T.tolist() == best[:rank].topk(len(T)).indices.tolist()
    assert best[rank:].max() > best[:rank].max()  # what a small eps alone does not prevent
    torch.testing.assert_close(found["scores"].double(), best[T], rtol=1e-3, atol=0)


def test_directions_that_the_weight_does_not_have_fill_up_what_others_cannot(weight):
    low = weight[:, :5] @ torch.randn(5, IN, generator=torch.Generator().manual_seed(4))
    adapter = trained_away_from_start(make_adapter("lora_dash", make_base("nf4", weight)))
    T = launch(adapter, low)["indices"].long().tolist()
    assert sorted(T[:5]) == list(range(5)) and len(set(T)) == K and min(T[5:]) >= 5
    nothing = launch(adapter, torch.zeros_like(low))
    assert len(set(nothing["indices"].tolist())) == K and torch.isfinite(nothing["scores"]).all()


def test_a_matrix_adds_eight_numbers_to_loras():
    """1,280 for the 160 matrices of LLaMA-7B's q, k, v, up and down."""
    shapes = 32 * [(4096, 4096), (4096, 4096), (4096, 4096), (11008, 4096), (4096, 11008)]

    def total(method: str) -> int:
        spec = ADAPTER_SPECS[method]
        config = AdapterConfig(method=method, rank=32, alpha=64.0, dropout=0.05, options=spec.options())
        return sum(spec.num_params(out, in_, config) for out, in_ in shapes)

    assert total("lora_dash") - total("lora") == 1280


def test_a_matrix_smaller_than_the_number_of_directions_has_all_of_them():
    config = config_of("lora_dash", num_directions=100)
    assert ADAPTER_SPECS["lora_dash"].tensors(OUT, IN, config)["c"] == (OUT,)


def test_an_update_that_is_still_zero_scores_zero_everywhere(weight):
    """What a run stops at: B is 0."""
    adapter = make_adapter("lora_dash", make_base("nf4", weight))
    assert not launch(adapter, weight)["scores"].any()
    assert launch(trained_away_from_start(adapter), weight)["scores"].all()


@pytest.mark.parametrize("method", ["lora_dash", "lora_init", "lora_tsd"])
def test_the_switch_is_not_before_a_warmups_second_step(method):
    """The first has learning rate 0."""
    with pytest.raises(ValidationError, match="start_step\n.*greater than or equal to 2"):
        options_of(method, {"start_step": 1})
    assert options_of(method, {"start_step": 2}).start_step == 2
