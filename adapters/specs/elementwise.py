"""LieRA and HiRA, which multiply each weight by a factor of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from decompft.adapters.specs.base import AdapterSpec, Options, Positive, doc, low_rank, names


@dataclass(frozen=True, kw_only=True)
class HiraOptions(Options):
    """Options of `adapter.method: hira`."""

    scaling: Literal["alpha/r", "rslora"] = doc("s = alpha/rank, or alpha/sqrt(rank)", "alpha/r")
    lr_ratio: Positive = doc("learning rate of B over that of A", 1.0)


@dataclass(frozen=True, kw_only=True)
class LieraOptions(HiraOptions):
    """Options of `adapter.method: liera`."""

    order: Literal["first", "exact"] = doc("first: W o (1 + s B A); exact: W o exp(s B A)", "first")
    clamp: Positive = doc("exact: s B A is held within +-clamp, so that exp stays a bfloat16 number", 8.0)

    def __post_init__(self) -> None:
        if self.order != "exact" and self.clamp != 8.0:
            raise ValueError("clamp has no effect without order: exact")


SPECS = (
    AdapterSpec(
        name="liera",
        title="LieRA: W o (1 + s B A), or W o exp(s B A)",
        source="Si et al., 2025, arXiv:2504.00851 (formula from notes on the paper and its repository)",
        impl="decompft.adapters.liera:LieraLinear",
        options=LieraOptions,
        tensors=low_rank,
        needs=names("zero_fraction"),
        zero_grad_at_start=names("A"),
        num_columns=lambda out, in_, config: 0,
    ),
    AdapterSpec(
        name="hira",
        title="HiRA: W + W o (s B A), LieRA's first order",
        source="Huang et al., 2025, ICLR (HiRA); the same map as LieRA's first order",
        impl="decompft.adapters.liera:LieraLinear",
        options=HiraOptions,
        tensors=low_rank,
        needs=names("zero_fraction"),
        zero_grad_at_start=names("A"),
        num_columns=lambda out, in_, config: 0,
    ),
)
