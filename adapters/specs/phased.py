"""Methods that change their form while they train: AdaLoRA, FlexLoRA, LoRA-Dash and its relatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from decompft.adapters.specs.base import AdapterConfig, AdapterSpec, Options, Shapes, doc, low_rank, names

Positive = Annotated[int, Ge(1)]
# at step 1 of a warm-up the learning rate is 0: B is 0 after it, and points at no direction
StartStep = Annotated[int, Ge(2)]
# below 1 a share of the run's optimizer steps, else a number of them
Steps = Annotated[float, Ge(0)]
Decay = Annotated[float, Gt(0), Lt(1)]


@dataclass(frozen=True, kw_only=True)
class AdaLoraOptions(Options):
    """Options of `adapter.method: adalora`; `adapter.rank` is the rank at the start."""

    target_rank: Positive | None = doc(
        "mean rank at the end, at most adapter.rank; default two thirds of adapter.rank, as in the paper",
        None,
    )
    init_warmup: Steps = doc("optimizer steps before ranks shrink; below 1 a share of all steps", 0.1)
    final_warmup: Steps = doc("optimizer steps at the end with ranks fixed; below 1 a share", 0.3)
    interval: Positive = doc("steps from one allocation to the next", 10)
    beta1: Decay = doc("decay of the mean importance |p grad p|", 0.85)
    beta2: Decay = doc("decay of the mean deviation from it", 0.85)
    orth_weight: Annotated[float, Ge(0)] = doc("weight of the orthogonality regulariser", 0.1)


@dataclass(frozen=True, kw_only=True)
class FlexLoraOptions(Options):
    """Options of `adapter.method: flexlora`; `adapter.rank` is the rank at the start."""

    spare_rank: Positive | None = doc(
        "directions beyond adapter.rank that a matrix may grow to; default adapter.rank as many", None
    )
    exchange: Positive = doc(
        "directions that change hands at the first exchange (b); decays cubically to 0", 4
    )
    init_warmup: Steps = doc("optimizer steps before the first exchange; below 1 a share of all steps", 0.1)
    final_warmup: Steps = doc("optimizer steps at the end with ranks fixed; below 1 a share", 0.3)
    interval: Positive = doc("steps from one exchange to the next", 10)


@dataclass(frozen=True, kw_only=True)
class DashOptions(Options):
    """Options of `adapter.method: lora_dash`."""

    start_step: StartStep = doc("optimizer steps before the directions are chosen (t)", 100)
    num_directions: Positive = doc("directions a matrix whose coordinates train (s_dir)", 8)
    eps: Annotated[float, Gt(0)] = doc("added to a singular value under a score", 1e-6)
    coordinate_lr_ratio: Annotated[float, Gt(0)] = doc("learning rate of c over that of A and B", 1.0)


@dataclass(frozen=True, kw_only=True)
class LoraInitOptions(Options):
    """Options of `adapter.method: lora_init`."""

    start_step: StartStep = doc("optimizer steps before the restart (t)", 100)
    eps: Annotated[float, Gt(0)] = doc("added to a singular value under a score", 1e-6)
    base: Literal["exact", "residual"] = doc(
        "exact: the base stays and a frozen correction of the rank is subtracted; "
        "residual: W minus the chosen part is stored as the base, quantized anew at the restart",
        "exact",
    )


@dataclass(frozen=True, kw_only=True)
class LoraTsdOptions(LoraInitOptions):
    """Options of `adapter.method: lora_tsd`."""

    num_directions: Positive = doc("directions a matrix whose coordinates train (s_dir)", 8)
    coordinate_lr_ratio: Annotated[float, Gt(0)] = doc("learning rate of c over that of A and B", 1.0)


def num_directions(out: int, in_: int, config: AdapterConfig) -> int:
    """Of the dash term; a matrix has no more than its smaller side."""
    return min(config.options.num_directions, out, in_)


def max_rank(config: AdapterConfig) -> int:
    """FlexLoRA's rows of A."""
    spare: int | None = config.options.spare_rank
    return config.rank + (config.rank if spare is None else spare)


def _adalora(out: int, in_: int, config: AdapterConfig) -> Shapes:
    return {**low_rank(out, in_, config), "e": (config.rank,)}


def _adalora_refusal(out: int, in_: int, config: AdapterConfig, quantizes: bool) -> str:
    target: int | None = config.options.target_rank
    if target is None or target <= config.rank:
        return ""
    return (
        f"adapter.options.target_rank: ranks only shrink, and {target} is more than adapter.rank {config.rank}; "
        f"use target_rank <= {config.rank}, or adapter.rank >= {target}"
    )


