"""The rules that make one task vector of several, against each written out again in numpy float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from decompft.adapters import combine

OUT, IN = 23, 17


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def thin(rank, seed):
    return random(OUT, rank, seed=seed), random(rank, IN, seed=100 + seed)


def test_nan_coefficients_of_known_norms():
    assert combine.nan_coefficients([1.0, 3.0]) == pytest.approx([0.75, 0.25])
    assert combine.nan_coefficients([2.0, 2.0, 2.0]) == pytest.approx([1 / 3] * 3)
    assert combine.nan_coefficients([2.0, 4.0, 8.0]) == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    # a part that does not touch a tensor has nothing to weigh there
    assert combine.nan_coefficients([5.0, 0.0]) == [1.0, 0.0]
    assert combine.nan_coefficients([0.0, 0.0]) == [0.5, 0.5]


def test_weighted_sum_is_the_sum():
    taus = [random(OUT, IN, seed=i) for i in range(3)]
    found = combine.weighted_sum(taus, [0.5, -1.0, 2.0])
    expected = 0.5 * taus[0].numpy() - taus[1].numpy() + 2 * taus[2].numpy()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_concatenated_factors_are_the_sum_of_the_products():
    parts, weights = [thin(3, 1), thin(5, 2), thin(1, 3)], [0.3, 0.9, -0.5]
    up, down = combine.concatenate(parts, weights)
    assert up.shape == (OUT, 9) and down.shape == (9, IN)
    expected = sum(w * u.numpy() @ d.numpy() for w, (u, d) in zip(weights, parts, strict=True))
    np.testing.assert_allclose((up @ down).numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 4, 7, 8])
def test_recompression_loses_the_discarded_singular_values_and_no_more(rank):
    whole = combine.concatenate([thin(3, 1), thin(5, 2)], [1.0, 0.5])
    dense = (whole[0] @ whole[1]).numpy()
    sizes = np.linalg.svd(dense, compute_uv=False)
    found = combine.recompress(whole, rank)
    assert found.up.shape == (OUT, rank) and found.down.shape == (rank, IN)
    assert found.norm == pytest.approx(np.linalg.norm(dense), rel=1e-10)
    discarded = np.sqrt((sizes[rank:] ** 2).sum())
    assert found.lost == pytest.approx(discarded, rel=1e-9, abs=1e-10)
    assert np.linalg.norm(dense - (found.up @ found.down).numpy()) == pytest.approx(discarded, abs=1e-9)


def test_recompression_of_more_factors_than_the_matrix_has_rows():
    whole = combine.concatenate([thin(16, 1), thin(16, 2)], [1.0, 1.0])
    found = combine.recompress(whole, 20)
    assert found.up.shape == (OUT, 20) and found.lost == 0
    torch.testing.assert_close(found.up @ found.down, whole[0] @ whole[1])


@pytest.mark.parametrize("rank", [1, 6, 17, 30])
def test_a_dense_change_is_truncated_to_its_leading_singular_values(rank):
    tau = random(OUT, IN)
    sizes = np.linalg.svd(tau.numpy(), compute_uv=False)
    found = combine.truncate(tau, rank, torch.Generator().manual_seed(0))
    assert found.up.shape == (OUT, rank) and found.down.shape == (rank, IN)
    # `spectra` gives float32 triplets
    assert found.lost == pytest.approx(np.sqrt((sizes[rank:] ** 2).sum()), rel=1e-5, abs=1e-5)
    assert float((tau - found.up @ found.down).norm()) == pytest.approx(found.lost, abs=1e-9)


def test_a_change_of_nothing_is_truncated_to_nothing():
    found = combine.truncate(torch.zeros(OUT, IN), 3, torch.Generator().manual_seed(0))
    assert found.lost == 0 == found.norm and not (found.up @ found.down).any()


def test_padding_changes_no_product():
    up, down = thin(3, 1)
    wide = combine.padded((up, down), 8)
    assert wide[0].shape == (OUT, 8) and wide[1].shape == (8, IN)
    assert torch.equal(wide[0] @ wide[1], up @ down)


def test_trim_keeps_the_largest_fraction():
    tau = torch.tensor([[0.1, -5.0, 2.0, 0.0, 3.0], [-0.2, 0.3, -4.0, 1.0, 0.4]])
    kept = combine.trim(tau, 0.4)
    expected = torch.tensor([[0.0, -5.0, 2.0, 0.0, 3.0], [0.0, 0.0, -4.0, 0.0, 0.0]])
    assert torch.equal(kept, expected)
    assert torch.equal(combine.trim(tau, 1.0), tau)
    assert int((combine.trim(tau, 0.001) != 0).sum()) == 1


def test_ties_on_an_example_made_by_hand():
    """Columns: all agree; one is outvoted; two are trimmed; two votes cancel; all are trimmed."""
    taus = [
        torch.tensor([[4.0, 5.0, 0.1, 3.0, 0.2]]),
        torch.tensor([[2.0, -4.0, 6.0, -3.0, 0.2]]),
        torch.tensor([[6.0, -7.0, 0.1, 0.1, 0.05]]),
    ]
    found = combine.ties(taus[:2], [0.5, 0.5], 0.8)  # four of five stay: the second loses its last
    torch.testing.assert_close(found, torch.tensor([[3.0, 5.0, 6.0, 0.0, 0.2]]))
    found = combine.ties(taus, [1 / 3] * 3, 0.4)  # two stay: 4 5 | -4 6 | 6 -7
    torch.testing.assert_close(found, torch.tensor([[5.0, -5.5, 6.0, 0.0, 0.0]]))


def test_ties_weighs_votes_and_mean_by_the_coefficients():
    taus = [torch.tensor([[5.0, 1.0]]), torch.tensor([[-4.0, 3.0]])]
    torch.testing.assert_close(combine.ties(taus, [0.5, 0.5], 1.0), torch.tensor([[5.0, 2.0]]))
    # 0.4 * 5 < 0.6 * 4: the other sign wins; 0.4 * 1 + 0.6 * 3 = 2.2
    torch.testing.assert_close(combine.ties(taus, [0.4, 0.6], 1.0), torch.tensor([[-4.0, 2.2]]))


def ties_in_numpy(taus, weights, density):
    kept = max(1, round(density * taus[0].size))
    trimmed = []
    for tau in taus:
        least = np.sort(np.abs(tau).ravel())[-kept]
        trimmed.append(np.where(np.abs(tau) >= least, tau, 0))
    out = np.zeros_like(taus[0])
    for place in np.ndindex(out.shape):
        values = [t[place] for t in trimmed]
        vote = np.sign(sum(w * v for w, v in zip(weights, values, strict=True)))
        agree = [(w, v) for w, v in zip(weights, values, strict=True) if v != 0 and np.sign(v) == vote]
        if agree:
            out[place] = sum(w * v for w, v in agree) / sum(w for w, _ in agree)
    return out


@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
def test_ties_is_the_rule_element_by_element(density):
    taus, weights = [random(OUT, IN, seed=i) for i in range(3)], [0.2, 0.5, 0.3]
    expected = ties_in_numpy([tau.numpy() for tau in taus], weights, density)
    np.testing.assert_allclose(combine.ties(taus, weights, density).numpy(), expected, rtol=1e-12)


def test_dare_drops_at_random_and_keeps_the_expectation():
    tau, density, draws = random(OUT, IN), 0.25, 4000
    generator = torch.Generator().manual_seed(3)
    total, kept = torch.zeros_like(tau), 0
    for _ in range(draws):
        dropped = combine.drop(tau, density, generator)
        assert bool(((dropped == 0) | (dropped == tau / density)).all())
        total += dropped
        kept += int((dropped != 0).sum())
    # an element's standard error is |tau| sqrt((1 - d) / (d draws)); five of them for all 391
    allowed = 5 * tau.abs() * ((1 - density) / (density * draws)) ** 0.5
    assert bool(((total / draws - tau).abs() <= allowed).all())
    assert kept / (draws * tau.numel()) == pytest.approx(density, abs=0.002)


def test_dare_drops_the_same_elements_for_the_same_seed():
    tau = random(OUT, IN)
    first, again, other = (combine.drop(tau, 0.5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_norm_of_a_product_without_the_product(size):
    up, down = thin(5, 1)
    up, down = (size * up).float(), down.float()
    expected = np.linalg.norm(up.double().numpy() @ down.double().numpy())
    assert combine.thin_norm((up, down)) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("scale", [1.02, 0.7, 1.0])
def test_norm_of_a_change_that_scales_the_base_without_the_change(scale):
    weight, (up, down) = random(OUT, IN, seed=9), thin(4, 1)
    tau = (scale - 1) * weight.numpy() + up.numpy() @ down.numpy()
    found = combine.scaled_norm(weight, scale, (up, down))
    assert found == pytest.approx(np.linalg.norm(tau), rel=1e-10)


def test_maps_norm_is_the_formula_of_its_magnitudes():
    """N(tau)^2 = (a - n0)^2 + b^2 + 2 (a - n0) b <W, D> / (n0 n), eps ignored (METHODS.md 2.7)."""
    weight, (up, down) = random(OUT, IN, seed=9), thin(4, 1)
    base, change = weight.numpy(), up.numpy() @ down.numpy()
    n0, n = np.linalg.norm(base), np.linalg.norm(change)
    a, b = 1.3 * n0, 0.8
    expected = (a - n0) ** 2 + b**2 + 2 * (a - n0) * b * (base * change).sum() / (n0 * n)
    found = combine.scaled_norm(weight, a / n0, (up * (b / n), down))
    assert found**2 == pytest.approx(expected, rel=1e-10)
