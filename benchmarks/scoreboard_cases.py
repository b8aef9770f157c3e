"""Which methods stand on the scoreboard, with which options, and around which learning rate each is searched?

Every method of the registry has one case of its own name; `VARIANTS` adds named option sets where an option
changes the formula. Every case gets the same number of learning rates: a third of its base rate, the base rate,
and three times it. Rank and alpha are 16 and 32 unless the method gives them another meaning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from decompft.adapters.spec import ADAPTER_SPECS

RANK, ALPHA = 16, 32.0
FACTORS = (1 / 3, 1.0, 3.0)  # of the base rate; the same number for every case
REFERENCE = "lora"  # what steps and memory are compared with


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table."""

    name: str
    method: str
    base_rate: float
    why: str  # of the base rate, and of rank and alpha where they are not the usual ones
    options: dict[str, Any] = field(default_factory=dict)
    rank: int = RANK
    alpha: float = ALPHA

    def rates(self) -> tuple[float, ...]:
        """The learning rates that are tried, ascending, rounded to two digits."""
        return tuple(float(f"{self.base_rate * factor:.2g}") for factor in FACTORS)


# a reason is written once
_FACTORS = "two random factors, B = 0: LoRA's usual rate on a model of this size"
_VECTORS = "only scales, of size 1: their papers train them about ten times as fast as factors"
_SPECTRUM = "only singular values or coefficients of fixed directions: as for scales"
_TAKEN = "starts at factors of W itself, not at 0: a third of LoRA's rate; alpha = rank, so that s = 1 as published"
_SWITCH = _FACTORS + "; the switch at step 20, so that the search's 46 steps and the run's 202 both see it"
_RELATIVE = (
    "the factors change a weight by a part of itself (about 0.02), not by themselves: three times LoRA's rate"
)

# method -> (base rate, why, what else differs)
_SETTINGS: dict[str, tuple[float, str, dict[str, Any]]] = {
    "ia3": (1e-2, _VECTORS, {}),
    "ssl": (1e-2, _VECTORS, {}),
    "ssb": (1e-2, _VECTORS, {}),
    "bitfit": (1e-2, _VECTORS, {}),
    "vera": (
        1e-2,
        _VECTORS + "; rank 128: its factors are frozen, and 192 is the smallest width",
        {"rank": 128},
    ),
    "svdiff": (1e-2, _SPECTRUM, {}),
    "svft": (1e-2, _SPECTRUM, {}),
    "pissa": (3e-4, _TAKEN, {"alpha": float(RANK)}),
    "milora": (3e-4, _TAKEN, {"alpha": float(RANK)}),
    "olora": (3e-4, _TAKEN, {"alpha": float(RANK)}),
    "lora_dash": (1e-3, _SWITCH, {"options": {"start_step": 20}}),
    "lora_init": (1e-3, _SWITCH, {"options": {"start_step": 20}}),
    "lora_tsd": (1e-3, _SWITCH, {"options": {"start_step": 20}}),
    "spectral_adapter": (
        3e-4,
        "moves singular vectors, whose entries are about 0.04, times singular values",
        {},
    ),
    "liera": (3e-3, _RELATIVE, {}),
    "delora": (3e-3, "its update has a norm of its own, whatever that of the factors: as LieRA", {}),
}

VARIANTS: tuple[Case, ...] = (
    Case(name="lora rslora", method="lora", options={"scaling": "rslora"}, base_rate=3e-4,
         why="s is four times LoRA's at rank 16: a third of its rate"),
    Case(name="lora plus", method="lora", options={"lr_ratio": 16.0}, base_rate=3e-4,
         why="B learns 16 times as fast (LoRA+): a third of LoRA's rate for A"),
    Case(name="map over dora", method="map", options={"over": "dora"}, base_rate=1e-3, why=_FACTORS),
    Case(name="map over adalora", method="map", options={"over": "adalora"}, base_rate=1e-3, why=_FACTORS),
    Case(name="map over flora", method="map", options={"over": "flora"}, base_rate=1e-3, why=_FACTORS),
    Case(name="map warm b", method="map", options={"b_warmup_steps": 20}, base_rate=1e-3,
         why=_FACTORS + "; the update's magnitude is raised over 20 steps instead of being 1 at once"),
    Case(name="lora loftq", method="lora", options={"init": "loftq"}, base_rate=1e-3,
         why=_FACTORS + "; starts at what quantization lost"),
    Case(name="liera exact", method="liera", options={"order": "exact"}, base_rate=3e-3, why=_RELATIVE),
    Case(name="speclora additive", method="speclora", options={"spec_mode": "additive"}, base_rate=1e-3, why=_FACTORS),
    Case(name="svft banded", method="svft", options={"pattern": "banded"}, base_rate=1e-2, why=_SPECTRUM),
    Case(name="svft full", method="svft", options={"k": 0}, base_rate=1e-2, why=_SPECTRUM),
)  # fmt: skip

# names of the registry that are another case under another name
ALIASES = {"hira": "liera"}


def cases() -> tuple[Case, ...]:
    """Every method of the registry, then the variants of those that there are, in a fixed order."""
    own = [_own(method) for method in ADAPTER_SPECS if method not in ALIASES]
    return (*own, *(variant for variant in VARIANTS if variant.method in ADAPTER_SPECS))


def _own(method: str) -> Case:
    rate, why, changed = _SETTINGS.get(method, (1e-3, _FACTORS, {}))
    return Case(name=method, method=method, base_rate=rate, why=why, **changed)
