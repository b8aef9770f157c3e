"""LieRA on a convolution kernel, over a dense base; no recipe uses it, a model's author may.

This is a reading: the paper (Si et al., 2025, arXiv:2504.00851) applies its map to kernels, whose entries form
the same group, but how B A takes a kernel's shape could not be read. Here, as loralib lays LoRA's
convolutions out, for a kernel (C_out, C_in / groups, k, k) and rank r:

    A (r k, (C_in / groups) k),    B (C_out k, r k),    D = s B A, viewed as the kernel
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LieraConv2d(nn.Module):
    """y = conv(x, W o (1 + D)) + bias, or W o exp(D), with D = s B A in the kernel's shape.

    Trains A (r k, C_in / groups k) and B (C_out k, r k): r k (C_out + C_in / groups) k numbers. B starts at 0.

    Args:
        base: with a square kernel; its weight and bias are frozen here.
        is_exact: exp(D), D held within +-`clamp`, instead of 1 + D.

    Raises:
        ValueError: the kernel is not square.
    """

    def __init__(
        self, base: nn.Conv2d, *, rank: int, alpha: float, is_exact: bool = False, clamp: float = 8.0
    ) -> None:
        super().__init__()
        out, in_, height, width = base.weight.shape
        if height != width:
            raise ValueError(f"kernel of {height} x {width}: the layout of A and B needs a square one")
        self.base = base.requires_grad_(False)
        self.scaling, self.is_exact, self.clamp = alpha / rank, is_exact, clamp
        k = height
        self.A = nn.Parameter(torch.empty(rank * k, in_ * k))
        self.B = nn.Parameter(torch.zeros(out * k, rank * k))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def merged(self) -> Tensor:
        """The kernel (C_out, C_in / groups, k, k) that equals this layer."""
        change = (self.scaling * (self.B @ self.A)).view(self.base.weight.shape)
        factor = change.clamp(-self.clamp, self.clamp).exp() if self.is_exact else 1 + change
        return self.base.weight * factor.to(self.base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        base = self.base
        padding: str | int | tuple[int, ...] = base.padding
        if base.padding_mode != "zeros":
            x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
            padding = 0
        return F.conv2d(x, self.merged(), base.bias, base.stride, padding, base.dilation, base.groups)
