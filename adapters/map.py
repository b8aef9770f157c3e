"""MAP over LoRA, "LoMAP" (Si et al., 2025, arXiv:2505.23094; eps and init of its 2026 revision).

    W* = a W / (N(W) + eps) + b D / (N(D) + eps),    D = s B A

N is the Frobenius norm of the whole matrix; a and b are one trained scalar each. Of a quantized
base, W is what is really used: the dequantized weight, and N(W) is taken of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from decompft.adapters.base import Adapter, kaiming_uniform
from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.lora import scaling
from decompft.adapters.spec import AdapterConfig


class MapLinear(Adapter):
    """y = (a / (N(W) + eps)) W x + (b s / (N(D) + eps)) B A x + bias.

    Starts at a = N(W), B = 0, b = `b_init`: the base up to eps. N(D) is s sqrt(tr((B^T B)(A A^T))),
    two rank x rank products in float32; the norm is not detached. After the first optimizer
    step the update has norm b whatever the learning rate; `b_warmup_steps` softens that.
    """

    A: torch.nn.Parameter
    B: torch.nn.Parameter
    a: torch.nn.Parameter
    b: torch.nn.Parameter
    base_norm: Tensor

    def __init__(self, base: FrozenLinear, config: AdapterConfig) -> None:
        super().__init__(base, config)
        # in the adapter's file: a merge elsewhere must divide by the norm that a was trained with
        self.register_buffer("base_norm", torch.empty(1, dtype=torch.float32))
        self.warmup = 1.0
        self._update_norm: Tensor | None = None

    def scales(self) -> tuple[Tensor | None, Tensor | float]:
        norm = scaling(self.config) * product_norm(self.B, self.A)
        self._update_norm = norm.detach()
        eps = self.config.options.eps
        thin = self.b * (self.warmup * scaling(self.config)) / (norm + eps)
        return self.a / (self.base_norm + eps), thin

    def initial_values(self, generator: torch.Generator, facts: Mapping[str, float]) -> dict[str, Tensor]:
        norm = torch.tensor([facts["frobenius_norm"]], dtype=torch.float32)
        return {
            "A": kaiming_uniform(tuple(self.A.shape), generator),
            "B": torch.zeros(self.B.shape),
            "a": norm.clone(),
            "b": torch.tensor([self.config.options.b_init], dtype=torch.float32),
            "base_norm": norm,
        }

    def merged(self, dense: Tensor) -> Tensor:
        eps = self.config.options.eps
        update = scaling(self.config) * (self.B @ self.A)
        base = dense.float() * (self.a / (self.base_norm + eps))
        return base + update * (self.b * self.warmup / (torch.linalg.norm(update) + eps))

    def on_step(self, step: int) -> None:
        steps = self.config.options.b_warmup_steps
        self.warmup = min(1.0, (step + 1) / steps) if steps else 1.0

    def lr_scales(self) -> dict[str, float]:
        options = self.config.options
        return {
            "B": options.lr_ratio,
            "a": options.magnitude_lr_ratio,
            "b": options.magnitude_lr_ratio,
        }

    def settling(self) -> dict[str, Tensor]:
        """At B = 0 the slope of D / (N(D) + eps) is 1/eps, a million times LoRA's, and one step
        later a hundred times. Unscaled, that one gradient would fill AdamW's second moment and
        hold B still for thousands of steps, and would shrink every other gradient by clipping."""
        limit = self.config.options.settle_norm
        if not limit or self._update_norm is None:
            return {}
        return {"B": ((self._update_norm + self.config.options.eps) / limit).clamp(max=1.0)}


def product_norm(B: Tensor, A: Tensor) -> Tensor:
    """N(B A) of shape (1,) for B (out, rank), A (rank, in), without the product (METHODS 1.3, identity 1)."""
    norm: Tensor = _ProductNorm.apply(B, A)
    return norm


class _ProductNorm(torch.autograd.Function):
    """n = sqrt(tr((B^T B)(A A^T))); dB = B (A A^T) / n, dA = (B^T B) A / n, both 0 where n is 0.

    One node instead of a dozen: the products are rank x rank, so that launches are what it costs.
    """

    @staticmethod
    def forward(ctx: Any, B: Tensor, A: Tensor) -> Tensor:
        BtB, AAt = gram(B.T), gram(A)
        norm = torch.sum(BtB * AAt).clamp_min(0).sqrt().reshape(1)
        ctx.save_for_backward(B, A, BtB, AAt, norm)
        return norm

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        B, A, BtB, AAt, norm = ctx.saved_tensors
        slope = torch.where(norm > 0, grads[0] / norm, 0.0)
        return B @ (AAt * slope), (BtB * slope) @ A


def gram(A: Tensor) -> Tensor:
    """A A^T (rank, rank) of A (rank, n), in A's dtype."""
    rank, n = A.shape
    pieces = next((k for k in (32, 16, 8, 4, 2) if n % k == 0 and n // k >= 64), 1)
    # one long sum over n runs on a single multiprocessor; pieces of it run side by side
    parts = A.reshape(rank, pieces, n // pieces).transpose(0, 1)
    return torch.bmm(parts, parts.transpose(1, 2)).sum(0)
