"""What every adapter is: a frozen base, trained tensors, and two scalars that weigh them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.frozen.linear import frozen_linear
from decompft.adapters.spec import ADAPTER_SPECS, AdapterConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Settling:
    """A tensor's gradient is to be scaled by min(1, (size + offset) / limit).

    While that is below 1 the tensor is left out of gradient clipping as well.
    """

    size: Tensor  # (1,), on the device: the host reads all layers' at once
    offset: float
    limit: float

    def factor(self, size: float) -> float:
        return min(1.0, (size + self.offset) / self.limit)


class Adapter(nn.Module):
    """A linear layer y = p (W x) + q B (A x) + bias over a frozen W; subclasses give p and q.

    Shapes: x (..., in), W (out, in), A (rank, in), B (out, rank). Trained tensors are float32
    whatever the compute dtype, and are parameters of this module under their registry names.
    """

    def __init__(self, base: FrozenLinear, config: AdapterConfig) -> None:
        super().__init__()
        self.base = base
        self.config = config
        # kept, because a sharded parameter may not say its whole shape
        self.shapes = ADAPTER_SPECS[config.method].tensors(base.out_features, base.in_features, config.rank)
        for name, shape in self.shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32)))

    def scales(self, *trained: Tensor) -> tuple[Tensor | None, Tensor | float, tuple[Tensor, ...]]:
        """p (None for 1), q, and what `scales_backward` needs; no autograd inside.

        Args:
            trained: the trained tensors in the registry's order, A and B first.
        """
        raise NotImplementedError

    def scales_backward(self, saved: tuple[Tensor, ...], dp: Tensor, dq: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the trained tensors through p and q; only for a method whose q is a tensor."""
        raise NotImplementedError

    def initial_values(self, generator: torch.Generator, facts: Mapping[str, float]) -> dict[str, Tensor]:
        """Values of the trained tensors, and of buffers, at the start.

        Args:
            generator: a CPU generator seeded for this layer alone, so that the values depend on
                neither world size nor the order of layers.
            facts: what the method's spec needs of the base, e.g. {"frobenius_norm": 12.3}.
        """
        raise NotImplementedError

    def merged(self, dense: Tensor) -> Tensor:
        """The one weight (out, in) that equals this layer over the base weight `dense`, in float32."""
        raise NotImplementedError

    def on_step(self, step: int) -> None:
        """Called on all ranks before the forward passes of optimizer step `step` (from 0)."""

    def lr_scales(self) -> dict[str, float]:
        """Trained tensor -> its learning rate over the recipe's; 1 for those not named."""
        return {}

    def settling(self) -> dict[str, Settling]:
        """Trained tensors whose gradient is scaled down while the layer settles."""
        return {}

    def forward(self, x: Tensor) -> Tensor:
        dropped = None
        if self.config.dropout and self.training:
            dropped = F.dropout(x, self.config.dropout)
        return frozen_linear(x, self.base, dropped=dropped, thin=self, trained=self.trained())

    def trained(self) -> tuple[Tensor, ...]:
        """The trained tensors in the registry's order."""
        return tuple(self.parameters(recurse=False))


def kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Kaiming-uniform with a = sqrt(5), as LoRA starts A: U(-1/sqrt(in), 1/sqrt(in))."""
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
