"""METHODS 1.3's identities in float64, as the formulas that the adapters' fast paths rest on.

Each method's own tests hold its code to its equation; these hold the algebra itself, the third identity (column
norms) included, which no method here needs yet.
"""

import pytest
import torch

OUT, IN, RANK, S, P = 24, 32, 4, 1.7, 24


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def layer(draw):
    return draw(OUT, IN), draw(RANK, IN), draw(OUT, RANK)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_1_norm_of_a_product_from_two_grams(layer):
    _, A, B = layer
    close(torch.sum((B.T @ B) * (A @ A.T)), torch.linalg.norm(B @ A) ** 2)


def test_2_row_norms_from_a_thin_product(layer):
    W, A, B = layer
    thin = W @ A.T
    found = (W * W).sum(1) + 2 * S * (thin * B).sum(1) + S**2 * ((B @ (A @ A.T)) * B).sum(1)
    close(found.sqrt(), torch.linalg.norm(W + S * B @ A, dim=1))


def test_3_column_norms_from_a_thin_product(layer):
    W, A, B = layer
    thin = W.T @ B
    found = (W * W).sum(0) + 2 * S * (thin * A.T).sum(1) + S**2 * ((A.T @ (B.T @ B)) * A.T).sum(1)
    close(found.sqrt(), torch.linalg.norm(W + S * B @ A, dim=0))


def test_4_gradient_of_a_normalised_product_without_a_dense_one(layer, draw):
    W, A, B = (t.requires_grad_(True) for t in layer)
    a, b = (draw(1).requires_grad_(True) for _ in range(2))
    X, G = draw(7, IN), draw(7, OUT)
    D = B @ A
    n = torch.linalg.norm(D)
    weight = a * W / torch.linalg.norm(W) + b * D / n
    (X @ weight.T).backward(G)
    with torch.no_grad():
        thin = G.T @ (X @ A.T)  # Gw A^T
        c = torch.sum(B * thin)
        close(B.grad, b / n * (thin - c / n**2 * B @ (A @ A.T)))
        close(A.grad, b / n * ((B.T @ G.T) @ X - c / n**2 * (B.T @ B) @ A))
        close(b.grad, (c / n).reshape(1))
        close(a.grad, (torch.sum(G * (X @ W.T)) / torch.linalg.norm(W)).reshape(1))
        assert abs(torch.sum(B.grad * B)) < 1e-9


def test_5_an_elementwise_product_is_r_scaled_passes(layer, draw):
    W, A, B = layer
    x = draw(IN)
    close((W * (B @ A)) @ x, sum(B[:, k] * (W @ (A[k] * x)) for k in range(RANK)))


def test_6_scores_of_directions_without_the_dense_change(layer):
    W, A, B = layer
    U, _, Vt = torch.linalg.svd(W, full_matrices=False)
    dense = torch.diagonal(U.T @ (S * B @ A) @ Vt.T)
    close(S * torch.sum((U.T @ B) * (A @ Vt.T).T, dim=1), dense)


@pytest.mark.parametrize("k", [1, 5])
def test_7_rescaling_the_top_is_a_thin_term_and_needs_u_alone(layer, draw, k):
    W, _, _ = layer
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    m = torch.zeros(P, dtype=torch.float64)
    m[:k] = draw(k)
    rescaled = U @ torch.diag(sigma * (1 + m)) @ Vt
    close(W + U[:, :k] @ torch.diag(m[:k] * sigma[:k]) @ Vt[:k], rescaled)
    close(W + (U[:, :k] * m[:k]) @ (U[:, :k].T @ W), rescaled)


def test_8_moved_vectors_are_three_thin_terms(layer, draw):
    W, _, _ = layer
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    moved_out, moved_in = draw(OUT, RANK), draw(IN, RANK)
    left = torch.cat((U[:, :RANK] + moved_out, U[:, RANK:]), dim=1)
    right = torch.cat((Vt[:RANK].T + moved_in, Vt[RANK:].T), dim=1)
    top = torch.diag(sigma[:RANK])
    terms = moved_out @ top @ Vt[:RANK] + U[:, :RANK] @ top @ moved_in.T + moved_out @ top @ moved_in.T
    close(left @ torch.diag(sigma) @ right.T, W + terms)
