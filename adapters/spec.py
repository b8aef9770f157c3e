"""Which adapters exist: one torch-free description a method.

The recipe is checked and the memory forecast is made from this table alone; the module that
does the maths is named by string and imported only on a rank.
"""

from __future__ import annotations

from dataclasses import replace

from decompft.adapters.specs import elementwise, factored, lowrank, magnitude, mpc, phased, scaled, spectral
from decompft.adapters.specs.base import AdapterConfig, AdapterSpec, WrapperOptions, inner_config

__all__ = ["ADAPTER_SPECS", "UNSUPPORTED", "AdapterConfig", "AdapterSpec", "has_rank", "spec_of", "stack_of"]

ADAPTER_SPECS: dict[str, AdapterSpec] = {
    spec.name: spec
    for family in (lowrank, elementwise, magnitude, factored, mpc, scaled, phased, spectral)
    for spec in family.SPECS
}

# known names that are refused, and why
UNSUPPORTED: dict[str, str] = {
    "delta_lora": "it changes the base weight itself at every step (W += lambda s (B_t A_t - B_(t-1) A_(t-1))), "
    "which a frozen, quantized or shared base does not allow; use lora, or map for a trained magnitude of the base",
}


def has_rank(config: AdapterConfig) -> bool:
    """Whether the method has factors of `config.rank`: A and B, or directions of the base."""
    spec = spec_of(config)
    shapes = [
        (spec.tensors(101, 103, other), spec.buffers(101, 103, other))
        for other in (replace(config, rank=rank) for rank in (7, 11))
    ]
    return shapes[0] != shapes[1]


def stack_of(config: AdapterConfig) -> tuple[AdapterConfig, ...]:
    """A method and those under it, the outermost first."""
    stack = [config]
    while isinstance(stack[-1].options, WrapperOptions):
        stack.append(inner_config(stack[-1]))
    return tuple(stack)


def spec_of(config: AdapterConfig) -> AdapterSpec:
    """The description of a config's method."""
    return ADAPTER_SPECS[config.method]
