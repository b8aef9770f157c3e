"""Which adapters exist: one torch-free description a method.

The recipe is checked and the memory forecast is made from this table alone; the module that
does the maths is named by string and imported only on a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSpec:
    """What the launcher must know of a method without importing it."""

    name: str  # the key in a recipe
    title: str  # one line for tables
    source: str  # paper and equation
    impl: str  # "package.module:Class", resolved on a rank
    options: type[Any]  # frozen dataclass of the method's own options
    num_params: Callable[[int, int, int], int]  # (out_features, in_features, rank) -> trained numbers
    tensors: Callable[[int, int, int], dict[str, tuple[int, ...]]]  # trained tensor -> shape
    needs: tuple[str, ...] = ()  # facts taken of the base while it is loaded: "frobenius_norm"
    zero_grad_at_start: tuple[str, ...] = ()  # tensors whose gradient is exactly 0 at step 1
    is_reading: bool = False  # the paper's formula could not be read; ours is an interpretation
    mergeable: bool = True
    forbids_engines: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """One method as a recipe sets it, with the method's own typed options."""

    method: str
    rank: int
    alpha: float
    dropout: float
    options: Any  # an instance of ADAPTER_SPECS[method].options


def _lora_tensors(out: int, in_: int, rank: int) -> dict[str, tuple[int, ...]]:
    return {"A": (rank, in_), "B": (out, rank)}


def _map_tensors(out: int, in_: int, rank: int) -> dict[str, tuple[int, ...]]:
    # shape (1,), not (): FSDP2 shards dimension 0 and refuses scalars
    return {"A": (rank, in_), "B": (out, rank), "a": (1,), "b": (1,)}


def _doc(text: str, default: Any) -> Any:
    return field(default=default, metadata={"doc": text})


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Options of `adapter.method: lora`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    scaling: Literal["alpha/r", "rslora"] = _doc("s = alpha/rank, or alpha/sqrt(rank)", "alpha/r")
    lr_ratio: float = _doc("learning rate of B over that of A (LoRA+; 16 is usual)", 1.0)


@dataclass(frozen=True, kw_only=True)
class MapOptions:
    """Options of `adapter.method: map`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    eps: float = _doc("added to both norms, as in the equation", 1e-6)
    b_init: float = _doc("magnitude of the update at the start (b0)", 1.0)
    b_warmup_steps: int = _doc(
        "steps over which the update's magnitude is raised linearly to b; 0 is the equation", 0
    )
    settle_norm: float = _doc(
        "while N(D) is below this, B is left out of gradient clipping and its gradient is scaled "
        "by (N(D) + eps) / settle_norm, so that the 1/eps slope at B = 0 does not poison the "
        "optimizer's second moment; 0 turns both off",
        1e-3,
    )
    lr_ratio: float = _doc("learning rate of B over that of A", 1.0)
    magnitude_lr_ratio: float = _doc("learning rate of a and b over that of A", 1.0)


ADAPTER_SPECS: dict[str, AdapterSpec] = {
    spec.name: spec
    for spec in (
        AdapterSpec(
            name="lora",
            title="LoRA: W + s B A",
            source="Hu et al., 2021, arXiv:2106.09685, eq. 3",
            impl="decompft.adapters.lora:LoraLinear",
            options=LoraOptions,
            num_params=lambda out, in_, rank: rank * (out + in_),
            tensors=_lora_tensors,
            zero_grad_at_start=("A",),
        ),
        AdapterSpec(
            name="map",
            title="MAP: a W/N(W) + b D/N(D), D = s B A",
            source="Si et al., 2025, arXiv:2505.23094 (2026 revision's eps and init)",
            impl="decompft.adapters.map:MapLinear",
            options=MapOptions,
            num_params=lambda out, in_, rank: rank * (out + in_) + 2,
            tensors=_map_tensors,
            needs=("frobenius_norm",),
            # at B = 0 the product D is 0: neither A nor the magnitude b has a slope yet
            zero_grad_at_start=("A", "b"),
        ),
    )
}
