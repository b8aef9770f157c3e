"""MLPs of the form down(silu(gate(x)) * up(x)) whose activation adds the thin branches of gate and up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from decompft.adapters.base import Adapter
from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.joint import together
from decompft.adapters.kernels import swiglu as kernel

# Liger puts its own class in the place of the family's, for models that are built later in the process
_CLASSES = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "LigerSwiGLUMLP")
_ACTIVATIONS = ("silu", "swish")
_IS_BOUND = "_decompft_gated"  # attribute of an MLP


def use_gated(hf: Any) -> int:
    """Bind them, in place of what computes each MLP now; returns how many.

    That goes on where the kernel does not fit or is not proved, and where gate and up compute alone.
    """
    if hf.config.model_type not in kernel.FAMILIES or hf.config.hidden_act not in _ACTIVATIONS:
        return 0
    found = [m for m in hf.modules() if type(m).__name__ in _CLASSES]
    for module in found:
        module.forward = _forward(module)
        module.__dict__[_IS_BOUND] = True
    return len(found)


def gated_front(mlp: nn.Module, x: Tensor) -> tuple[Tensor, Callable[[], Tensor]] | None:
    """What a bound MLP gives to its last linear, and how to make it again before the backward pass comes to it.

    None where the MLP computes as it would unbound.
    """
    if not mlp.__dict__.get(_IS_BOUND) or torch.compiler.is_compiling() or not kernel.fits(x):
        return None
    # linears may be exchanged for others at any time
    pair: Any = (mlp.gate_proj, mlp.up_proj)
    if any(not isinstance(m, Adapter | FrozenLinear) or _has_hooks(m) for m in pair):
        return None
    return together(x, pair)


def _forward(mlp: nn.Module) -> Callable[[Tensor], Tensor]:
    before: Callable[[Tensor], Tensor] = mlp.forward

    def forward(x: Tensor) -> Tensor:
        front = gated_front(mlp, x)
        if front is None:
            return before(x)
        down: Any = mlp.down_proj
        result: Tensor = down(front[0])
        return result

    return forward


def _has_hooks(module: nn.Module) -> bool:
    """Of an engine, say: who sees the linear's calls must be called."""
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return any(hooks)
