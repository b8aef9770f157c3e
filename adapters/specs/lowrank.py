"""LoRA and MAP over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from decompft.adapters.specs.base import AdapterConfig, AdapterSpec, Options, Shapes, doc, low_rank, names


@dataclass(frozen=True, kw_only=True)
class LoraOptions(Options):
    """Options of `adapter.method: lora`."""

    scaling: Literal["alpha/r", "rslora"] = doc("s = alpha/rank, or alpha/sqrt(rank)", "alpha/r")
    lr_ratio: float = doc("learning rate of B over that of A (LoRA+; 16 is usual)", 1.0)


@dataclass(frozen=True, kw_only=True)
class MapOptions(Options):
    """Options of `adapter.method: map`."""

    eps: float = doc("added to both norms, as in the equation", 1e-6)
    b_init: float = doc("magnitude of the update at the start (b0)", 1.0)
    b_warmup_steps: int = doc(
        "steps over which the update's magnitude is raised linearly to b; 0 is the equation", 0
    )
    settle_norm: float = doc(
        "while N(D) is below this, B is left out of gradient clipping and its gradient is scaled "
        "by (N(D) + eps) / settle_norm, so that the 1/eps slope at B = 0 does not poison the "
        "optimizer's second moment; 0 turns both off",
        1e-3,
    )
    lr_ratio: float = doc("learning rate of B over that of A", 1.0)
    magnitude_lr_ratio: float = doc("learning rate of a and b over that of A", 1.0)


def _map_tensors(out: int, in_: int, config: AdapterConfig) -> Shapes:
    # shape (1,), not (): FSDP2 shards dimension 0 and refuses scalars
    return {**low_rank(out, in_, config), "a": (1,), "b": (1,)}


SPECS = (
    AdapterSpec(
        name="lora",
        title="LoRA: W + s B A",
        source="Hu et al., 2021, arXiv:2106.09685, eq. 3",
        impl="decompft.adapters.lora:LoraLinear",
        options=LoraOptions,
        tensors=low_rank,
        zero_grad_at_start=names("A"),
    ),
    AdapterSpec(
        name="map",
        title="MAP: a W/N(W) + b D/N(D), D = s B A",
        source="Si et al., 2025, arXiv:2505.23094 (2026 revision's eps and init)",
        impl="decompft.adapters.map:MapLinear",
        options=MapOptions,
        tensors=_map_tensors,
        buffers=lambda out, in_, config: {"base_norm": (1,)},
        needs=names("frobenius_norm"),
        # at B = 0 the product D is 0: neither A nor the magnitude b has a slope yet
        zero_grad_at_start=names("A", "b"),
    ),
)
