"""LoRA started by LoftQ (Li et al., 2023, arXiv:2310.08659, algorithm 1), as peft alternates.

    y = (Q(R) + s B A) x + bias,   R = W at iteration 1, W - s B' A' with the pair of the iteration before at others

Q is the base's own quantizer, W the full-precision weight, and s B A starts as the best rank-r answer to W - Q(R).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from decompft.adapters import spectra
from decompft.adapters.base import Cached, Facts
from decompft.adapters.directions import moved, rest_rows, tensors_of
from decompft.adapters.lora import LoraLinear, scaling
from decompft.adapters.spec import spec_of


class LoftqLinear(LoraLinear):
    """Starts near W, nearer than Q(W). With one iteration the base is Q(W), anyone's.

    With more, the pair of the iteration before the last is in the file as A0 and B0: the base is made of it again
    elsewhere. The pair of the algorithm carries no scale: either tensor is divided by sqrt(s), where peft would
    leave the product s times too large.
    """

    @property
    def rewrites_base(self) -> bool:
        return bool(self.fixed_shapes)

    def base_rows(self, rows: Tensor, first: int, values: Mapping[str, Tensor]) -> Tensor:
        if not self.rewrites_base:
            return rows
        return rest_rows(rows, first, (values["B0"], values["A0"]), scaling(self.config))

    @torch.no_grad()
    def change_of_checkpoint(self) -> tuple[Tensor, Tensor] | None:
        if not self.rewrites_base:
            return self.delta()
        start = self.get_buffer("B0"), self.get_buffer("A0")
        return moved((self.B, self.A), start, scaling(self.config))

    def facts_of(self, weight: Tensor, cached: Cached, generator: torch.Generator) -> dict[str, Tensor]:
        """A, B and, where there is more than one iteration, A0, B0; not cached, since it depends on the quantizer.

        Raises:
            ValueError: the quantizer loses nothing of this weight.
        """
        if torch.equal(self._quantized(weight), weight):
            sizes = (self.base.out_features, self.base.in_features)
            raise ValueError(spec_of(self.config).refusal(*sizes, self.config, False))
        root, rest = scaling(self.config) ** 0.5, weight
        found: dict[str, Tensor] = {}
        iterations, r = self.config.options.loftq_iterations, self.config.rank
        if iterations > 1:
            A0, B0, _ = spectra.loftq(weight, r, self._quantized, iterations - 1)
            found = {"A0": A0 / root, "B0": B0 / root}
            rest = self.base_rows(weight, 0, found)
        # one more, over a base of the rest
        used = self._quantized(rest)
        A, B, _ = spectra.loftq(weight, r, lambda _: used, 1)
        return found | {"A": A / root, "B": B / root}

    def initial_values(self, generator: torch.Generator, facts: Facts) -> dict[str, Tensor]:
        names = (*self.shapes, *self.fixed_shapes)
        return dict(zip(names, tensors_of(facts, *names), strict=True))

    def _quantized(self, weight: Tensor) -> Tensor:
        return self.base.unpack(self.base.pack(weight), torch.float32)
