"""LoRA and its kin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from decompft.adapters.specs.base import (
    AdapterConfig,
    AdapterSpec,
    Count,
    Options,
    Positive,
    Shapes,
    doc,
    low_rank,
    names,
)


@dataclass(frozen=True, kw_only=True)
class LoraOptions(Options):
    """Options of `adapter.method: lora`."""

    scaling: Literal["alpha/r", "rslora"] = doc("s = alpha/rank, or alpha/sqrt(rank)", "alpha/r")
    lr_ratio: Positive = doc("learning rate of B over that of A (LoRA+; 16 is usual)", 1.0)
    init: Literal["kaiming", "loftq"] = doc(
        "A and B at the start: Kaiming-uniform and 0, or LoftQ's answer to what quantization lost", "kaiming"
    )
    loftq_iterations: Count = doc("of init: loftq; from the second on the quantized base changes, too", 1)

    def __post_init__(self) -> None:
        if self.init != "loftq" and self.loftq_iterations != 1:
            raise ValueError("loftq_iterations has no effect without init: loftq")


def _loftq_fixed(out: int, in_: int, config: AdapterConfig) -> Shapes:
    options = config.options
    # of the iteration before the last, which the base is made of
    is_rewritten = options.init == "loftq" and options.loftq_iterations > 1
    return {"A0": (config.rank, in_), "B0": (out, config.rank)} if is_rewritten else {}


def _loftq_refusal(out: int, in_: int, config: AdapterConfig, quantizes: bool) -> str:
    if config.options.init != "loftq" or quantizes:
        return ""
    return (
        "adapter.options.init: loftq approximates what quantization loses, and this base loses nothing; "
        "use init: kaiming, or an unquantized checkpoint and a quantization.format other than none"
    )


SPECS = (
    AdapterSpec(
        name="lora",
        title="LoRA: W + s B A",
        source="Hu et al., 2021, arXiv:2106.09685, eq. 3",
        impl="decompft.adapters.lora:make_lora",
        options=LoraOptions,
        tensors=low_rank,
        thin_factors=names("A", "B"),
        buffers=_loftq_fixed,
        needs=lambda config: ("full_weight",) if config.options.init == "loftq" else (),
        zero_grad_at_start=lambda config: ("A",) if config.options.init == "kaiming" else (),
        refusal=_loftq_refusal,
    ),
)
