"""Methods that start from singular vectors of the base, or train between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from decompft.adapters.specs.base import (
    AdapterConfig,
    AdapterSpec,
    Count,
    CountOrZero,
    NoOptions,
    Options,
    Positive,
    Shapes,
    doc,
    low_rank,
    names,
)


@dataclass(frozen=True, kw_only=True)
class SpecloraOptions(Options):
    """Options of `adapter.method: speclora`."""

    k: Count = doc("leading singular directions that are rescaled; a matrix with fewer gives all", 8)
    spec_mode: Literal["multiplicative", "additive"] = doc(
        "what m changes: S_i (1 + m_i), or S_i + m_i", "multiplicative"
    )
    m_lr_ratio: Positive = doc("learning rate of m over that of A and B", 10.0)


@dataclass(frozen=True, kw_only=True)
class SvftOptions(Options):
    """Options of `adapter.method: svft`."""

    k: CountOrZero = doc(
        "leading singular directions that M (k, k) mixes; 0 is all, whose U and V are as large as the weight",
        64,
    )
    pattern: Literal["plain", "banded", "random", "top_k"] = doc(
        "entries of M that train: the diagonal, a band, entries at random, or those whose u_i and v_j agree most "
        "(square layers only)",
        "plain",
    )
    off_diag: Count | None = doc(
        "diagonals on either side of the main one in a band; random and top_k train as many entries; default 2",
        None,
    )

    def __post_init__(self) -> None:
        if self.pattern == "plain" and self.off_diag is not None:
            raise ValueError("off_diag has no effect with pattern: plain, which is the main diagonal alone")


@dataclass(frozen=True, kw_only=True)
class SplitOptions(Options):
    """Options of `adapter.method: pissa`, `milora` and `olora`."""

    base: Literal["residual", "exact"] = doc(
        "residual: W - s B0 A0 is what is quantized and stored; exact: the base stays W as it is, and "
        "s B0 A0 is subtracted in thin form, which doubles the thin products",
        "residual",
    )


def num_directions(out: int, in_: int, config: AdapterConfig) -> int:
    """`options.k`, or all that a matrix has."""
    return min(config.options.k or out, out, in_)


def num_off_diagonals(options: SvftOptions) -> int:
    """On either side of the main one, as far as M reaches."""
    return 2 if options.off_diag is None else options.off_diag


def num_entries(k: int, options: SvftOptions) -> int:
    """Entries of M (k, k) that train."""
    if options.pattern == "plain":
        return k
    d = min(num_off_diagonals(options), k - 1)
    return k * (2 * d + 1) - d * (d + 1)


def _triplets(k: int, out: int, in_: int) -> Shapes:
    """Directions of the full-precision weight: U's columns, S, and V's, which are rows here."""
    return {"U": (out, k), "S": (k,), "V": (k, in_)}


def _speclora(out: int, in_: int, config: AdapterConfig) -> Shapes:
    return {**low_rank(out, in_, config), "m": (num_directions(out, in_, config),)}


def _speclora_title(config: AdapterConfig) -> str:
    core = "m" if config.options.spec_mode == "additive" else "m o S_k"
    return f"SpecLoRA: W + U_k diag({core}) V_k^T + s B A"


def _speclora_fixed(out: int, in_: int, config: AdapterConfig) -> Shapes:
    shapes = _triplets(num_directions(out, in_, config), out, in_)
    if config.options.spec_mode == "additive":
        del shapes["S"]
    return shapes


def _svft(out: int, in_: int, config: AdapterConfig) -> Shapes:
    return {"M": (num_entries(num_directions(out, in_, config), config.options),), "gate": (1,)}


def _svft_fixed(out: int, in_: int, config: AdapterConfig) -> Shapes:
    k = num_directions(out, in_, config)
    shapes: Shapes = {"U": (out, k), "V": (k, in_)}
    if config.options.pattern != "plain":
        shapes["at"] = (2, num_entries(k, config.options))
    return shapes


def _svft_refusal(out: int, in_: int, config: AdapterConfig, quantizes: bool) -> str:
    if config.options.pattern != "top_k" or out == in_:
        return ""
    return (
        f"adapter.options.pattern: top_k compares u_i with v_j, whose sizes differ in a layer of {out} x {in_}; "
        "use banded or random"
    )


def _split_fixed(out: int, in_: int, config: AdapterConfig) -> Shapes:
    return {"A0": (config.rank, in_), "B0": (out, config.rank)}


def _split(name: str, title: str, source: str, impl: str) -> AdapterSpec:
    return AdapterSpec(
        name=name,
        title=title,
        source=source,
        impl=f"decompft.adapters.split:{impl}",
        options=SplitOptions,
        tensors=low_rank,
        thin_factors=lambda config: () if config.options.base == "exact" else ("A", "B"),
        buffers=_split_fixed,
        needs=names("full_weight"),
        num_columns=lambda out, in_, config: config.rank * (2 if config.options.base == "exact" else 1),
    )


SPECS = (
    AdapterSpec(
        name="speclora",
        title="SpecLoRA: W + U_k diag(m o S_k) V_k^T + s B A, or diag(m) for diag(m o S_k)",
        chosen_title=_speclora_title,
        source="Si et al., 2025, arXiv:2505.23099 (abstract only)",
        impl="decompft.adapters.speclora:SpecloraLinear",
        options=SpecloraOptions,
        tensors=_speclora,
        buffers=_speclora_fixed,
        needs=names("full_weight"),
        zero_grad_at_start=names("A"),
        num_columns=lambda out, in_, config: config.rank + num_directions(out, in_, config),
        is_reading=True,
    ),
    AdapterSpec(
        name="spectral_adapter",
        title="Spectral Adapter: [U_r + P, U_rest] S [V_r + Q, V_rest]^T",
        source="Zhang and Pilanci, 2024, arXiv:2405.13952, additive form",
        impl="decompft.adapters.spectral_adapter:SpectralAdapterLinear",
        options=NoOptions,
        has_alpha=lambda config: False,
        tensors=lambda out, in_, config: {"P": (out, config.rank), "Q": (in_, config.rank)},
        buffers=lambda out, in_, config: _triplets(config.rank, out, in_),
        needs=names("full_weight"),
        num_columns=lambda out, in_, config: 2 * config.rank,
    ),
    AdapterSpec(
        name="svdiff",
        title="SVDiff: U diag(relu(S + d)) V^T",
        source="Han et al., 2023, arXiv:2303.11305, eq. 3",
        impl="decompft.adapters.svdiff:SvdiffLinear",
        options=NoOptions,
        has_alpha=lambda config: False,
        tensors=lambda out, in_, config: {"d": (min(out, in_),)},
        buffers=lambda out, in_, config: _triplets(min(out, in_), out, in_),
        needs=names("full_weight"),
        num_columns=lambda out, in_, config: min(out, in_),
    ),
    AdapterSpec(
        name="svft",
        title="SVFT: W + U_k (sigmoid(gate) M) V_k^T, M sparse",
        source="Lingam et al., 2024, arXiv:2405.19597, eq. 2; gate and start of the authors' code",
        impl="decompft.adapters.svft:SvftLinear",
        options=SvftOptions,
        has_alpha=lambda config: False,
        tensors=_svft,
        buffers=_svft_fixed,
        needs=names("full_weight"),
        num_columns=num_directions,
        refusal=_svft_refusal,
    ),
    _split(
        "pissa",
        "PiSSA: W_res + s B A, started from the r largest singular triplets",
        "Meng et al., 2024, arXiv:2404.02948, eq. 2-4",
        "PissaLinear",
    ),
    _split(
        "milora",
        "MiLoRA: W_res + s B A, started from the r smallest singular triplets",
        "Wang et al., 2024, arXiv:2406.09044, eq. 4-6",
        "MiloraLinear",
    ),
    _split(
        "olora",
        "OLoRA: W_res + s B A, started from the first columns and rows of a QR of W",
        "Buyukakyuz, 2024, arXiv:2406.01775, as peft computes it",
        "OloraLinear",
    ),
)
