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

from decompft.adapters.base import Adapter, Settling, kaiming_uniform
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
        s, eps = scaling(self.config), self.config.options.eps
        p, q, norm = _MapScales.apply(self.A, self.B, self.a, self.b, self.base_norm, s, self.warmup, eps)
        self._update_norm = norm
        return p, q

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

    def settling(self) -> dict[str, Settling]:
        """At B = 0 the slope of D / (N(D) + eps) is 1/eps, a million times LoRA's, and one step
        later a hundred times. Unscaled, that one gradient would fill AdamW's second moment and
        hold B still for thousands of steps, and would shrink every other gradient by clipping."""
        options = self.config.options
        if not options.settle_norm or self._update_norm is None:
            return {}
        return {"B": Settling(size=self._update_norm, offset=options.eps, limit=options.settle_norm)}


class _MapScales(torch.autograd.Function):
    """(p, q, N(D)), each (1,): p = a / (N(W) + eps), q = w b s / (N(D) + eps), w the warm-up.

    N(D) = s n, n = sqrt(tr((B^T B)(A A^T))) (METHODS 1.3, identity 1), so that
    dB = B (A A^T) dn / n and dA = (B^T B) A dn / n; both are taken as 0 at n = 0, where the norm has no slope.
    One node, because everything here is rank x rank or smaller and costs its launch.
    """

    @staticmethod
    def forward(
        ctx: Any, A: Tensor, B: Tensor, a: Tensor, b: Tensor, base_norm: Tensor, s: float, w: float, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        AAt, BtB = A @ A.T, B.T @ B
        n = torch.sum(AAt * BtB).clamp_min_(0).sqrt_().reshape(1)
        update_norm = s * n
        per_b = (w * s) / (update_norm + eps)  # dq/db
        per_a = (base_norm + eps).reciprocal_()  # dp/da
        ctx.save_for_backward(A, B, b, AAt, BtB, n, per_a, per_b)
        ctx.factor = 1 / w  # dq/dn = -b per_b s / (N(D) + eps) = -b per_b**2 / w
        ctx.mark_non_differentiable(update_norm)
        return a * per_a, b * per_b, update_norm

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dp, dq, _ = grads
        A, B, b, AAt, BtB, n, per_a, per_b = ctx.saved_tensors
        db = dq * per_b
        slope = torch.where(n > 0, db * b * per_b / n, 0.0).mul_(-ctx.factor)
        return (BtB * slope) @ A, B @ (AAt * slope), dp * per_a, db, None, None, None, None
