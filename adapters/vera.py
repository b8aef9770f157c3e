"""VeRA (Kopiczko et al., 2023, arXiv:2310.11454, eq. 2): trained vectors around frozen random matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from decompft.adapters.base import Adapter, Facts
from decompft.adapters.frozen.factors import Factors
from decompft.adapters.hashed import key_of, uniform


class VeraLinear(Adapter):
    """y = (W + diag(b) B0 diag(d) A0) x + bias, A0 (rank, in) and B0 (out, rank) frozen.

    Starts at b = 0, d = `d_init`. A0 and B0 are Kaiming-uniform (a = sqrt(5)), a hash of `seed`, name and shape: in
    no file, and one tensor for all layers that have the same shape.
    """

    b: torch.nn.Parameter
    d: torch.nn.Parameter

    def factors(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Factors:
        b, d = trained
        A0, B0 = fixed
        return Factors(up=B0 * torch.outer(b, d), down=A0)

    def pull_back(
        self,
        trained: tuple[Tensor, ...],
        fixed: tuple[Tensor, ...],
        found: Factors,
        grads: Factors,
        weight: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        b, d = trained
        _, B0 = fixed
        assert grads.up is not None
        per_entry = grads.up * B0
        return per_entry @ d, b @ per_entry

    def initial_values(self, generator: torch.Generator, facts: Facts) -> dict[str, Tensor]:
        return {
            "b": torch.zeros(self.shapes["b"]),
            "d": torch.full(self.shapes["d"], self.config.options.d_init),
        }

    def derived(self) -> dict[str, Tensor]:
        return {name: self._random(name, shape) for name, shape in self.derived_shapes.items()}

    def _random(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """U(-1/sqrt(shape[1]), 1/sqrt(shape[1])), as `kaiming_uniform`."""
        key = key_of(f"vera:{self.config.options.seed}:{name}:{shape[0]}x{shape[1]}")
        values = uniform(torch.arange(math.prod(shape), dtype=torch.int64, device="cpu"), key).view(shape)
        return values.mul_(2).sub_(1).div_(math.sqrt(shape[1]))
