"""MPC's two regularisers, over any method that trains A and B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from decompft.adapters.specs.base import (
    AdapterConfig,
    AdapterSpec,
    NotNegative,
    WrapperOptions,
    doc,
    inner_config,
    inner_refusal,
)

# not AdaLoRA, which has MPC_o as a part of it; not LieRA, whose change of the weight is of no low rank; not mpc_n,
# which is the third of these
Over = Literal[
    "lora", "trilora", "flora", "moslora", "delora", "map", "dora", "flexlora", "speclora", "lora_dash",
    "lora_init", "lora_tsd", "pissa", "milora", "olora",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MpcOptions(WrapperOptions):
    """Options of `adapter.method: mpc_o` and `mpc_d`."""

    over: Over = doc("the method whose A and B are regularised", "lora")
    weight: NotNegative = doc(
        "factor of the term in the loss of a step; the paper does not state it (1e-3 to 1)", 0.1
    )
    power: Literal[1, 2] = doc("of both Frobenius norms; 2 is the paper's, 1 that of its code for AdaLoRA", 2)
    reduction: Literal["mean", "sum"] = doc("over the adapted matrices; sum is the paper's", "mean")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.over == "map" and self.inner["over"] == "adalora":
            raise ValueError(
                "inner.over: adalora has MPC_o in it (its orth_weight), under map as well, and both terms would act; "
                "use adapter.method: map with over: adalora, or another method under map"
            )


def _spec(name: str, title: str) -> AdapterSpec:
    def shapes(kind: str) -> Any:
        return lambda out, in_, config: _ask(config, kind, out, in_)

    def names(kind: str) -> Any:
        return lambda config: _ask(config, kind)

    return AdapterSpec(
        name=name,
        title=title,
        source="Si et al., 2024, arXiv:2407.05417, eq. 25 and 26",
        impl="decompft.adapters.mpc:make",
        options=MpcOptions,
        tensors=shapes("tensors"),
        thin_factors=names("thin_factors"),
        buffers=shapes("buffers"),
        derived=shapes("derived"),
        needs=names("needs"),
        # of the loss: the term adds a slope to A at once, and to B unless that is 0
        zero_grad_at_start=names("zero_grad_at_start"),
        num_columns=shapes("num_columns"),
        has_alpha=names("has_alpha"),
        keeps_output=names("keeps_output"),
        refusal=inner_refusal,
    )


def _ask(config: AdapterConfig, kind: str, *sizes: int) -> Any:
    """What the description of the method below answers, which knows nothing of the term."""
    from decompft.adapters.spec import spec_of  # which is made of this file

    inner = inner_config(config)
    return getattr(spec_of(inner), kind)(*sizes, inner)


SPECS = (
    _spec("mpc_o", "MPC_o: loss + weight (N(A A^T - I)^2 + N(B^T B - I)^2)"),
    _spec("mpc_d", "MPC_d: loss + weight (N(A A^T - I)^2 + N(B^T B - diag(B^T B))^2)"),
)