def _flexlora_refusal(out: int, in_: int, config: AdapterConfig, quantizes: bool) -> str:
    most, room = max_rank(config), min(out, in_) - config.rank
    if most <= min(out, in_):
        return ""
    return (
        f"adapter.options.spare_rank: {config.rank} directions that may grow to {most} are more than a matrix of "
        f"{out} x {in_} has; use "
        + (f"spare_rank <= {room}, or " if room > 0 else "")
        + f"adapter.rank <= {min(out, in_) // 2}"
        + ("" if config.options.spare_rank is None else " without spare_rank")
    )


def _flexlora(out: int, in_: int, config: AdapterConfig) -> Shapes:
    r = max_rank(config)
    return {"A": (r, in_), "B": (out, r), "e": (r,)}


def _dash(out: int, in_: int, config: AdapterConfig) -> Shapes:
    return {**low_rank(out, in_, config), "c": (num_directions(out, in_, config),)}


def _directions(out: int, in_: int, config: AdapterConfig) -> Shapes:
    k = num_directions(out, in_, config)
    return {"U_T": (out, k), "V_T": (in_, k)}


def _correction(out: int, in_: int, config: AdapterConfig) -> Shapes:
    return {"A0": (config.rank, in_), "B0": (out, config.rank)}


def _phase(num_indices: int) -> Shapes:
    return {"indices": (num_indices,), "phase": (1,)}


def _init_columns(out: int, in_: int, config: AdapterConfig) -> int:
    return config.rank * (2 if config.options.base == "exact" else 1)


SPECS = (
    AdapterSpec(
        name="adalora",
        title="AdaLoRA: W + s B diag(e) A, unimportant e set to 0",
        source="Zhang et al., 2023, arXiv:2303.10512, eq. 3-12",
        impl="decompft.adapters.adalora:AdaLoraLinear",
        options=AdaLoraOptions,
        tensors=_adalora,
        thin_factors=names("B"),
        # 1 for directions that may train; phase 1 once the last allocation is made
        buffers=lambda out, in_, config: {"mask": (config.rank,), "phase": (1,)},
        zero_grad_at_start=names("A", "B"),
        refusal=_adalora_refusal,
    ),
    AdapterSpec(
        name="flexlora",
        title="FlexLoRA: W + s B diag(e) A, directions change hands by the entropy of e",
        source="FlexLoRA, 2026, arXiv:2601.22905",
        impl="decompft.adapters.flexlora:FlexLoraLinear",
        options=FlexLoraOptions,
        tensors=_flexlora,
        thin_factors=names("B"),
        buffers=lambda out, in_, config: {"mask": (max_rank(config),)},
        num_columns=lambda out, in_, config: max_rank(config),
        zero_grad_at_start=names("A", "B"),
        refusal=_flexlora_refusal,
    ),
    AdapterSpec(
        name="lora_dash",
        title="LoRA-Dash: W + s B A + U_T diag(c) V_T^T, T chosen at step t",
        source="Si et al., 2024, arXiv:2409.01035",
        impl="decompft.adapters.lora_dash:LoraDashLinear",
        options=DashOptions,
        tensors=_dash,
        buffers=lambda out, in_, config: {
            **_directions(out, in_, config),
            **_phase(num_directions(out, in_, config)),
        },
        num_columns=lambda out, in_, config: config.rank + num_directions(out, in_, config),
        zero_grad_at_start=names("A", "c"),
    ),
    AdapterSpec(
        name="lora_init",
        title="LoRA-Init: W_res + s B A, restarted at step t from the directions T of W",
        source="Si et al., 2024, arXiv:2409.01035 (figure only)",
        impl="decompft.adapters.lora_init:LoraInitLinear",
        options=LoraInitOptions,
        tensors=low_rank,
        buffers=lambda out, in_, config: {**_correction(out, in_, config), **_phase(config.rank)},
        num_columns=_init_columns,
        zero_grad_at_start=names("A"),
        is_reading=True,
    ),
    AdapterSpec(
        name="lora_tsd",
        title="LoRA-TSD: W_res + s B A + U_T diag(c) V_T^T, both begun at step t",
        source="Si et al., 2024, arXiv:2409.01035 (figure only)",
        impl="decompft.adapters.lora_init:LoraTsdLinear",
        options=LoraTsdOptions,
        tensors=_dash,
        buffers=lambda out, in_, config: {
            **_correction(out, in_, config),
            **_directions(out, in_, config),
            **_phase(max(config.rank, num_directions(out, in_, config))),
        },
        num_columns=lambda out, in_, config: (
            _init_columns(out, in_, config) + num_directions(out, in_, config)
        ),
        zero_grad_at_start=names("A", "c"),
        is_reading=True,
    ),
)
