"""What LoRA-Dash, LoRA-Init and LoRA-TSD share: a second phase over directions that LoRA's first steps point at.

Task-specific directions (Si et al., 2024, arXiv:2409.01035): with W = U diag(S) V^T and the update s B A that was
learned so far, direction i scores |u_i^T (s B A) v_i| / (S_i + eps); the largest scores are T. U, S, V are those of
the full-precision weight: 4-bit noise replaces small directions entirely.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from decompft.adapters import spectra
from decompft.adapters.base import Adapter, Cached, Facts, kaiming_uniform
from decompft.adapters.lora import scaling


class LaunchedAdapter(Adapter):
    """LoRA until `start_step`; then, between two optimizer steps, `launched` gives what it goes on with.

    Every tensor exists from the start, so that optimizer and sharding see one set: buffers of the second phase
    are 0 before it, and `phase` is 1 in it.
    """

    A: torch.nn.Parameter
    B: torch.nn.Parameter
    phase: Tensor  # (1,)
    indices: Tensor  # of T in the descending spectrum of W, as floats

    @property
    def start_step(self) -> int:
        """Optimizer steps that are taken in the first phase."""
        steps: int = self.config.options.start_step
        return steps

    def initial_values(self, generator: torch.Generator, facts: Facts) -> dict[str, Tensor]:
        zeros = {n: torch.zeros(s) for n, s in (self.shapes | self.fixed_shapes).items()}
        return {**zeros, "A": kaiming_uniform(self.shapes["A"], generator)}

    def directions(self, weight: Tensor, A: Tensor, B: Tensor, cached: Cached) -> dict[str, Tensor]:
        """The directions T in the order of their scores: indices and scores (k,), U (k, out), S (k,), V (k, in).

        Scores that are all 0 say nothing: B has not moved.

        Args:
            weight: the full-precision one, float32 (out, in); A and B whole, on its device.
        """

        def make() -> dict[str, Tensor]:
            U, S, V = spectra.full(weight)
            return {"U": U.T, "S": S, "V": V.T}

        found = cached("full", min(weight.shape), make)
        U_PO, S_P, V_PI = found["U"], found["S"], found["V"]
        score = scores(U_PO, S_P, V_PI, A, B, s=scaling(self.config), eps=self.config.options.eps)
        indices = highest(score, S_P, self.fixed_shapes["indices"][0], max(weight.shape))
        chosen = {"U": U_PO[indices], "S": S_P[indices], "V": V_PI[indices]}
        return {"indices": indices.float(), "scores": score[indices], **chosen}

    def launched(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Trained tensors and buffers that the second phase begins with, by name.

        Args:
            found: what `directions` returned.
        """
        return {"indices": found["indices"], "phase": torch.ones(1)}


def scores(U_PO: Tensor, S_P: Tensor, V_PI: Tensor, A: Tensor, B: Tensor, *, s: float, eps: float) -> Tensor:
    """|u_i^T (s B A) v_i| / (S_i + eps) for all i (P,), without the product B A (METHODS 1.3, identity 6)."""
    coordinates = s * torch.sum((U_PO @ B) * (V_PI @ A.T), dim=1)
    return coordinates.abs() / (S_P + eps)


def highest(score_P: Tensor, S_P: Tensor, k: int, size: int) -> Tensor:
    """The k directions of the highest scores (k,), best first; those that W does not have come after all others.

    Nearly 0 under a score, their singular values would have them win, and their vectors are noise of the
    decomposition: any rotation of the null space is as good. W does not have those below its numerical rank,
    max(out, in) eps S_1.

    Args:
        S_P: the singular values, float32.
        size: max(out, in).
    """
    has = S_P > size * torch.finfo(torch.float32).eps * S_P.max()
    return torch.where(has, score_P, -1 / (1 + score_P)).topk(k).indices
