"""LoRA (Hu et al., 2021, arXiv:2106.09685, eq. 3), rsLoRA's scaling (Kalajdzievski, 2023, arXiv:2312.03732)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from decompft.adapters.base import Adapter, kaiming_uniform
from decompft.adapters.spec import AdapterConfig


def scaling(config: AdapterConfig) -> float:
    """s = alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    if getattr(config.options, "scaling", "alpha/r") == "rslora":
        return config.alpha / math.sqrt(config.rank)
    return config.alpha / config.rank


class LoraLinear(Adapter):
    """y = (W + s B A) x + bias. At the start B is 0: the layer equals its base, and A has no slope yet."""

    A: torch.nn.Parameter
    B: torch.nn.Parameter

    def scales(self, *trained: Tensor) -> tuple[Tensor | None, Tensor | float, tuple[Tensor, ...]]:
        return None, scaling(self.config), ()

    def initial_values(self, generator: torch.Generator, facts: Mapping[str, float]) -> dict[str, Tensor]:
        return {"A": kaiming_uniform(self.shapes["A"], generator), "B": torch.zeros(self.shapes["B"])}

    def merged(self, dense: Tensor) -> Tensor:
        return dense.float() + scaling(self.config) * (self.B @ self.A)

    def lr_scales(self) -> dict[str, float]:
        """LoRA+ (Hayou et al., 2024, arXiv:2402.12354): B learns `lr_ratio` times as fast as A."""
        return {"B": self.config.options.lr_ratio}
