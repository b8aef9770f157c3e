"""LoRA (Hu et al., 2021, arXiv:2106.09685, eq. 3), rsLoRA's scaling (Kalajdzievski, 2023, arXiv:2312.03732)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from decompft.adapters.base import Adapter, Facts, kaiming_uniform
from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.frozen.factors import Factors
from decompft.adapters.spec import AdapterConfig


def scaling(config: AdapterConfig) -> float:
    """s = alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    if getattr(config.options, "scaling", "alpha/r") == "rslora":
        return config.alpha / math.sqrt(config.rank)
    return config.alpha / config.rank


def make_lora(base: FrozenLinear, config: AdapterConfig) -> LoraLinear:
    """LoRA with the start that the options name."""
    if config.options.init == "kaiming":
        return LoraLinear(base, config)
    from decompft.adapters.loftq import LoftqLinear  # which needs this module

    return LoftqLinear(base, config)


class LoraLinear(Adapter):
    """y = (W + s B A) x + bias. At the start B is 0: the layer equals its base, and A has no slope yet."""

    A: torch.nn.Parameter
    B: torch.nn.Parameter

    def factors(self, trained: tuple[Tensor, ...], fixed: tuple[Tensor, ...]) -> Factors:
        A, B = trained
        return Factors(up=B, down=A, q=scaling(self.config))

    def pull_back(
        self,
        trained: tuple[Tensor, ...],
        fixed: tuple[Tensor, ...],
        found: Factors,
        grads: Factors,
        weight: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        return grads.down, grads.up

    def initial_values(self, generator: torch.Generator, facts: Facts) -> dict[str, Tensor]:
        return {"A": kaiming_uniform(self.shapes["A"], generator), "B": torch.zeros(self.shapes["B"])}

    def lr_scales(self) -> dict[str, float]:
        """LoRA+ (Hayou et al., 2024, arXiv:2402.12354): B learns `lr_ratio` times as fast as A."""
        return {"B": self.config.options.lr_ratio}
