"""Which thin factors does a full-precision weight give: singular triplets, QR, LoftQ's pair?

W (out, in), p = min(out, in), W = U diag(S) V^T with S descending. Results are float32 on W's device,
with the sign that makes the entry of largest size in each column of U positive.

Inside, all is float64. The Gram matrix of the smaller side then loses nothing that float32 could hold:
singular values are right to 1e-8 S_1 or better, while a float32 SVD of W is right to 1e-7 S_1, and the
singular vectors of small values (the bottom ones, and those that LoRA-Dash looks for) are better by the same
measure. On a CPU it costs 1.3 times that SVD (2048 x 2048: 4.6 s on a core). On a GPU it is one symmetric
eigenproblem, where cuSOLVER's Jacobi SVD (the default of torch.linalg.svd) may fail to converge on large
matrices and then starts again (pytorch issue 64237). No setting for TF32 touches it. Memory beside W: about
3 times W in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Triplets = tuple[Tensor, Tensor, Tensor]  # U (out, k), S (k,) descending, V (in, k)

_ANGLE = 5e-3  # sine of the largest angle between a leading vector of `top` and the true one
_FLOOR = 1e-7  # of S_1: a residual that float32 could not tell from none, whatever the angle
_LARGEST_SHARE = 4  # a basis of more than p / 4 columns costs about what the whole spectrum does
_LEAST_BLOCKS = 12  # SmolLM2-135M's weights took 9 to 18 at k = 8, power laws 6 to 13


def top(W: Tensor, k: int, generator: torch.Generator) -> Triplets:
    """The k leading singular triplets, by a randomised block Krylov method that stops when it has converged.

    Blocks W X, (W W^T) W X, ... of a gaussian X (in, about 1.5 k), each orthonormal to those before it, are one basis
    (Musco and Musco, 2015, arXiv:1504.05477); power iterations alone would keep only the last block. It stops
    when every triplet's residual is below `_ANGLE` times its gap to the next singular value (Davis and
    Kahan): |cos| to the true vector is then above 0.99998, unless two values agree to `_FLOOR`. The whole
    spectrum is taken at once where a small basis is unlikely to do, and in the end where it did not.

    Args:
        generator: of any device; the start is drawn there, so the result depends on W and its state alone.

    Raises:
        ValueError: W has an entry that is not finite, or k is not in 1..p.
    """
    W = _checked(W, k)
    limit = min(W.shape) // _LARGEST_SHARE
    block = k + max(8, k // 2)
    if limit < _LEAST_BLOCKS * block:
        return _exact(W, 0, k)
    start = torch.randn(W.shape[1], block, generator=generator, device=generator.device, dtype=torch.float64)
    X = start.to(W.device)
    basis = W.new_empty(W.shape[0], limit)
    image = W.new_empty(W.shape[1], limit)  # W^T basis
    width, num_blocks, next_look = 0, 0, 2
    while width + block <= limit:
        Y = W @ X
        for _ in range(2):  # once leaves what rounding brings back
            Y = torch.linalg.qr(Y - basis[:, :width] @ (basis[:, :width].T @ Y)).Q
        X = W.T @ Y
        basis[:, width : width + block], image[:, width : width + block] = Y, X
        width, num_blocks = width + block, num_blocks + 1
        if num_blocks == next_look or width + block > limit:
            next_look += max(1, num_blocks // 2)
            found = _ritz(W, basis[:, :width], image[:, :width], k)
            if found is not None:
                return _finished(*found)
    return _exact(W, 0, k)


def bottom(W: Tensor, k: int) -> Triplets:
    """The k trailing singular triplets, still in descending order: the last k columns of `full`.

    A value of the size of 1e-8 S_1 or less is noise, and its vectors are some orthonormal pair.

    Raises:
        ValueError: as `top`.
    """
    p = min(W.shape)
    return _exact(_checked(W, k), p - k, p)


def full(W: Tensor) -> Triplets:
    """All p singular triplets.

    Raises:
        ValueError: W has an entry that is not finite.
    """
    p = min(W.shape)
    return _exact(_checked(W, p), 0, p)


def thin_qr(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """OLoRA's pair (arXiv:2406.01775): the first r columns of Q (out, r) and rows of R (r, in).

    What peft takes from a QR of all of W: the first r reflections see only the first r columns of W, and
    R_r = Q_r^T W. Signs are LAPACK's, as peft's are.

    Raises:
        ValueError: as `top`.
    """
    W = _checked(W, r)
    Q = torch.linalg.qr(W[:, :r]).Q
    return Q.float(), (Q.T @ W).float()


def loftq(
    W: Tensor, r: int, quantize: Callable[[Tensor], Tensor], iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """LoftQ (Li et al., 2023, arXiv:2310.08659), as peft's `loftq_init` alternates: A (r, in), B (out, r), rest.

    W ~ quantize(rest) + B A, with rest = W in the first iteration and W - B A of the one before in the others:
    `rest` is what has to be quantized for the base that A and B belong to. The pair carries no scale, as in peft.

    Args:
        quantize: a weight to its dequantized quantization, both float32 (out, in).
        iterations: at least 1.

    Raises:
        ValueError: as `top`.
    """
    W = _checked(W, r)
    rest = W.float()
    for i in range(iterations):
        U, S, V = _exact(W - quantize(rest).double(), 0, r)
        root = S.sqrt()
        A, B = root[:, None] * V.T, U * root
        if i + 1 < iterations:
            rest = (W - B.double() @ A.double()).float()
    return A, B, rest


def _checked(W: Tensor, k: int) -> Tensor:
    """W in float64, without a graph."""
    if not 1 <= k <= min(W.shape):
        raise ValueError(f"{k} directions of a weight of shape {tuple(W.shape)}, which has {min(W.shape)}")
    if not bool(torch.isfinite(W).all()):
        raise ValueError(f"a weight of shape {tuple(W.shape)} holds entries that are not finite")
    return W.detach().double()


def _exact(W: Tensor, first: int, last: int) -> Triplets:
    """Triplets [first, last) of W (float64), through the Gram matrix of its smaller side."""
    if W.shape[0] < W.shape[1]:
        V, S, U = _of_tall(W.T, first, last)
    else:
        U, S, V = _of_tall(W, first, last)
    return _finished(U, S, V)


def _of_tall(W: Tensor, first: int, last: int) -> Triplets:
    """As `_exact`, with V from W^T W and U from QR of W V.

    W V has orthogonal columns but for rounding, so R is diag(S); unlike a division by S, QR gives orthonormal
    columns even where S is 0. Its columns come in descending size, so that errors of the large ones do not
    grow in the small.
    """
    V = torch.linalg.eigh(W.T @ W).eigenvectors.flip(1)[:, first:last]
    U, R = torch.linalg.qr(W @ V)
    S = R.diagonal()
    U = U * torch.where(S < 0, -1.0, 1.0)
    S, order = S.abs().sort(descending=True, stable=True)
    return U[:, order], S, V[:, order]


def _ritz(W: Tensor, basis: Tensor, image: Tensor, k: int) -> Triplets | None:
    """The best k triplets with U in the span of the basis; None if they have not converged.

    Args:
        basis: (out, m) orthonormal.
        image: (in, m), W^T basis.
    """
    squares, mix = torch.linalg.eigh(image.T @ image)
    squares, mix = squares.flip(0), mix.flip(1)
    S = squares[: k + 1].clamp_min(0).sqrt()
    V, R = torch.linalg.qr(image @ mix[:, :k])
    V = V * torch.where(R.diagonal() < 0, -1.0, 1.0)
    U = basis @ mix[:, :k]
    residual = (W @ V - U * S[:k]).norm(dim=0)
    below = S[:-1] - S[1:]
    above = torch.cat([below.new_full((1,), torch.inf), below[:-1]])
    allowed = (_ANGLE * torch.minimum(below, above)).clamp_min(_FLOOR * float(S[0]))
    return (U, S[:k], V) if bool((residual <= allowed).all()) else None


def _finished(U: Tensor, S: Tensor, V: Tensor) -> Triplets:
    largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
    return (U * sign).float().contiguous(), S.float().contiguous(), (V * sign).float().contiguous()
