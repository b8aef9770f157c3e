"""SpecLoRA, Spectral Adapter, SVDiff and SVFT against their equations, dense and in float64 (METHODS 1.3, 2.2, 3)."""

import math
from dataclasses import replace

import pytest
import torch
from planning import CPU, TINY
from planning import make as plan
from test_adapter_contract import RANK, config_of, make_base, start, trained_away_from_start

from decompft.adapters.frozen.dense import DenseLinear
from decompft.adapters.inject import make_adapter
from decompft.adapters.spec import ADAPTER_SPECS, AdapterConfig
from decompft.launcher.errors import PlanError

S = 8.0 / RANK
SHAPES = {"wide": (24, 128), "tall": (128, 24), "square": (48, 48)}
PATTERNS = ["plain", "banded", "random"]
# a float64 sum of float32 tensors, of rank 24 at most
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def weight_of(shape: str) -> torch.Tensor:
    return 0.05 * torch.randn(SHAPES[shape], generator=torch.Generator().manual_seed(2))


def over_dense(method: str, shape: str, **options: object):
    """An adapter over a weight in float32, at its start; U, S, V^T of the weight in float64."""
    out, in_ = SHAPES[shape]
    base = DenseLinear(in_, out, dtype=torch.float32, bias_dtype=None)
    with torch.no_grad():
        base.weight.copy_(weight_of(shape))
    made = ADAPTER_SPECS[method].options(**options)
    config = AdapterConfig(method=method, rank=RANK, alpha=8.0, dropout=0.0, options=made)
    return start(make_adapter(base, config)), torch.linalg.svd(weight_of(shape).double(), full_matrices=False)


def signs(adapter, U: torch.Tensor) -> torch.Tensor:
    """Of the adapter's singular vectors over those of another SVD: 1 or -1 each."""
    return torch.sign(torch.sum(adapter.U.double() * U[:, : adapter.U.shape[1]], dim=0))


