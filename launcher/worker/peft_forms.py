"""Which PEFT adapter says the same as these layers? A genuine one of their method, else a plain LoRA of their changes.

Formulas of the installed peft's layers (peft/tuners/*/layer.py), with W of shape (out, in):

    LORA     W + s B A, s = alpha/r or alpha/sqrt(r); with use_dora diag(m / n) (W + s B A), n its row norms
    ADALORA  W + alpha / (r + 1e-5) B diag(E) A          VERA   W + diag(b) B0[:out] diag(d) A0[:, :in], one A0, B0
    DELORA   W + B diag(lambda / (r |a_i| |b_i|)) A diag(w_norm)      HIRA   W + W o (B A), no scale
    IA3      diag(l) (W x + bias), or W (l x) + bias in feedforward modules
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decompft.adapters.base import Adapter
from decompft.adapters.lora import scaling
from decompft.launcher.errors import AdapterError

PREFIX = "base_model.model."
Layers = Mapping[str, Adapter]
DELORA_EPS = 1e-4  # peft's, which is no key of its config


@dataclass(frozen=True, kw_only=True)
class Form:
    """An adapter as PEFT has it."""

    peft_type: str
    fields: dict[str, Any]  # of its config, beside those that all types have
    tensors: dict[str, Tensor]  # keys as in adapter_model.safetensors
    is_plain: bool = False  # a LoRA that stands for other methods


def form_of(layers: Layers) -> Form:
    """The form of an adapter's layers, their tensors in place.

    Raises:
        AdapterError: no PEFT type says what one of them does; the message names it.
    """
    methods = {layer.config.method for layer in layers.values()}
    for native in _NATIVE:
        if methods <= native.methods and (form := native.make(layers)) is not None:
            return form
    return _plain(layers)


# -- the methods that PEFT has; None where its config cannot say what our layers have -----------


def _lora(layers: Layers) -> Form | None:
    if any(layer.rewrites_base for layer in layers.values()):
        return None
    scalings = {layer.config.options.scaling for layer in layers.values()}
    if len(scalings) > 1:
        return None
    ranks, rank_pattern = _pattern({n: layer.config.rank for n, layer in layers.items()})
    alphas, alpha_pattern = _pattern({n: layer.config.alpha for n, layer in layers.items()})
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.get_parameter("A")
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.get_parameter("B")
    fields = {
        "r": ranks,
        "lora_alpha": alphas,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": scalings == {"rslora"},
        **_lora_fields(layers),
    }
    return Form(peft_type="LORA", fields=fields, tensors=tensors)


def _dora(layers: Layers) -> Form | None:
    form = _lora(layers)
    if form is None:
        return None
    magnitudes = {f"{PREFIX}{n}.lora_magnitude_vector": a.get_parameter("m") for n, a in layers.items()}
    return Form(peft_type="LORA", fields={**form.fields, "use_dora": True}, tensors=form.tensors | magnitudes)


def _adalora(layers: Layers) -> Form | None:
    configs = [layer.config for layer in layers.values()]
    if len({(c.rank, c.alpha) for c in configs}) > 1:  # init_r and lora_alpha are of the whole model
        return None
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A"] = layer.get_parameter("A")
        tensors[f"{PREFIX}{name}.lora_B"] = layer.get_parameter("B")
        tensors[f"{PREFIX}{name}.lora_E"] = (layer.get_parameter("e") * layer.get_buffer("mask")).view(-1, 1)
    target = configs[0].options.target_rank
    fields = {
        "init_r": configs[0].rank,
        "target_r": max(1, round(configs[0].rank / 1.5)) if target is None else target,
        "lora_alpha": _whole(configs[0].alpha),
        "total_step": 1,  # training is over; peft refuses a config without it
        "tinit": 0,
        "tfinal": 0,
        "orth_reg_weight": configs[0].options.orth_weight,
        **_lora_fields(layers),
    }
    return Form(peft_type="ADALORA", fields=fields, tensors=tensors)


def _ia3(layers: Layers) -> Form | None:
    tensors: dict[str, Tensor] = {}
    feedforward = []
    for name, layer in layers.items():
        if layer.config.method == "ssl":
            feedforward.append(name)
            tensors[f"{PREFIX}{name}.ia3_l"] = layer.get_parameter("l_in").view(1, -1)
            continue
        if layer.base.bias is not None:
            raise AdapterError(
                f"{name}: ia3 scales W x here and leaves the layer's bias as it is; PEFT's IA3 scales the bias, too",
                _MERGE,
            )
        tensors[f"{PREFIX}{name}.ia3_l"] = layer.get_parameter("l_out").view(-1, 1)
    fields = {"feedforward_modules": feedforward, "fan_in_fan_out": _is_transposed(layers)}
    return Form(peft_type="IA3", fields=fields, tensors=tensors)


def _vera(layers: Layers) -> Form | None:
    if len({layer.config.rank for layer in layers.values()}) > 1:
        return None
    A = max((layer.get_buffer("A0") for layer in layers.values()), key=lambda t: t.shape[1])
    B = max((layer.get_buffer("B0") for layer in layers.values()), key=lambda t: t.shape[0])
    for layer in layers.values():
        own_A, own_B = layer.get_buffer("A0"), layer.get_buffer("B0")
        # PEFT slices one pair for all shapes; ours differ from shape to shape
        if not (torch.equal(own_A, A[:, : own_A.shape[1]]) and torch.equal(own_B, B[: own_B.shape[0]])):
            return None
    tensors = {"base_model.vera_A": A, "base_model.vera_B": B}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.vera_lambda_b"] = layer.get_parameter("b")
        tensors[f"{PREFIX}{name}.vera_lambda_d"] = layer.get_parameter("d")
    first = next(iter(layers.values())).config
    fields = {
        "r": first.rank,
        "d_initial": first.options.d_init,
        "vera_dropout": first.dropout,
        "save_projection": True,
        "bias": "none",
        "fan_in_fan_out": _is_transposed(layers),
    }
    return Form(peft_type="VERA", fields=fields, tensors=tensors)


def _delora(layers: Layers) -> Form | None:
    # PEFT's has no Conv1D
    if _is_transposed(layers) or any(layer.config.options.eps != DELORA_EPS for layer in layers.values()):
        return None
    rank, rank_pattern = _pattern({n: layer.config.rank for n, layer in layers.items()})
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.delora_A"] = layer.get_parameter("A")
        tensors[f"{PREFIX}{name}.delora_B"] = layer.get_parameter("B")
        tensors[f"{PREFIX}{name}.delora_lambda"] = layer.get_parameter("lam")
        tensors[f"{PREFIX}{name}.delora_w_norm"] = layer.get_buffer("column_norms")
    first = next(iter(layers.values())).config
    fields = {
        "r": rank,
        "rank_pattern": rank_pattern,
        "delora_lambda": _whole(first.options.lambda_init),
        "module_dropout": first.dropout,
        "bias": "none",
    }
    return Form(peft_type="DELORA", fields=fields, tensors=tensors)


def _hira(layers: Layers) -> Form | None:
    if any(getattr(layer.config.options, "order", "first") == "exact" for layer in layers.values()):
        return None
    rank, rank_pattern = _pattern({n: layer.config.rank for n, layer in layers.items()})
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.hira_A"] = layer.get_parameter("A")
        tensors[f"{PREFIX}{name}.hira_B"] = scaling(layer.config) * layer.get_parameter("B")
    first = next(iter(layers.values())).config
    fields = {
        "r": rank,
        "rank_pattern": rank_pattern,
        "hira_dropout": first.dropout,
        "fan_in_fan_out": _is_transposed(layers),
    }
    return Form(peft_type="HIRA", fields=fields, tensors=tensors)


@dataclass(frozen=True, slots=True)
class _Native:
    methods: frozenset[str]
    make: Callable[[Layers], Form | None]


_NATIVE = (
    _Native(frozenset({"lora"}), _lora),
    _Native(frozenset({"dora"}), _dora),
    _Native(frozenset({"adalora"}), _adalora),
    _Native(frozenset({"ia3", "ssl"}), _ia3),
    _Native(frozenset({"vera"}), _vera),
    _Native(frozenset({"delora"}), _delora),
    _Native(frozenset({"hira", "liera"}), _hira),
)


# -- the others ---------------------------------------------------------------------------------

_MERGE = "decompft merge ADAPTER --into dense --out DIR writes a plain model that any tool loads"
_ALONE = {
    "dora",
    "ia3",
    "ssl",
    "hira",
    "liera",
}  # that PEFT has, but not beside another method in one adapter


def _plain(layers: Layers) -> Form:
    """A LoRA with s = 1, of each layer the rank that its change has."""
    found = {name: _change(name, layer) for name, layer in layers.items()}
    rank, pattern = _pattern({name: down.shape[0] for name, (_, down, _) in found.items()})
    with_bias = any(bias is not None for *_, bias in found.values())
    tensors: dict[str, Tensor] = {}
    for name, (up, down, bias) in found.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = down
        tensors[f"{PREFIX}{name}.lora_B.weight"] = up
        if with_bias:
            tensors[f"{PREFIX}{name}.lora_B.bias"] = up.new_zeros(up.shape[0]) if bias is None else bias
    fields = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "lora_bias": with_bias,
        **_lora_fields(layers),
    }
    return Form(peft_type="LORA", fields=fields, tensors=tensors, is_plain=True)


def _change(name: str, layer: Adapter) -> tuple[Tensor, Tensor, Tensor | None]:
    """(up, down, bias) with y = (W + up down) x + the layer's bias + bias, directions that are 0 left out."""
    out, in_ = layer.base.out_features, layer.base.in_features
    bias = layer.merged_bias(None)
    if bias is not None:
        return bias.new_zeros(out, 1), bias.new_zeros(1, in_), bias
    change = layer.change_of_checkpoint()
    if change is None:
        raise AdapterError(f"{name}: {layer.config.method} {_why_not(layer)}", _MERGE)
    up, down = change
    kept = (up != 0).any(dim=0) & (down != 0).any(dim=1)
    kept[0] |= not kept.any()  # peft knows no rank 0
    rank = int(kept.sum())
    if rank >= min(out, in_):
        raise AdapterError(
            f"{name}: {layer.config.method} changes this {out} x {in_} weight with its full rank, so that a LoRA of "
            "it would be larger than the weight", _MERGE,
        )  # fmt: skip
    return up[:, kept], down[kept], None


def _why_not(layer: Adapter) -> str:
    method = layer.config.method
    if method in _ALONE and getattr(layer.config.options, "order", "first") == "first":
        return "is a PEFT method, but not one that can stand beside the other layers' in one PEFT adapter"
    if method in ("liera", "hira"):
        return (
            "multiplies each weight by a factor of its own, a change of full rank that no PEFT method makes"
        )
    return "scales the base's weight, and what PEFT's LoRA adds cannot say that"


def _lora_fields(layers: Layers) -> dict[str, Any]:
    dropout = next(iter(layers.values())).config.dropout
    return {"lora_dropout": dropout, "bias": "none", "fan_in_fan_out": _is_transposed(layers)}


def _is_transposed(layers: Layers) -> bool:
    """GPT-2's Conv1D."""
    return any(layer.base.transposed for layer in layers.values())


def _pattern(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The commonest value, and the layers that have another one."""
    common = Counter(values.values()).most_common(1)[0][0]
    return _whole(common), {n: _whole(v) for n, v in values.items() if v != common}


def _whole(number: float) -> float:
    """An integer where it is one: what PEFT's own configs hold."""
    return int(number) if number == int(number) else number
