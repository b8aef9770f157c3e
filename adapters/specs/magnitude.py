"""MAP: a trained magnitude for the base, and one for the change that another method makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from decompft.adapters.specs.base import (
    AdapterConfig,
    AdapterSpec,
    CountOrZero,
    NotNegative,
    Positive,
    Shapes,
    WrapperOptions,
    doc,
    inner_config,
    inner_options,
    inner_refusal,
)

# those that add up @ down to the base and have no tensor named a or b; and DoRA
Over = Literal["lora", "dora", "adalora", "trilora", "flora", "moslora"]
# of AdaLoRA: when and to how many directions it shrinks, which MAP leaves out
_ALLOCATION = ("target_rank", "init_warmup", "final_warmup", "interval", "beta1", "beta2")


@dataclass(frozen=True, kw_only=True)
class MapOptions(WrapperOptions):
    """Options of `adapter.method: map`."""

    over: Over = doc("the method whose change of the weight is D", "lora")
    eps: Positive = doc("added to both norms, as in the equation", 1e-6)
    b_init: Positive = doc(
        "magnitude of the update at the start (b0); from 0 neither B nor b could ever move", 1.0
    )
    b_warmup_steps: CountOrZero = doc(
        "steps over which the update's magnitude is raised linearly to b; 0 is the equation", 0
    )
    settle_norm: NotNegative = doc(
        "while N(D) is below this, what keeps D at 0 in the beginning (B) is left out of gradient clipping and "
        "its gradient is scaled by (N(D) + eps) / settle_norm, so that the 1/eps slope at D = 0 does not poison "
        "the optimizer's second moment; 0 turns both off",
        1e-3,
    )
    lr_ratio: Positive = doc("learning rate of B over that of A, times the inner method's own", 1.0)
    magnitude_lr_ratio: Positive = doc("learning rate of a and b over that of A", 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        options = inner_options(self.over, self.inner)
        default = type(options)()
        for name in _ALLOCATION if self.over == "adalora" else ():
            if getattr(options, name) != getattr(default, name):
                raise ValueError(f"inner.{name} has no effect: AdaLoRA keeps all its directions under map")
        if "full_weight" in _inner(
            AdapterConfig(method="map", rank=1, alpha=1.0, dropout=0.0, options=self), "needs"
        ):
            raise ValueError(
                f"these inner options start {self.over} with factors of the weight; map starts at D = 0"
            )


def _inner(config: AdapterConfig, kind: str, *sizes: int) -> Any:
    """What the description of the inner method answers."""
    from decompft.adapters.spec import spec_of  # which is made of this file

    inner = inner_config(config)
    return getattr(spec_of(inner), kind)(*sizes, inner)


def _with(kind: str, own: Shapes) -> Callable[[int, int, AdapterConfig], Shapes]:
    return lambda out, in_, config: {**_inner(config, kind, out, in_), **own}


SPECS = (
    AdapterSpec(
        name="map",
        title="MAP: a W/N(W) + b D/N(D), D = s B A or what another method adds to W",
        source="Si et al., 2025, arXiv:2505.23094 (2026 revision's eps and init)",
        impl="decompft.adapters.map:make_map",
        options=MapOptions,
        # shape (1,), not (): FSDP2 shards dimension 0 and refuses scalars
        tensors=_with("tensors", {"a": (1,), "b": (1,)}),
        thin_factors=lambda config: _inner(config, "thin_factors"),
        buffers=_with("buffers", {"base_norm": (1,)}),
        needs=lambda config: ("frobenius_norm", *_inner(config, "needs")),
        # D is 0: its magnitude b has no slope either
        zero_grad_at_start=lambda config: (*_inner(config, "zero_grad_at_start"), "b"),
        num_columns=lambda out, in_, config: _inner(config, "num_columns", out, in_),
        keeps_output=lambda config: _inner(config, "keeps_output"),
        refusal=inner_refusal,
    ),
)
