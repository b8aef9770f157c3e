"""Thin factors of a weight: as a float64 SVD, as peft's QR, as peft's LoftQ."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import peft.utils.loftq_utils as peft_loftq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from decompft.adapters import spectra

FLOAT32 = 2.0**-24  # half a unit in the last place: results are float64 ones, rounded once
TALL, WIDE, SQUARE = (384, 200), (200, 384), (256, 256)
SHAPES = [TALL, WIDE, SQUARE]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def weight(shape, *, num_spikes=0, seed=0):
    """A gaussian bulk of std 0.02 and spikes from 10 to 1.25 times the bulk's edge, as METHODS 1.4."""
    out, in_ = shape
    W = torch.randn(shape, generator=generator(seed)) * 0.02
    if num_spikes:
        U = torch.linalg.qr(torch.randn(out, num_spikes, generator=generator(seed + 1))).Q
        V = torch.linalg.qr(torch.randn(in_, num_spikes, generator=generator(seed + 2))).Q
        edge = 0.02 * (out**0.5 + in_**0.5)
        W += U @ torch.diag(edge * torch.logspace(1, 0.1, num_spikes)) @ V.T
    return W


def reference(W):
    """Columns of U and V, in float64."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return U, S, Vh.T


def assert_same_triplets(found, U, S, V, *, sine):
    """Values to float32, vectors to the sine of an angle; both vectors with one sign."""
    u, s, v = (t.double() for t in found)
    assert (s - S).abs().max() <= 4 * FLOAT32 * S.max()
    for mine, theirs in ((u, U), (v, V)):
        off = mine - theirs * (mine * theirs).sum(0)
        assert off.norm(dim=0).max() <= sine
    assert ((u * U).sum(0) * (v * V).sum(0) > 0).all()


def assert_orthonormal(Q):
    gram = Q.double().T @ Q.double()
    assert (gram - torch.eye(len(gram))).abs().max() <= 4 * FLOAT32


@pytest.mark.parametrize("shape", SHAPES)
def test_full_is_the_svd(shape):
    W = weight(shape)
    U, S, V = spectra.full(W)
    p = min(shape)
    assert (U.shape, S.shape, V.shape) == ((shape[0], p), (p,), (shape[1], p))
    assert {t.dtype for t in (U, S, V)} == {torch.float32} and all(t.is_contiguous() for t in (U, S, V))
    assert (S[:-1] >= S[1:]).all()
    assert_orthonormal(U)
    assert_orthonormal(V)
    rebuilt = U.double() @ torch.diag(S.double()) @ V.double().T
    assert (rebuilt - W).norm() <= 4 * FLOAT32 * W.norm()
    # smallest gap of these spectra: 1e-4 S_1
    assert_same_triplets((U, S, V), *reference(W), sine=1e-6)


def test_full_of_a_large_condition_number_is_better_than_a_float32_svd():
    """Values from 1 down to 1e-6: float32's error is 1e-7 of the largest, a tenth of the smallest."""
    U = torch.linalg.qr(torch.randn(200, 200, generator=generator(), dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(200, 200, generator=generator(1), dtype=torch.float64)).Q
    S = torch.logspace(0, -6, 200, dtype=torch.float64)
    W = U @ torch.diag(S) @ V.T
    found = spectra.full(W)
    assert ((found[1] - S) / S).abs().max() < 1e-4
    assert ((found[0].double() * U).sum(0).abs() > 1 - 1e-6).all()
    theirs = torch.linalg.svd(W.float(), full_matrices=False)
    assert ((theirs.S - S) / S).abs().max() > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_full_of_a_weight_of_low_rank_is_orthonormal_all_the_same(shape):
    W = weight((shape[0], 5)) @ weight((5, shape[1]), seed=3)
    U, S, V = spectra.full(W)
    assert_orthonormal(U)
    assert_orthonormal(V)
    assert (S[5:] <= 1e-7 * S[0]).all()
    assert ((U * S) @ V.T - W).norm() <= 1e-6 * W.norm()


@pytest.mark.parametrize(
    ("shape", "k"), [((640, 640), 4), ((900, 600), 4), ((600, 900), 4), ((1152, 1152), 16)]
)
def test_top_of_a_spectrum_like_a_real_one(shape, k, monkeypatch):
    W = weight(shape, num_spikes=24)
    U, S, V = reference(W)
    monkeypatch.setattr(spectra, "_exact", None)  # the leading vectors come without the whole spectrum
    found = spectra.top(W, k, generator())
    assert found[0].shape == (shape[0], k) and found[2].shape == (shape[1], k)
    assert_orthonormal(found[0])
    assert_orthonormal(found[2])
    assert_same_triplets(found, U[:, :k], S[:k], V[:, :k], sine=5e-3)


def test_top_reaches_past_the_spikes_into_a_bulk_without_gaps():
    W = weight((640, 640), num_spikes=1)
    U, S, V = reference(W)
    assert_same_triplets(spectra.top(W, 4, generator()), U[:, :4], S[:4], V[:, :4], sine=5e-3)


def test_top_of_all_directions_is_full():
    W = weight(TALL)
    for mine, theirs in zip(spectra.top(W, 200, generator()), spectra.full(W), strict=True):
        assert torch.equal(mine, theirs)


def test_top_that_does_not_converge_is_taken_from_the_whole_spectrum(monkeypatch):
    monkeypatch.setattr(spectra, "_ANGLE", 0.0)
    monkeypatch.setattr(spectra, "_FLOOR", 0.0)
    W = weight((640, 600), num_spikes=4)
    for mine, theirs in zip(spectra.top(W, 4, generator()), spectra.full(W), strict=True):
        assert (mine - theirs[..., :4]).abs().max() <= 4 * FLOAT32 * theirs.abs().max()


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_top_of_a_weight_of_lower_rank(rank):
    W = weight((640, rank)) @ weight((rank, 700), seed=5)
    U, S, V = spectra.top(W, 4, generator())
    assert_orthonormal(U)
    assert_orthonormal(V)
    assert ((U * S) @ V.T - W).norm() <= 1e-6 * W.norm()


def test_top_is_decided_by_the_generator_alone():
    W = weight((640, 640), num_spikes=24)
    first, again = (spectra.top(W, 4, generator(7)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.manual_seed(99)
    moved = generator(7)
    spectra.top(W, 4, moved)
    assert not torch.equal(moved.get_state(), generator(7).get_state())
    assert all(torch.equal(a, b) for a, b in zip(first, spectra.top(W, 4, generator(7)), strict=True))
    # another start ends at the same triplets, signs too
    other = spectra.top(W, 4, generator(8))
    assert all((a - b).abs().max() < 1e-2 for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_bottom_is_the_end_of_full(shape):
    W = weight(shape)
    U, S, V = reference(W)
    found = spectra.bottom(W, 8)
    assert_same_triplets(found, U[:, -8:], S[-8:], V[:, -8:], sine=1e-6)
    for mine, theirs in zip(found, spectra.full(W), strict=True):
        assert (mine - theirs[..., -8:]).abs().max() <= 1e-6


@pytest.mark.parametrize(
    "make", [lambda W: spectra.top(W, 4, generator()), lambda W: spectra.bottom(W, 6), spectra.full]
)
def test_the_largest_entry_of_u_is_positive(make):
    W = weight((700, 600), num_spikes=12)
    for sign in (1, -1):
        U, S, V = make(sign * W)
        assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
        assert ((U.T @ (sign * W) @ V).diagonal() > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_weight_is_taken_and_left_as_it_was(dtype):
    W = weight(TALL, num_spikes=4).to(dtype).requires_grad_()
    before = W.detach().clone()
    for result in (
        spectra.full(W), spectra.top(W, 4, generator()), spectra.bottom(W, 4), spectra.thin_qr(W, 4),
        spectra.loftq(W, 4, lambda x: x.round(decimals=2), 2),
    ):  # fmt: skip
        assert all(t.dtype == torch.float32 and not t.requires_grad for t in result)
    assert torch.equal(W.detach(), before)


def test_what_is_not_finite_or_not_there_is_refused():
    W = weight(TALL)
    for k in (0, 201):
        with pytest.raises(ValueError, match="200"):
            spectra.top(W, k, generator())
        with pytest.raises(ValueError, match="200"):
            spectra.thin_qr(W, k)
    W[3, 4] = torch.nan
    for make in (spectra.full, lambda W: spectra.bottom(W, 2), lambda W: spectra.top(W, 2, generator())):
        with pytest.raises(ValueError, match="not finite"):
            make(W)


@pytest.mark.parametrize("shape", SHAPES)
def test_thin_qr_is_pefts_olora(shape):
    linear = nn.Linear(shape[1], shape[0], bias=False)
    linear.weight.data = weight(shape, num_spikes=4)
    W = linear.weight.detach().clone()
    model = get_peft_model(
        nn.Sequential(linear), LoraConfig(r=8, lora_alpha=16, target_modules=["0"], init_lora_weights="olora")
    )
    layer = model.base_model.model[0]
    Q, R = spectra.thin_qr(W, 8)
    B, A = layer.lora_B.default.weight, layer.lora_A.default.weight
    assert (Q - B).abs().max() <= 1e-5  # peft's is a float32 QR
    assert (R - A).abs().max() <= 1e-5 * W.norm()
    assert (W - 2 * Q @ R - layer.base_layer.weight).abs().max() <= 1e-5 * W.norm()


def nf4(W):
    packed, state = bnb.quantize_4bit(W.contiguous(), quant_type="nf4", blocksize=64)
    return bnb.dequantize_4bit(packed, state)


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_alternates_as_peft_does(iterations):
    """peft's loop around peft's own low-rank step; its function wants a GPU."""
    W = weight((256, 192), num_spikes=8)
    rest = W.clone()
    for i in range(iterations):
        base = nf4(rest)
        step = peft_loftq._low_rank_decomposition(W - base, reduced_rank=8)
        if i + 1 < iterations:
            rest = W - step["L"] @ step["R"]
    A, B, my_rest = spectra.loftq(W, 8, nf4, iterations)
    assert (A.shape, B.shape) == ((8, 192), (256, 8))
    # float32 against float64: an entry beside a boundary of nf4 may fall on the other side
    assert ((nf4(my_rest) - base).abs() > 1e-6).float().mean() <= 1e-3
    mine, theirs = (W - nf4(my_rest) - B @ A).norm(), (W - base - step["L"] @ step["R"]).norm()
    assert abs(mine - theirs) <= 1e-4 * theirs
    if iterations == 1:
        assert torch.equal(my_rest, W)
        assert (B @ A - step["L"] @ step["R"]).norm() <= 1e-4 * (B @ A).norm()


def test_loftq_comes_nearer_with_every_iteration():
    W = weight((256, 192), num_spikes=8)
    errors = [(W - nf4(W)).norm()]
    for iterations in (1, 5):
        A, B, rest = spectra.loftq(W, 16, nf4, iterations)
        errors.append((W - nf4(rest) - B @ A).norm())
        # balanced halves, as peft's square roots
        assert torch.allclose(A.norm(dim=1), B.norm(dim=0), rtol=1e-4)
    assert errors[0] > errors[1] > errors[2]
