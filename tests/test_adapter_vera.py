"""VeRA against its equation in float64 and against the installed peft; its frozen matrices are in no file."""

import json
from pathlib import Path

import pytest
import torch
from planning import read_shape
from test_adapter_contract import IN, OUT, RANK, config_of, make_adapter, make_base, trained_away_from_start
from tiny import make_run, recipe_data, run_ranks

from decompft.adapters.frozen.dense import DenseLinear
from decompft.adapters.inject import adapters, inject
from decompft.launcher.source import parse
from decompft.launcher.worker.engines.base import Engine
from decompft.launcher.worker.inference import load
from decompft.launcher.worker.restore import load_adapter
from decompft.launcher.workload import workload

# A0[0, :3] and B0[0, :3] of seed 0, rank 4, (24, 128)
PINNED = (-0.08268, -0.047058, -0.008245, 0.196865, -0.155983, 0.206333)


@pytest.fixture
def weight() -> torch.Tensor:
    return 0.05 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(7, IN, generator=torch.Generator().manual_seed(3))


def small_model(num_layers: int) -> torch.nn.Module:
    """As `build` has it before it is materialised: on meta."""
    with torch.device("meta"):
        model = torch.nn.Sequential(*(torch.nn.Linear(IN, IN, bias=False) for _ in range(num_layers)))

        def frozen(name, in_features, out_features, bias):
            return DenseLinear(in_features, out_features, dtype=torch.float32, bias_dtype=bias)

        inject(model, lambda names: {n: config_of("vera") for n in names}, [], frozen)
    return model


@pytest.mark.parametrize("base_name", ["dense-fp32", "nf4-dq"])
def test_forward_is_the_equation(base_name, weight, x):
    adapter = trained_away_from_start(make_adapter("vera", make_base(base_name, weight)))
    A0, B0, b, d = (t.double() for t in (adapter.A0, adapter.B0, adapter.b, adapter.d))
    W = adapter.base.dense(torch.float64) + torch.diag(b) @ B0 @ torch.diag(d) @ A0
    bias = 0 if adapter.base.bias is None else adapter.base.bias.double()
    # float32 sums over 128 products: 2**-24 * sqrt(128) relative, times a few
    assert torch.allclose(adapter(x).double(), x.double() @ W.T + bias, rtol=1e-5, atol=1e-5)


def test_start(weight):
    adapter = make_adapter("vera", make_base("dense-fp32", weight), d_init=0.25)
    assert not adapter.b.any() and torch.equal(adapter.d, torch.full((RANK,), 0.25))
    for matrix in (adapter.A0, adapter.B0):  # Kaiming-uniform, a = sqrt(5)
        bound = matrix.shape[1] ** -0.5
        assert 0.9 * bound < matrix.abs().max() <= bound
        # of n numbers: 4 standard errors
        assert abs(matrix.mean()) < 4 * bound / (3 * matrix.numel()) ** 0.5
        assert matrix.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)


def test_is_pefts_with_the_same_matrices(weight, x):
    """Outputs, gradients, merged weight. peft's matrices are one pair for all layers, drawn sqrt(6) times wider."""
    from peft import VeraConfig, get_peft_model

    adapter = trained_away_from_start(make_adapter("vera", make_base("dense-fp32", weight)))
    linear = torch.nn.Linear(IN, OUT)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(adapter.base.bias)
    model = torch.nn.Sequential(linear, torch.nn.Linear(OUT, 3 * OUT))  # peft's B0 is as tall as the second's
    config = VeraConfig(r=RANK, target_modules=["0", "1"], vera_dropout=0.0)
    layer = get_peft_model(model, config).base_model.model[0]
    with torch.no_grad():
        adapter.A0.copy_(layer.vera_A["default"][:, :IN])
        adapter.B0.copy_(layer.vera_B["default"][:OUT])
        layer.vera_lambda_b["default"].copy_(adapter.b)
        layer.vera_lambda_d["default"].copy_(adapter.d)
    y, expected = adapter(x), layer(x)
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-5)
    for output in (y, expected):
        output.sin().sum().backward()
    assert torch.allclose(adapter.b.grad, layer.vera_lambda_b["default"].grad, rtol=1e-4, atol=1e-5)
    assert torch.allclose(adapter.d.grad, layer.vera_lambda_d["default"].grad, rtol=1e-4, atol=1e-4)
    merged = weight + layer.get_delta_weight("default")
    assert torch.allclose(adapter.merged(weight), merged, rtol=1e-5, atol=1e-6)


def test_frozen_matrices_follow_from_seed_and_shape_alone(weight):
    first, again = (make_adapter("vera", make_base(b, weight)) for b in ("dense-fp32", "nf4"))
    assert torch.equal(first.A0, again.A0) and torch.equal(first.B0, again.B0)
    other = make_adapter("vera", make_base("dense-fp32", weight), seed=1)
    assert not torch.equal(first.A0, other.A0)
    # no release of torch may change these numbers: adapters in files were trained with them
    assert (*first.A0[0, :3].tolist(), *first.B0[0, :3].tolist()) == pytest.approx(PINNED, abs=1e-6)


def test_layers_of_one_shape_share_them():
    """One A0 and one B0 in memory, through meta and materialisation."""
    model = small_model(3)
    Engine(torch.device("cpu"), timeout_s=60).materialize(model)
    layers = [a for _, a in adapters(model)]
    assert len({a.A0.data_ptr() for a in layers}) == len({a.B0.data_ptr() for a in layers}) == 1
    assert len({a.b.data_ptr() for a in layers}) == 3


def test_forecast_counts_them_once_a_shape(tmp_path: Path):
    def derived(**adapter: object) -> int:
        text = json.dumps(recipe_data(tmp_path, adapter={"method": "vera", "rank": 4, **adapter}))
        recipe = parse(text, where="test", base_dir=tmp_path, overrides=())
        return workload(read_shape(recipe), recipe).num_adapter_derived

    one = derived(targets=["q_proj"])  # (64, 64) in each of two layers
    assert one == 4 * (64 + 64)
    assert derived(targets=["q_proj", "o_proj"]) == one
    assert derived(targets=["q_proj", "up_proj"]) == one + 4 * 128  # A0 is shared, B0 is of another shape


@pytest.mark.dist
def test_the_file_holds_no_matrix_and_loads(tmp_path: Path):
    run = make_run(tmp_path, adapter={"method": "vera", "rank": 4, "targets": ["q_proj", "up_proj"]})
    run_ranks(run)
    folder = run.path / "adapter"
    tensors, _ = load_adapter(folder)
    assert {name.rpartition(".")[2] for name in tensors} == {"b", "d"}
    loaded = load(folder, base=None, say=lambda line: None)
    layers = [a for _, a in adapters(loaded.model)]
    assert all(a.A0.any() and a.B0.any() and a.b.any() for a in layers)
    assert len({a.A0.data_ptr() for a in layers}) == 1  # both have 64 inputs