def assert_merged(adapter, expected: torch.Tensor) -> None:
    used = adapter.base.dense(torch.float32)
    torch.testing.assert_close(adapter.merged(used).double(), expected, **CLOSE)
    x = torch.randn(7, used.shape[1], generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(adapter(x).double(), x.double() @ expected.T, rtol=1e-5, atol=1e-5)


def assert_gradients(adapter, expected) -> None:
    """Slopes of the trained tensors are those of autograd through the dense equation.

    Args:
        expected: the trained tensors in float64 to the weight (out, in).
    """
    x = torch.randn(7, adapter.base.in_features, generator=torch.Generator().manual_seed(3))
    adapter(x).sin().sum().backward()
    leaves = [p.detach().double().requires_grad_(True) for p in adapter.trained()]
    (x.double() @ expected(*leaves).T).sin().sum().backward()
    for own, leaf in zip(adapter.trained(), leaves, strict=True):
        torch.testing.assert_close(own.grad.double(), leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec_mode", ["multiplicative", "additive"])
def test_speclora_is_reading_A_or_C(shape, spec_mode):
    adapter, (U, sigma, Vh) = over_dense("speclora", shape, spec_mode=spec_mode)
    trained_away_from_start(adapter)
    W = weight_of(shape).double()

    def equation(A, B, m):
        term = U[:, :8] @ torch.diag(m * sigma[:8] if spec_mode == "multiplicative" else m) @ Vh[:8]
        return W + term + S * B @ A

    assert_merged(adapter, equation(*(t.detach().double() for t in adapter.trained())))
    assert_gradients(adapter, equation)


def test_speclora_of_top_k_is_a_rescaled_spectrum():
    """METHODS 1.3, identity 7, in its three forms; A and B are at their start, B = 0."""
    adapter, (U, sigma, Vh) = over_dense("speclora", "wide")
    with torch.no_grad():
        adapter.m.normal_(generator=torch.Generator().manual_seed(1))
    m, W = adapter.m.detach().double(), weight_of("wide").double()
    whole = torch.ones(24, dtype=torch.float64)
    whole[:8] += m
    assert_merged(adapter, U @ torch.diag(sigma * whole) @ Vh)
    assert_merged(adapter, W + (U[:, :8] @ torch.diag(m)) @ (U[:, :8].T @ W))


def test_speclora_takes_directions_of_the_full_weight_and_adds_them_to_the_used_one():
    weight = weight_of("wide")
    base = make_base("nf4", weight)
    adapter = start(make_adapter(base, config_of("speclora")), weight)
    U, sigma, _ = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(adapter.S.double(), sigma[:8], rtol=1e-6, atol=0)
    with torch.no_grad():
        adapter.m.fill_(-1.0)
    removed = base.dense(torch.float64) - adapter.merged(base.dense(torch.float32)).double()
    torch.testing.assert_close(removed, U[:, :8] @ U[:, :8].T @ weight.double(), **CLOSE)


def test_speclora_clips_k_to_what_a_layer_has_and_counts():
    config = config_of("speclora")
    spec = ADAPTER_SPECS["speclora"]
    assert spec.num_params(4096, 4096, config) == RANK * 8192 + 8
    assert spec.tensors(4096, 5, config)["m"] == (5,)
    assert spec.is_reading
    adapter, _ = over_dense("speclora", "wide")
    assert adapter.lr_scales() == {"m": 10.0}


@pytest.mark.parametrize("shape", SHAPES)
def test_spectral_adapter_moves_the_leading_singular_vectors(shape):
    """METHODS 1.3, identity 8: the whole SVD with moved columns is the three thin terms."""
    adapter, (U, sigma, Vh) = over_dense("spectral_adapter", shape)
    trained_away_from_start(adapter)
    sign = signs(adapter, U)

    def equation(P, Q):
        # the other SVD's signs: P and Q belong to the adapter's
        left, right = U.clone(), Vh.T.clone()
        left[:, :RANK], right[:, :RANK] = left[:, :RANK] + P * sign, right[:, :RANK] + Q * sign
        return left @ torch.diag(sigma) @ right.T

    P, Q = (t.detach().double() for t in adapter.trained())
    assert_merged(adapter, equation(P, Q))
    U_r, S_r, V_r = (t.double() for t in (adapter.U, adapter.S, adapter.V.T))
    terms = P * S_r @ V_r.T + U_r * S_r @ Q.T + P * S_r @ Q.T
    torch.testing.assert_close(equation(P, Q) - weight_of(shape).double(), terms, **CLOSE)
    assert_gradients(adapter, equation)


def test_spectral_adapter_has_no_scale():
    adapter, _ = over_dense("spectral_adapter", "wide")
    trained_away_from_start(adapter)
    used = adapter.base.dense(torch.float32)
    before = adapter.merged(used)
    adapter.config = replace(adapter.config, alpha=100.0)
    assert torch.equal(adapter.merged(used), before)


@pytest.mark.parametrize("shape", SHAPES)
def test_svdiff_shifts_singular_values_and_stops_at_zero(shape):
    adapter, (U, sigma, Vh) = over_dense("svdiff", shape)
    with torch.no_grad():
        adapter.d.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))

    def equation(d):
        return U @ torch.diag((sigma + d).relu()) @ Vh

    clipped = adapter.S + adapter.d < 0
    assert clipped.any() and not clipped.all()
    assert_merged(adapter, equation(adapter.d.detach().double()))
    assert_gradients(adapter, equation)
    assert not adapter.d.grad[clipped].any()


def test_svdiff_keeps_the_digits_of_a_small_shift():
    """relu(S + d) - S in float32 would round d = 1e-6 at S = 0.8 to a multiple of 6e-8."""
    adapter, (U, _, Vh) = over_dense("svdiff", "wide")
    with torch.no_grad():
        adapter.d.normal_(0, 1e-6, generator=torch.Generator().manual_seed(1))
    up, down = adapter.delta()
    expected = U @ torch.diag(adapter.d.detach().double()) @ Vh
    assert torch.linalg.norm(up.double() @ down.double() - expected) < 1e-5 * torch.linalg.norm(expected)


