"""Frozen RMSNorms by a kernel of ours, and which of them make the residual's sum of slopes, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from decompft.adapters.frozen.rms_norm import rms_norm, rms_norm_and_residual
from decompft.adapters.kernels import rms_norm as kernel
from decompft.launcher.recompute import Recompute, pieces_of

# Liger puts its own class in the place of the family's, for models that are built later in the process
_CLASSES = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm", "LigerRMSNorm")


def use_norms(hf: Any, recompute: Recompute) -> int:
    """Bind them, in place of what computes each norm now; returns how many.

    That goes on where the kernel does not fit, or is not proved, and for norms whose weight trains.
    """
    family = hf.config.model_type
    if family not in kernel.FAMILIES:
        return 0
    summing, count = _summing(family, recompute), 0
    for name, module in hf.named_modules():
        if type(module).__name__ in _CLASSES and not module.weight.requires_grad:
            of_residual = name.rpartition(".")[2] in summing
            module.forward = _forward(module, rms_norm_and_residual if of_residual else rms_norm)
            count += 1
    return count


def _summing(family: str, recompute: Recompute) -> tuple[str, ...]:
    """Names of norms whose input is the residual and may be taken for changed.

    A checkpoint around a block has saved the block's input before the first norm sees it, and hooks that run norms
    again hold every norm's input.
    """
    pieces = pieces_of(family)
    assert pieces is not None
    first, *others = (name for name in pieces.norms if "." not in name)
    if recompute == "none":
        return (first, *others)
    return tuple(others) if recompute in ("full", "offloaded") else ()


def _forward(
    norm: nn.Module, compute: Callable[[Tensor, Tensor, float], Tensor]
) -> Callable[[Tensor], Tensor]:
    before: Callable[[Tensor], Tensor] = norm.forward
    eps: float = norm.variance_epsilon  # type: ignore[assignment]

    def forward(x: Tensor) -> Tensor:
        # an engine may put another tensor into the place of the weight
        weight: Tensor = norm.weight  # type: ignore[assignment]
        if torch.compiler.is_compiling() or not kernel.fits(x, weight):
            return before(x)
        return compute(x, weight, eps)

    return forward
