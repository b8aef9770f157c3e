"""Statistics of a matrix against numpy, known distributions, and structure that was planted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from decompft.launcher.worker.inspecting.by_kind import by_kind, profile
from decompft.launcher.worker.inspecting.comparison import compare
from decompft.launcher.worker.inspecting.distribution import distribution
from decompft.launcher.worker.inspecting.names import kind_and_depth, natural_order
from decompft.launcher.worker.inspecting.product import product
from decompft.launcher.worker.inspecting.spectrum import spectrum
from decompft.launcher.worker.inspecting.whiteness import whiteness

N = 100_000


def draws(kind, n=N):
    rng = np.random.default_rng(3)
    normal = rng.standard_normal(n)
    made = {
        "gaussian": lambda: normal,
        "outliers": lambda: np.where(np.arange(n) < 10, 40.0, normal),
        "laplace": lambda: rng.laplace(size=n),
        "logistic": lambda: rng.logistic(size=n),
        "student 3": lambda: rng.standard_t(3, n),
        "uniform": lambda: rng.uniform(-1, 1, n),
        "triangle": lambda: rng.uniform(-0.5, 0.5, n) + rng.uniform(-0.5, 0.5, n),
        "needle on a gaussian foot": lambda: np.where(rng.random(n) < 0.5, 0.1 * normal, normal),
        "needle on a flat foot": lambda: np.where(rng.random(n) < 0.6, 0.05 * normal, rng.uniform(-1, 1, n)),
        "pruned gaussian": lambda: np.where(rng.random(n) < 0.3, 0.0, normal),
    }
    return torch.from_numpy(made[kind]()).float()


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "uniform", "pruned gaussian"])
def test_moments_and_tails_are_numpy_s(kind):
    values = draws(kind) * 0.02 + 0.003
    found, x = distribution(values), values.double().numpy()
    z = (x - x.mean()) / x.std()
    assert found.mean == pytest.approx(x.mean(), rel=1e-12)
    assert found.std == pytest.approx(x.std(), rel=1e-12)
    assert found.skew == pytest.approx((z**3).mean(), abs=1e-9)
    assert found.kurtosis == pytest.approx((z**4).mean() - 3, abs=1e-9)
    assert (found.min, found.max) == (x.min(), x.max())
    tails = (found.beyond_3_sigma, found.beyond_4_sigma, found.beyond_6_sigma)
    # an entry within float32's rounding of a limit may fall on either side
    assert tails == pytest.approx([(abs(z) > k).mean() for k in (3, 4, 6)], abs=1.5 / N)


def test_kurtosis_of_known_distributions_and_exact_zeros():
    # standard errors at 100,000 draws: uniform 0.004, gaussian 0.016, Laplace 0.15
    assert distribution(draws("uniform")).kurtosis == pytest.approx(-1.2, abs=0.01)
    assert distribution(draws("gaussian")).kurtosis == pytest.approx(0, abs=0.04)
    assert distribution(draws("laplace")).kurtosis == pytest.approx(3, abs=0.4)
    pruned = draws("pruned gaussian")
    assert distribution(pruned).zeros == (pruned == 0).sum().item() / N


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "pruned gaussian"])
def test_distance_from_a_gaussian_is_the_definition_s(kind):
    values = draws(kind, 5000).bfloat16().float()  # ties
    found, x = distribution(values), np.sort(values.double().numpy())
    normal = [0.5 * (1 + math.erf((v - x.mean()) / x.std() / math.sqrt(2))) for v in x]
    below, upto = (np.searchsorted(x, x, side=side) / len(x) for side in ("left", "right"))
    assert found.ks == pytest.approx(max(abs(below - normal).max(), abs(upto - normal).max()), abs=1e-7)


def test_qq_slopes_are_least_squares_over_normal_quantiles():
    x = np.sort(draws("laplace", 4001).double().numpy())
    p = (np.arange(1, len(x) + 1) - 0.5) / len(x)
    q = torch.special.ndtri(torch.from_numpy(p)).numpy()
    z = (x - x.mean()) / x.std()
    found = distribution(torch.from_numpy(x).float())
    assert found.qq_slope == pytest.approx(np.polyfit(q, z, 1)[0], rel=1e-5)
    middle = abs(p - 0.5) <= 0.25
    # through the origin: at the median both are 0 but for the sample's own skew
    assert found.qq_slope_center == pytest.approx((q * z)[middle].sum() / (q * q)[middle].sum(), rel=1e-5)
    assert distribution(draws("gaussian")).qq_slope_center == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("kind", "label"),
    [
        ("gaussian", "gaussian"),
        ("outliers", "gaussian"),
        ("pruned gaussian", "gaussian"),
        ("laplace", "heavy"),
        ("logistic", "heavy"),
        ("student 3", "heavy"),
        ("uniform", "uniform"),
        ("triangle", "uniform"),
        ("needle on a gaussian foot", "inverted-T"),
        ("needle on a flat foot", "inverted-T"),
    ],
)
def test_shapes_are_told_apart_at_any_scale(kind, label):
    values = draws(kind)
    assert distribution(values).label == label
    assert distribution(values * 1e-3 + 1e-4 * (kind != "pruned gaussian")).label == label
    assert distribution(values.bfloat16()).label == label


def test_the_wide_part_of_a_planted_mixture_is_found():
    found = distribution(draws("needle on a gaussian foot"))
    assert found.wide_share == pytest.approx(0.5, abs=0.01)
    assert found.wide_ratio == pytest.approx(10, rel=0.02)


def test_equal_entries_have_no_shape():
    for value in (0.0, 0.3):
        found = distribution(torch.full((64, 64), value))
        assert (found.label, found.kurtosis, found.ks) == (None, None, None)
        assert found.zeros == (value == 0)
        rank = spectrum(torch.full((64, 64), value), found.std).stable_rank
        assert rank == (None if value == 0 else pytest.approx(1, abs=1e-9))


def test_independent_entries_are_white_and_planted_dependence_is_not():
    torch.manual_seed(0)
    noise = torch.randn(512, 640)
    found = whiteness(noise, 0.0, 1.0)
    assert abs(found.row_autocorrelation) < 5 / 570 and abs(found.column_autocorrelation) < 5 / 570
    assert found.block_variance == pytest.approx(1, abs=5 * math.sqrt(2 / 320))
    smooth = noise[:, 1:] + 0.5 * noise[:, :-1]  # correlation 0.5 / (1 + 0.25)
    found = whiteness(smooth, 0.0, math.sqrt(1.25))
    assert found.row_autocorrelation == pytest.approx(0.4, abs=0.01)
    assert abs(found.column_autocorrelation) < 0.01
    patches = noise + 0.5 * torch.randn(16, 20).repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert whiteness(patches, 0.0, patches.std().item()).block_variance > 100
    assert whiteness(noise[:32, :63], 0.0, 1.0).block_variance is None


def test_planted_spikes_are_counted_above_the_edge_of_noise():
    torch.manual_seed(1)
    out, in_, planted = 200, 300, 7
    u, v = (torch.linalg.qr(torch.randn(n, planted)).Q for n in (out, in_))
    noise = 0.02 * torch.randn(out, in_)
    edge = 0.02 * (math.sqrt(out) + math.sqrt(in_))
    weight = noise + u @ torch.diag(torch.linspace(3, 6, planted) * edge) @ v.T
    found = spectrum(weight, 0.02)
    assert found.edge == pytest.approx(edge)
    assert found.num_above_edge == planted
    assert spectrum(noise, 0.02).num_above_edge <= 1  # the edge itself fluctuates
    for matrix in (weight, weight.T):
        values = torch.linalg.svdvals(matrix.double())
        found = spectrum(matrix, 0.02)
        assert found.top == pytest.approx(values[:16].tolist(), rel=1e-9)
        assert found.norm == pytest.approx(matrix.double().norm().item(), rel=1e-9)
        assert found.stable_rank == pytest.approx((values.square().sum() / values[0] ** 2).item(), rel=1e-9)
        share = (values / values.sum()).numpy()
        assert found.effective_rank == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-9)


def test_a_planted_rotation_and_growth_are_found():
    torch.manual_seed(2)
    u, v = (torch.linalg.qr(torch.randn(n, 4, dtype=torch.float64)).Q for n in (60, 90))
    s = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    angle = math.radians(30)
    turned = u.clone()  # the third output direction turns into the plane of one that is in none
    extra = torch.linalg.qr(torch.cat([u, torch.randn(60, 1, dtype=torch.float64)], 1)).Q[:, 4]
    turned[:, 2] = math.cos(angle) * u[:, 2] + math.sin(angle) * extra
    grown = s * torch.tensor([1.5, 1, 1, 1], dtype=torch.float64)
    found = compare(((u * s) @ v.T).float(), ((turned * grown) @ v.T).float())
    assert found.left_cosines == pytest.approx([1, 1, math.cos(angle), 1], abs=1e-5)
    assert found.right_cosines == pytest.approx([1] * 4, abs=1e-5)
    assert found.growth == pytest.approx([1.5, 1, 1, 1], abs=1e-5)


def test_the_change_s_moments_are_numpy_s():
    torch.manual_seed(3)
    weight = torch.randn(40, 50) * 0.02 + 0.01
    tuned = weight * 1.01 + 0.001 * torch.randn(40, 50)
    found, w, t = compare(weight, tuned), weight.double().numpy(), tuned.double().numpy()
    assert found.delta_std == pytest.approx((t - w).std(), rel=1e-9)
    assert found.delta_mean == pytest.approx((t - w).mean(), rel=1e-9)
    assert found.delta_norm == pytest.approx(np.linalg.norm(t - w), rel=1e-9)
    assert found.delta_std_ratio == pytest.approx((t - w).std() / w.std(), rel=1e-9)
    assert found.variance_growth == pytest.approx(t.var() - w.var(), rel=1e-6)
    assert found.correlation == pytest.approx(np.corrcoef((t - w).ravel(), w.ravel())[0, 1], rel=1e-6)
    same = compare(weight, weight)
    assert (same.delta_std, same.correlation, same.growth[0]) == (0, None, 1)


@pytest.mark.parametrize("shape", [(30, 5, 40), (8, 8, 6), (3, 6, 20)])
def test_a_product_s_statistics_are_those_of_the_dense_matrix(shape):
    out, rank, in_ = shape
    torch.manual_seed(4)
    up, down = torch.randn(out, rank) + 0.3, torch.randn(rank, in_) * 0.01 + 0.005
    found, dense = product(up, down), up.double() @ down.double()
    values = torch.linalg.svdvals(dense)[: min(shape)]
    share = values / values.sum()
    assert found.norm == pytest.approx(dense.norm().item(), rel=1e-9)
    assert found.mean == pytest.approx(dense.mean().item(), rel=1e-9)
    assert found.std == pytest.approx(dense.std(correction=0).item(), rel=1e-9)
    assert found.stable_rank == pytest.approx((dense.norm() / values[0]).item() ** 2, rel=1e-9)
    assert found.effective_rank == pytest.approx((-(share * share.log()).sum()).exp().item(), rel=1e-9)
    assert found.top[: len(values)] == pytest.approx(values.tolist(), rel=1e-9)


def test_a_product_of_zeros_has_no_rank():
    found = product(torch.zeros(5, 2), torch.randn(2, 7))
    assert (found.norm, found.std, found.effective_rank, found.stable_rank) == (0, 0, None, None)


class Point:
    def __init__(self, depth, value):
        self.kind, self.depth, self.value = "q_proj", depth, value


def test_slope_over_depth_and_a_spike_at_the_first_layer():
    rows = [Point(d, v) for d, v in enumerate([9.0, 2.0, 3.0, 4.0, 5.0])]
    found = profile(rows, lambda row: row.value)
    assert found.slope == pytest.approx(np.polyfit(range(5), [9, 2, 3, 4, 5], 1)[0])
    assert found.first_over_median == pytest.approx(9 / 3.5) and found.spike_at_first
    assert not profile(rows[1:], lambda row: row.value).spike_at_first
    lone = profile([Point(None, 1.0), Point(3, 2.0)], lambda row: row.value)
    assert (lone.depths, lone.values, lone.slope, lone.first_over_median) == ((3,), (2.0,), None, None)
    assert list(by_kind(rows)) == ["q_proj"]


def test_kinds_and_depths_of_names():
    assert kind_and_depth("model.layers.13.self_attn.q_proj") == ("self_attn.q_proj", 13)
    assert kind_and_depth("transformer.h.0.mlp.c_proj") == ("mlp.c_proj", 0)
    assert kind_and_depth("model.layers.2.mlp.experts.7.up_proj") == ("mlp.experts.*.up_proj", 2)
    assert kind_and_depth("score") == ("score", None)
    assert sorted(["a.10.b", "a.2.b", "a.norm"], key=natural_order) == ["a.norm", "a.2.b", "a.10.b"]