@pytest.mark.parametrize("k", [6, 0])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES)
def test_svft_is_a_sparse_matrix_between_singular_vectors(shape, pattern, k):
    adapter, (U, sigma, Vh) = over_dense("svft", shape, pattern=pattern, k=k)
    trained_away_from_start(adapter)
    k = k or min(SHAPES[shape])
    sign = signs(adapter, U)
    rows, columns = adapter.at.long() if pattern != "plain" else (torch.arange(k), torch.arange(k))

    def equation(M, gate):
        core = torch.zeros(len(sigma), len(sigma), dtype=torch.float64)
        core[:k, :k] = core[:k, :k].index_put((rows, columns), gate.sigmoid() * M) * torch.outer(sign, sign)
        return U @ (torch.diag(sigma) + core) @ Vh

    assert_merged(adapter, equation(*(t.detach().double() for t in adapter.trained())))
    assert_gradients(adapter, equation)


@pytest.mark.parametrize("pattern", [*PATTERNS, "top_k"])
def test_svft_entries(pattern):
    p, d = 48, 3
    options = {} if pattern == "plain" else {"off_diag": d}
    adapter, _ = over_dense("svft", "square", pattern=pattern, k=0, **options)
    num_entries = p if pattern == "plain" else p * (2 * d + 1) - d * (d + 1)
    assert adapter.M.shape == (num_entries,)
    assert ADAPTER_SPECS["svft"].num_params(p, p, adapter.config) == num_entries + 1
    if pattern == "plain":
        return
    rows, columns = adapter.at.long()
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == num_entries
    away = (rows - columns).abs()
    if pattern == "banded":
        assert away.max() == d
    else:
        assert away.max() > d
    if pattern == "top_k":
        agreement = (adapter.U.T @ adapter.V.T).abs()
        chosen = torch.zeros(p, p, dtype=torch.bool)
        chosen[rows, columns] = True
        assert agreement[chosen].min() >= agreement[~chosen].max()


@pytest.mark.parametrize("k", [0, 6])
@pytest.mark.parametrize("shape", SHAPES)
def test_svft_starts_at_a_distance_that_no_size_changes(shape, k):
    """N(g M) = 0.5 sqrt(nnz 2 / nnz) = 0.71, give or take 1 / sqrt(2 nnz) of it, of which 4 are allowed."""
    adapter, _ = over_dense("svft", shape, pattern="banded", k=k)
    up, down = adapter.delta()
    off = torch.linalg.norm(up @ down).item()
    assert off == pytest.approx(math.sqrt(0.5), rel=4 / math.sqrt(2 * adapter.M.numel()))


def test_svft_top_k_of_a_layer_that_is_not_square_is_refused():
    with pytest.raises(
        ValueError, match="top_k compares u_i with v_j, whose sizes differ in a layer of 24 x 128"
    ):
        over_dense("svft", "wide", pattern="top_k")
    top_k = {"method": "svft", "options": {"pattern": "top_k"}}
    with pytest.raises(
        PlanError, match=r"pattern: top_k .* 32 x 64 \(model.layers.0.self_attn.k_proj\)"
    ) as caught:
        plan(CPU, TINY, adapter=top_k)
    assert caught.value.hint == "use banded or random"
    assert plan(CPU, TINY, adapter={**top_k, "targets": ["q_proj"]})


def test_svft_off_diagonals_of_a_plain_pattern_are_refused():
    with pytest.raises(ValueError, match="off_diag has no effect with pattern: plain"):
        config_of("svft", off_diag=3)


@pytest.mark.parametrize(
    ("method", "options", "entry"),
    [
        ("speclora", {"k": 5}, ("top", 5)),
        ("spectral_adapter", {}, ("top", RANK)),
        ("svdiff", {}, ("full", 24)),
        ("svft", {"k": 6}, ("top", 6)),
        ("svft", {"k": 0}, ("full", 24)),
        ("pissa", {}, ("top", RANK)),
        ("milora", {}, ("bottom", RANK)),
        ("olora", {}, ("qr", RANK)),
    ],
)
def test_directions_come_through_the_cache_in_rows(method, options, entry):
    adapter, _ = over_dense(method, "wide", **options)
    seen = []

    def cached(kind, k, make):
        made = make()
        assert all(t.shape[0] == k for t in made.values())
        seen.append((kind, k))
        return made

    adapter.facts_of(weight_of("wide"), cached, torch.Generator().manual_seed(0))
    assert seen == [entry]
