"""PiSSA, MiLoRA and OLoRA: what they take out of the base, what is left, and that peft computes the same."""

import pytest
import torch
from test_adapter_contract import IN, OUT, RANK, config_of, make_base, start, trained_away_from_start

from decompft.adapters.inject import make_adapter
from decompft.adapters.spec import spec_of

S = 8.0 / RANK
METHODS = ["pissa", "milora", "olora"]


@pytest.fixture
def weight() -> torch.Tensor:
    """A gaussian bulk and four spikes, up to ten times its edge (METHODS 1.4)."""
    draw = torch.Generator().manual_seed(2)
    U = torch.linalg.qr(torch.randn(OUT, 4, generator=draw)).Q
    V = torch.linalg.qr(torch.randn(IN, 4, generator=draw)).Q
    return 0.02 * torch.randn(OUT, IN, generator=draw) + U @ torch.diag(torch.tensor([3.0, 2, 1.5, 1])) @ V.T


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(7, IN, generator=torch.Generator().manual_seed(3))


def make(method: str, base_name: str, weight: torch.Tensor, **options: object):
    return start(make_adapter(make_base(base_name, weight), config_of(method, **options)), weight)


def taken(method: str, weight: torch.Tensor) -> torch.Tensor:
    """s B0 A0 of the papers, in float64."""
    U, sigma, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    if method == "olora":
        Q, R = torch.linalg.qr(weight.double())
        return S * Q[:, :RANK] @ R[:RANK]
    part = slice(0, RANK) if method == "pissa" else slice(OUT - RANK, OUT)
    return U[:, part] @ torch.diag(sigma[part]) @ Vh[part]


