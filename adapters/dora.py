"""DoRA (Liu et al., 2024, arXiv:2402.09353, eq. 5; the norm is a constant to autograd, section 4.3).

    W* = diag(m / n) (W + s B A),    n_j = |W_j + s B_j A|

n comes from W A^T, rank columns, and a rank x rank product (METHODS 1.3, identity 2): B A is never made whole. Of a
quantized base, W is what is really used: the dequantized weight, of which W A^T is made tile by tile
(kernels/weight_times.py, else of all of it), before it is unpacked with m / n in it for the product with x.

W A^T is taken with A rounded to the compute dtype, as the forward pass rounds it, and summed in float32. In
bfloat16 that moves n_j by at most about 2**-8 |s B_j A| / |W_j| of itself: the part of the update in the row,
a few percent, times what every product of the layer is rounded by anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decompft.adapters.base import Adapter, Facts, kaiming_uniform
from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.frozen.factors import Factors, WeightTimes
from decompft.adapters.kernels import rows
from decompft.adapters.lora import scaling
from decompft.adapters.spec import AdapterConfig


class DoraLinear(Adapter):
    """y = (m / n) (W x + s B A x_d) + bias, x_d after dropout: (m / n) W takes x as it is.

    Starts at m = n = row norms, B = 0: the base. `rn2`, the squared row norms, is in the adapter's
    file: n elsewhere must be the n that m was trained against.
    """

    reads_weight = True

    A: torch.nn.Parameter
    B: torch.nn.Parameter
    m: torch.nn.Parameter
    rn2: Tensor

    def __init__(self, base: FrozenLinear, config: AdapterConfig) -> None:
        super().__init__(base, config)
        self.scaling = scaling(config)

    def note(
        self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...], times: WeightTimes
    ) -> tuple[Tensor, ...]:
        """n (out,), and on a GPU the factors that are made in the same launch."""
        A, B, m = trained
        P = times(A)
        if rows.fits(A, B):
            return rows.factors(P, A @ A.T, B, fixed[0], m, self.scaling)
        return (row_norms(A, B, fixed[0], P, self.scaling),)

    def factors(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Factors:
        A, B, m = trained
        _, n, *made = fixed
        if made:
            row, per_B, up = made
            return Factors(up=up, down=A, row=row, keep=(per_B,))
        row = m / n
        per_B = (row * self.scaling).view(-1, 1)
        return Factors(up=B * per_B, down=A, row=row, keep=(per_B.view(-1),))

    def pull_back(
        self,
        trained: tuple[Tensor, ...],
        fixed: tuple[Tensor, ...],
        found: Factors,
        grads: Factors,
        weight: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """dm = (drow + s sum_k dup_k B_k) / n, dB = s (m / n) dup, dA = ddown."""
        A, B, _ = trained
        (_, n, *_), (per_B,) = fixed, found.keep
        assert grads.row is not None and grads.up is not None
        dup = grads.up.contiguous()
        pull = rows.pull_ if rows.fits(A, B) else rows.plain_pull_
        dm = pull(dup, B, grads.row, n, per_B, self.scaling)
        return grads.down, dup, dm

    def initial_values(self, generator: torch.Generator, facts: Facts) -> dict[str, Tensor]:
        norms = torch.as_tensor(facts["row_norms"], dtype=torch.float32)
        return {
            "A": kaiming_uniform(self.shapes["A"], generator),
            "B": torch.zeros(self.shapes["B"]),
            "m": norms.clone(),
            "rn2": norms.square(),
        }

    def fixed_over(self, dense: Tensor) -> tuple[Tensor, ...]:
        """Merged into another weight, its rows have norm m, as DoRA's do: n is of that weight."""
        return (norms_squared(dense),)

    def lr_scales(self) -> dict[str, float]:
        options = self.config.options
        return {"B": options.lr_ratio, "m": options.magnitude_lr_ratio}


def norms_squared(dense: Tensor) -> Tensor:
    """|W_j|^2 (out,), float32 or better."""
    weight = dense if dense.dtype == torch.float64 else dense.float()
    return torch.linalg.vecdot(weight, weight)


def row_norms(A: Tensor, B: Tensor, rn2: Tensor, P: Tensor, s: float) -> Tensor:
    """n_j = |W_j + s B_j A| (out,) from rn2_j = |W_j|^2 and P = W A^T."""
    return rows.plain_norms(P, A @ A.T, B, rn2, s)
