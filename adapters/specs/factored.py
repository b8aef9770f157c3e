"""Methods near LoRA that ask at most one norm of the base: other cores between the factors, or none at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from decompft.adapters.specs.base import (
    AdapterConfig,
    AdapterSpec,
    CountOrZero,
    NoOptions,
    Options,
    Positive,
    Shapes,
    doc,
    low_rank,
    names,
)  # fmt: skip

Scaling = Literal["alpha/r", "rslora"]
_SCALING = "s = alpha/rank, or alpha/sqrt(rank)"


@dataclass(frozen=True, kw_only=True)
class TriloraOptions(Options):
    """Options of `adapter.method: trilora`."""

    scaling: Scaling = doc(_SCALING, "alpha/r")


@dataclass(frozen=True, kw_only=True)
class FloraOptions(Options):
    """Options of `adapter.method: flora`."""

    scaling: Scaling = doc(_SCALING, "alpha/r")
    init: Literal["kaiming", "normal"] = doc("A and B Kaiming-uniform, or N(0, 0.02); M is 0", "kaiming")


@dataclass(frozen=True, kw_only=True)
class MosloraOptions(Options):
    """Options of `adapter.method: moslora`."""

    scaling: Scaling = doc(_SCALING, "alpha/r")
    init: Literal["normal", "kaiming", "orthogonal"] = doc(
        "A and M N(0, 0.02), or A Kaiming-uniform and M Kaiming-uniform or orthogonal; B is 0", "normal"
    )


@dataclass(frozen=True, kw_only=True)
class VeraOptions(Options):
    """Options of `adapter.method: vera`."""

    seed: CountOrZero = doc("of the frozen random matrices, which are in no file", 0)
    d_init: Positive = doc("every entry of d at the start", 0.1)


@dataclass(frozen=True, kw_only=True)
class DeloraOptions(Options):
    """Options of `adapter.method: delora`."""

    lambda_init: Positive = doc("bound of the update's norm at the start", 15.0)
    eps: Positive = doc("least norm that a row of A or a column of B is divided by", 1e-4)
    lambda_lr_ratio: Positive = doc("learning rate of lam over that of A and B", 1.0)


def _trilora(out: int, in_: int, config: AdapterConfig) -> Shapes:
    return {**low_rank(out, in_, config), "e": (config.rank,)}


def _mixed(out: int, in_: int, config: AdapterConfig) -> Shapes:
    return {**low_rank(out, in_, config), "M": (config.rank, config.rank)}


def _delora(out: int, in_: int, config: AdapterConfig) -> Shapes:
    return {**low_rank(out, in_, config), "lam": (1,)}


SPECS = (
    AdapterSpec(
        name="trilora",
        title="TriLoRA: W + s B diag(e) A",
        source="Feng et al., 2024, arXiv:2405.11236",
        impl="decompft.adapters.trilora:TriloraLinear",
        options=TriloraOptions,
        tensors=_trilora,
        thin_factors=names("A"),
        zero_grad_at_start=names("A", "B"),
    ),
    AdapterSpec(
        name="flora",
        title="FLoRA of a matrix: W + s B M A, M starts at 0",
        source="Si et al., 2024, arXiv:2405.14739, two-dimensional case",
        impl="decompft.adapters.flora:FloraLinear",
        options=FloraOptions,
        tensors=_mixed,
        thin_factors=names("A"),
        zero_grad_at_start=names("A", "B"),
    ),
    AdapterSpec(
        name="moslora",
        title="MoSLoRA: W + s B M A, B starts at 0",
        source="Wu et al., 2024, arXiv:2406.11909",
        impl="decompft.adapters.moslora:MosloraLinear",
        options=MosloraOptions,
        tensors=_mixed,
        thin_factors=names("A"),
        zero_grad_at_start=names("A", "M"),
    ),
    AdapterSpec(
        name="vera",
        title="VeRA: W + diag(b) B0 diag(d) A0, B0 and A0 random and frozen",
        source="Kopiczko et al., 2023, arXiv:2310.11454, eq. 2",
        impl="decompft.adapters.vera:VeraLinear",
        options=VeraOptions,
        has_alpha=lambda config: False,
        tensors=lambda out, in_, config: {"b": (out,), "d": (config.rank,)},
        derived=lambda out, in_, config: {"A0": (config.rank, in_), "B0": (out, config.rank)},
        zero_grad_at_start=names("d"),
    ),
    AdapterSpec(
        name="delora",
        title="DeLoRA: W + B diag(lam / (r |a_i| |b_i|)) A diag(column norms of W)",
        source="Bini et al., 2025, arXiv:2503.18225",
        impl="decompft.adapters.delora:DeloraLinear",
        options=DeloraOptions,
        has_alpha=lambda config: False,
        tensors=_delora,
        buffers=lambda out, in_, config: {"column_norms": (in_,)},
        needs=names("column_norms"),
        zero_grad_at_start=names("A", "lam"),
    ),
    AdapterSpec(
        name="mpc_n",
        title="MPC_n, the parallel adapter: W x + B relu(A x)",
        source="Si et al., 2024, arXiv:2407.05417, section on matrix pattern constraints",
        impl="decompft.adapters.parallel:ParallelLinear",
        options=NoOptions,
        has_alpha=lambda config: False,
        tensors=low_rank,
        thin_factors=names("A", "B"),
        zero_grad_at_start=names("A"),
        mergeable=False,
    ),
    AdapterSpec(
        name="bitfit",
        title="BitFit: W x + bias + b",
        source="Ben Zaken et al., 2021, arXiv:2106.10199",
        impl="decompft.adapters.bitfit:BitfitLinear",
        options=NoOptions,
        has_alpha=lambda config: False,
        tensors=lambda out, in_, config: {"b": (out,)},
        num_columns=lambda out, in_, config: 0,
    ),
)