@pytest.mark.parametrize("method", METHODS)
def test_the_product_starts_as_the_papers_part_of_the_weight(method, weight):
    adapter = make(method, "nf4", weight)
    product = S * adapter.B.double() @ adapter.A.double()
    torch.testing.assert_close(product, taken(method, weight), rtol=1e-5, atol=1e-6)
    assert torch.equal(adapter.A, adapter.A0) and torch.equal(adapter.B, adapter.B0)
    if method != "olora":  # half of each value, over s, is in either
        values = torch.linalg.svdvals(taken(method, weight))[:RANK] / S
        torch.testing.assert_close(adapter.B.norm(dim=0).square().double(), values, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(adapter.A.norm(dim=1).square().double(), values, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("base_name", ["dense-fp32", "nf4", "nf4-dq", "int8", "fp8"])
@pytest.mark.parametrize("method", METHODS)
def test_the_stored_base_is_the_quantized_residual(method, base_name, weight, x):
    adapter = make(method, base_name, weight)
    rest = make_base(base_name, (weight.double() - taken(method, weight)).float())
    used, expected = adapter.base.dense(torch.float32), rest.dense(torch.float32)
    # the last bit of the residual may move a number to the next code, of a few thousand
    assert (used - expected).abs().gt(1e-6).float().mean() < 1e-3
    merged = adapter.merged(used)
    torch.testing.assert_close(adapter(x) - adapter(0 * x), x @ merged.T, rtol=1e-4, atol=1e-4)
    assert adapter.delta() is None


def test_pissa_starts_nearer_to_the_weight_than_its_quantization(weight):
    """And near it: the error is that of a residual whose norm is a sixth of the weight's."""
    errors = {}
    for method in METHODS:
        adapter = make(method, "nf4", weight)
        errors[method] = torch.linalg.norm(adapter.merged(adapter.base.dense(torch.float32)) - weight)
    plain = torch.linalg.norm(make_base("nf4", weight).dense(torch.float32) - weight)
    assert errors["pissa"] < 0.5 * plain
    assert errors["milora"] < 1.05 * plain  # the small directions weigh nothing
    assert all(error < 0.1 * torch.linalg.norm(weight) for m, error in errors.items() if m != "olora")


@pytest.mark.parametrize("method", METHODS)
def test_residual_over_a_float_base_starts_as_the_weight(method, weight, x):
    adapter = make(method, "dense-fp32", weight)
    bias = adapter.base.bias
    torch.testing.assert_close(adapter(x), x @ weight.T + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_exact_starts_as_its_base_bit_for_bit(method, dtype, weight, x):
    base = make_base("nf4", weight)
    before = base(x.to(dtype))
    adapter = start(make_adapter(base, config_of(method, base="exact")), weight)
    assert torch.equal(adapter(x.to(dtype)), before)


@pytest.mark.parametrize("method", METHODS)
def test_exact_and_residual_are_one_function_over_a_float_base(method, weight, x):
    residual = trained_away_from_start(make(method, "dense-fp32", weight))
    exact = trained_away_from_start(make(method, "dense-fp32", weight, base="exact"))
    torch.testing.assert_close(exact(x), residual(x), rtol=1e-4, atol=1e-4)
    for layer in (residual, exact):
        layer(x).sin().sum().backward()
    for name in ("A", "B"):
        torch.testing.assert_close(
            getattr(exact, name).grad, getattr(residual, name).grad, rtol=1e-3, atol=1e-3
        )


def test_exact_changes_the_base_by_the_difference_of_the_products(weight):
    adapter = trained_away_from_start(make("pissa", "nf4", weight, base="exact"))
    A, B, A0, B0 = (t.double() for t in (adapter.A, adapter.B, adapter.A0, adapter.B0))
    up, down = adapter.delta()
    assert up.shape == (OUT, 2 * RANK) and down.shape == (2 * RANK, IN)
    torch.testing.assert_close(up.double() @ down.double(), S * (B @ A - B0 @ A0), rtol=1e-5, atol=1e-5)
    assert spec_of(adapter.config).num_columns(OUT, IN, adapter.config) == 2 * RANK


def test_exact_sees_a_small_step_in_bfloat16(weight, x):
    """A thousandth of A is below bfloat16's last bit: B A - B0 A0 of rounded tensors would not see it."""
    adapter = make("pissa", "nf4", weight, base="exact")
    base = adapter.base(x.bfloat16())
    with torch.no_grad():
        adapter.A *= 1.001
        x = x.bfloat16()
        change = S * (x.double() @ (adapter.A - adapter.A0).double().T) @ adapter.B.double().T
        up, down = (t.bfloat16().double() for t in adapter.delta())
    seen = x.double() @ down.T @ up.T
    # four roundings of 2**-9
    assert torch.linalg.norm(seen - change) < 0.01 * torch.linalg.norm(change)
    assert not torch.equal(adapter(x), base)


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_the_base_do_not_depend_on_how_the_weight_was_cut(method, weight):
    adapter = make(method, "nf4", weight)
    values = {"A0": adapter.A0, "B0": adapter.B0}
    whole = adapter.base_rows(weight, 0, values)
    parts = torch.cat([adapter.base_rows(weight[i : i + 5], i, values) for i in range(0, OUT, 5)])
    assert torch.equal(parts, whole)
    torch.testing.assert_close(whole.double(), weight.double() - taken(method, weight), rtol=1e-5, atol=1e-6)
    exact = make(method, "nf4", weight, base="exact")
    assert not exact.rewrites_base and torch.equal(exact.base_rows(weight, 0, values), weight)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_start_outputs_and_gradients_equal_pefts(method, weight, x):
    peft = pytest.importorskip("peft")
    ours = make(method, "dense-fp32", weight)
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT))
    with torch.no_grad():
        model[0].weight.copy_(weight)
        model[0].bias.copy_(ours.base.bias)
    config = peft.LoraConfig(r=RANK, lora_alpha=8, target_modules=["0"], init_lora_weights=method)
    theirs = peft.get_peft_model(model, config)
    layer = theirs.base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    # of a pair of singular vectors the sign is free
    sign = torch.sign(torch.sum(ours.B * B, dim=0)) if method == "pissa" else torch.ones(RANK)
    torch.testing.assert_close(ours.A * sign[:, None], A, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.B * sign, B, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.base.dense(torch.float32), layer.base_layer.weight, rtol=1e-4, atol=1e-5)
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.A.grad * sign[:, None], A.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ours.B.grad * sign, B.grad, rtol=1e-4, atol=1e-3)
    merged = ours.merged(ours.base.dense(torch.float32))
    torch.testing.assert_close(merged, theirs.merge_and_unload()[0].weight, rtol=1e-5, atol=1e-5)
