"""Methods that scale the base's rows and columns: SSL, (IA)^3, SSB, and DoRA, which adds a low-rank update first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from decompft.adapters.specs.base import (
    AdapterConfig,
    AdapterSpec,
    NoOptions,
    Options,
    Positive,
    Shapes,
    doc,
    low_rank,
    names,
)


@dataclass(frozen=True, kw_only=True)
class DoraOptions(Options):
    """Options of `adapter.method: dora`."""

    scaling: Literal["alpha/r", "rslora"] = doc("s = alpha/rank, or alpha/sqrt(rank)", "alpha/r")
    lr_ratio: Positive = doc("learning rate of B over that of A", 1.0)
    magnitude_lr_ratio: Positive = doc("learning rate of m over that of A", 1.0)


def _l_in(out: int, in_: int, config: AdapterConfig) -> Shapes:
    return {"l_in": (in_,)}


def _l_out(out: int, in_: int, config: AdapterConfig) -> Shapes:
    return {"l_out": (out,)}


def _both(out: int, in_: int, config: AdapterConfig) -> Shapes:
    return {"l_out": (out,), "l_in": (in_,)}


def _dora(out: int, in_: int, config: AdapterConfig) -> Shapes:
    return {**low_rank(out, in_, config), "m": (out,)}


SPECS = (
    AdapterSpec(
        name="ssl",
        title="SSL: W diag(l_in)",
        source="Si et al., 2024, arXiv:2407.05417v2",
        impl="decompft.adapters.ssb:SslLinear",
        options=NoOptions,
        has_alpha=lambda config: False,
        tensors=_l_in,
        num_columns=lambda out, in_, config: 0,
    ),
    AdapterSpec(
        name="ssb",
        title="SSB: diag(l_out) W diag(l_in)",
        source="Si et al., 2024, arXiv:2407.05417v2",
        impl="decompft.adapters.ssb:SsbLinear",
        options=NoOptions,
        has_alpha=lambda config: False,
        tensors=_both,
        num_columns=lambda out, in_, config: 0,
        keeps_output=lambda config: True,
    ),
    AdapterSpec(
        name="ia3",
        title="(IA)^3: diag(l_out) W",
        source="Liu et al., 2022, arXiv:2205.05638, as a scaled matrix in arXiv:2407.05417v2",
        impl="decompft.adapters.ssb:Ia3Linear",
        options=NoOptions,
        has_alpha=lambda config: False,
        tensors=_l_out,
        num_columns=lambda out, in_, config: 0,
        keeps_output=lambda config: True,
    ),
    AdapterSpec(
        name="dora",
        title="DoRA: diag(m / n) (W + s B A), n_j = |W_j + s B_j A|",
        source="Liu et al., 2024, arXiv:2402.09353, eq. 5, norm detached as in section 4.3",
        impl="decompft.adapters.dora:DoraLinear",
        options=DoraOptions,
        tensors=_dora,
        buffers=lambda out, in_, config: {"rn2": (out,)},
        needs=names("row_norms"),
        zero_grad_at_start=names("A"),
        keeps_output=lambda config: True,
    ),
)
