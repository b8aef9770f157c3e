"""BitFit and MPC_n, the parallel adapter, against their equations; what neither can be merged into."""

import copy
from pathlib import Path

import pytest
import torch
from test_adapter_contract import IN, OUT, make_adapter, make_base, trained_away_from_start

from decompft.adapters.merge import make_dense


@pytest.fixture
def weight() -> torch.Tensor:
    return 0.05 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(7, IN, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("base_name", ["dense-fp32", "nf4-dq"])  # with a bias of its own, and without
def test_bitfit_adds_a_bias(base_name, weight, x):
    adapter = trained_away_from_start(make_adapter("bitfit", make_base(base_name, weight)))
    y = x.double() @ adapter.base.dense(torch.float64).T + adapter.b.double()
    if adapter.base.bias is not None:
        y = y + adapter.base.bias.double()
    # float32 sums over 128 products: 2**-24 * sqrt(128) relative, times a few
    assert torch.allclose(adapter(x).double(), y, rtol=1e-5, atol=1e-5)
    adapter(x).backward(g := torch.randn(7, OUT, generator=torch.Generator().manual_seed(4)))
    assert torch.allclose(adapter.b.grad, g.sum(0), atol=1e-5)


def test_merged_bias_is_both(weight):
    adapter = trained_away_from_start(make_adapter("bitfit", make_base("dense-fp32", weight)))
    assert torch.equal(adapter.merged(weight), weight)
    assert torch.equal(adapter.merged_bias(adapter.base.bias), adapter.base.bias + adapter.b)
    assert torch.equal(adapter.merged_bias(None), adapter.b)
    assert adapter.delta() is None  # no change of the weight stands for it


@pytest.mark.parametrize("base_name", ["dense-fp32", "nf4-dq"])
@pytest.mark.parametrize("method", ["bitfit", "mpc_n"])
def test_a_model_made_dense_for_generation_still_equals_it(method, base_name, weight, x):
    adapter = trained_away_from_start(make_adapter(method, make_base(base_name, weight)))
    model = torch.nn.Sequential(copy.deepcopy(adapter))
    make_dense(model, torch.float32)
    with torch.no_grad():
        assert torch.allclose(model(x), adapter(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base_name", ["dense-fp32", "nf4-dq"])
def test_mpc_n_is_the_equation(base_name, weight, x):
    """W x + B relu(A x): no alpha/r."""
    adapter = trained_away_from_start(make_adapter("mpc_n", make_base(base_name, weight)))
    A, B, W = adapter.A.double(), adapter.B.double(), adapter.base.dense(torch.float64)
    bias = 0 if adapter.base.bias is None else adapter.base.bias.double()
    y = x.double() @ W.T + (x.double() @ A.T).relu() @ B.T + bias
    assert torch.allclose(adapter(x).double(), y, rtol=1e-5, atol=1e-5)
    assert adapter.delta() is None


@pytest.mark.dist
@pytest.mark.parametrize(
    ("method", "reason"), [("mpc_n", "no change of weights"), ("bitfit", "has learned a bias")]
)
def test_merge_refuses_in_words(method, reason, tmp_path: Path):
    """Llama's linear layers have no bias to merge into."""
    from tiny import make_run, run_ranks

    from decompft.launcher.errors import AdapterError
    from decompft.launcher.worker.inference import open_adapter
    from decompft.launcher.worker.merging import merge

    run = make_run(tmp_path, adapter={"method": method, "rank": 4}, train={"max_steps": 1})
    run_ranks(run)
    adapter = open_adapter(run.path / "adapter", base=None, say=lambda line: None)
    with pytest.raises(AdapterError, match=reason):
        merge(adapter, "dense", tmp_path / "merged", progress=lambda done, total: None)
    assert not (tmp_path / "merged").exists()
