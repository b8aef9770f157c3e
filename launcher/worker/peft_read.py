"""What does a PEFT adapter's folder say, in our methods? PEFT's formulas: decompft.launcher.worker.peft_forms."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decompft.launcher.errors import AdapterError
from decompft.launcher.worker.peft_forms import DELORA_EPS, PREFIX

MERGE_HINT = "merge it with peft (merge_and_unload) and name the merged model as model.id, or --base"
# they start as any LoRA does, and leave the base alone
_HARMLESS_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
# fields that change nothing once training is over, or that the names and shapes of the tensors say again
_IGNORED = {
    "peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "feedforward_modules", "fan_in_fan_out", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "lambda_pattern",
    "use_rslora", "use_dora", "lora_dropout", "vera_dropout", "hira_dropout", "module_dropout", "delora_lambda",
    "init_lora_weights", "init_ia3_weights", "init_weights", "d_initial", "projection_prng_key", "save_projection",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "megatron_config",
    "megatron_core", "qalora_group_size", "ensure_weight_tying", "target_r", "init_r", "tinit", "tfinal", "deltaT",
    "beta1", "beta2", "orth_reg_weight", "total_step", "bias",
}  # fmt: skip


# the keys whose values are computed with, by what they are
_TYPES: dict[type, tuple[str, ...]] = {
    float: ("lora_alpha", "lora_dropout", "vera_dropout", "hira_dropout", "module_dropout", "delora_lambda"),
    int: ("init_r", "target_r"),
    str: ("task_type", "base_model_name_or_path", "revision", "bias"),
    dict: ("alpha_pattern", "lambda_pattern"),
}
_WORDS = {float: "number", int: "whole number", str: "text", dict: "table of numbers"}


@dataclass(frozen=True, kw_only=True)
class PeftFolder:
    """adapter_config.json and adapter_model.safetensors, keys without PEFT's prefix, float32."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def kind(self) -> str:
        return str(self.config["peft_type"])


@dataclass(frozen=True, kw_only=True)
class ReadLayer:
    """One adapted layer in our words."""

    method: str
    rank: int = 16  # of methods without one the recipe's default
    alpha: float = 32.0
    options: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class ReadAdapter:
    """All layers by name, and what else the file holds: modules that were trained whole."""

    layers: dict[str, ReadLayer]
    dropout: float
    rest: dict[str, Tensor]


def open_peft(folder: Path) -> PeftFolder:
    """Read a PEFT adapter's folder.

    Raises:
        AdapterError: there is none, it is damaged, or its tensors are only there as a pickle.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        hint = "name the folder that peft's save_pretrained wrote"
        if (folder / "adapter.json").is_file():
            hint = "this is an adapter of decompft already: eval, generate and merge take it as it is"
        raise AdapterError(f"{folder}: holds no adapter_config.json", hint)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path}: is no PEFT config", "save the adapter again with peft") from error
    _refuse_types(path, config)
    if not (folder / "adapter_model.safetensors").is_file():
        if (folder / "adapter_model.bin").is_file():
            raise AdapterError(
                f"{folder}: its tensors are in adapter_model.bin, a pickle, which runs code when it is read",
                "load it with peft where you trust it, and save_pretrained(..., safe_serialization=True)",
            )
        raise AdapterError(
            f"{folder}: holds no adapter_model.safetensors", "save the adapter again with peft"
        )
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(folder / "adapter_model.safetensors")
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{folder}: adapter_model.safetensors: {error}", "copy it again") from error
    tensors = {name.removeprefix(PREFIX): tensor.float() for name, tensor in found.items()}
    return PeftFolder(folder=folder, config=config, tensors=tensors)


def _refuse_types(path: Path, config: dict[str, Any]) -> None:
    for kind, names in _TYPES.items():
        for name in names:
            if name not in config or (config[name] is None and kind in (str, dict)):
                continue
            value = config[name]
            values = list(value.values()) if kind is dict and isinstance(value, dict) else [value]
            wanted = (int, float) if kind in (dict, float) else (kind,)
            if any(not isinstance(v, wanted) or isinstance(v, bool) for v in values):
                raise AdapterError(
                    f"{path}: {name}: {value!r} is no {_WORDS[kind]}", "save the adapter again with peft"
                )


def read_peft(peft: PeftFolder, linears: Mapping[str, tuple[int, int]]) -> ReadAdapter:
    """An adapter's layers in our methods.

    Args:
        linears: (out, in) of the base's linear layers that may be adapted, by name.

    Raises:
        AdapterError: a type or a setting that no method here computes.
    """
    if peft.kind not in _READERS:
        raise AdapterError(
            f"{peft.folder}: its peft_type is {peft.kind}; decompft reads {', '.join(_READERS)}", MERGE_HINT
        )
    _refuse_settings(peft)
    read, parts = _READERS[peft.kind]
    grouped: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    pattern = re.compile(rf"(.+)\.({'|'.join(parts)})(?:\.weight)?")
    for key, tensor in peft.tensors.items():
        if match := pattern.fullmatch(key):
            grouped.setdefault(match[1], {})[match[2]] = tensor
        elif re.search(r"\.lora_embedding_[AB]$|\.hira_embedding_[AB]$", key):
            raise AdapterError(
                f"{peft.folder}: {key}: an adapter of an embedding; decompft adapts linear layers, and trains "
                "embeddings whole", MERGE_HINT,
            )  # fmt: skip
        elif not key.startswith("base_model.vera_"):
            rest[key] = tensor
    if not grouped:
        raise AdapterError(
            f"{peft.folder}: holds no tensor of a {peft.kind} layer", "save it again with peft"
        )
    layers = {}
    for name, tensors in grouped.items():
        if name not in linears:
            raise AdapterError(
                f"{peft.folder}: adapts {name}, which is no linear layer of the base that decompft adapts",
                "name the model it was trained on with --base; an output head and embeddings take no adapter here",
            )
        if peft.kind == "VERA":
            tensors |= _projections(peft, *linears[name], tensors["vera_lambda_d"].shape[0])
        try:
            layers[name] = read(peft, name, tensors)
        except KeyError as error:
            raise AdapterError(
                f"{peft.folder}: {name} has no {error.args[0]}",
                "the file is not whole: save it again with peft",
            ) from error
    dropouts = ("lora_dropout", "vera_dropout", "hira_dropout", "module_dropout")
    return ReadAdapter(
        layers=layers, dropout=next((peft.config[d] for d in dropouts if peft.config.get(d)), 0.0), rest=rest
    )


def _refuse_settings(peft: PeftFolder) -> None:
    config = peft.config
    for name, value in config.items():
        if name not in _IGNORED and value:
            raise AdapterError(
                f"{peft.folder}: {name} is {json.dumps(value)}, which no method here computes", MERGE_HINT
            )
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"{peft.folder}: bias is {config['bias']!r}: it trained biases of the base", MERGE_HINT
        )
    start = config.get("init_lora_weights")
    if start not in _HARMLESS_STARTS:
        raise AdapterError(
            f"{peft.folder}: init_lora_weights is {start!r}, which took a part out of the base's weights: over "
            "the base as it is the adapter computes something else",
            "save it again as a plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )


# -- a type each: one layer's tensors -> ours -----------------------------------------------------


def _lora(peft: PeftFolder, name: str, found: dict[str, Tensor]) -> ReadLayer:
    A, B = found["lora_A"], found["lora_B"]
    _refuse_convolution(peft, name, A)
    config, tensors = peft.config, {"A": A, "B": B}
    alpha = _patterned(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    method = "lora"
    if config.get("use_dora"):
        method = "dora"
        tensors["m"] = found["lora_magnitude_vector"].reshape(-1)  # (1, out) in old files
    return ReadLayer(
        method=method,
        rank=A.shape[0],
        alpha=_positive(peft, name, alpha),
        options={"scaling": "rslora"} if config.get("use_rslora") else {},
        tensors=tensors,
    )


def _adalora(peft: PeftFolder, name: str, found: dict[str, Tensor]) -> ReadLayer:
    """Directions that peft cut away are 0 here, and masked; the scale is that of the rank at the start."""
    rank = int(peft.config.get("init_r", 12))
    A, B, e = found["lora_A"], found["lora_B"], found["lora_E"].reshape(-1)
    kept = e.shape[0]
    if kept > rank:
        raise AdapterError(
            f"{peft.folder}: {name} has {kept} directions, and init_r is {rank}", "save it again"
        )
    tensors = {
        "A": torch.cat([A, A.new_zeros(rank - kept, A.shape[1])]),
        "B": torch.cat([B, B.new_zeros(B.shape[0], rank - kept)], dim=1),
        "e": torch.cat([e, e.new_zeros(rank - kept)]),
        "mask": (torch.arange(rank) < kept).float(),
        "phase": torch.ones(1),
    }
    alpha = peft.config.get("lora_alpha", 8)
    return ReadLayer(
        method="adalora",
        rank=rank,
        alpha=float(alpha if alpha > 0 else rank),
        options={"target_rank": max(1, min(int(peft.config.get("target_r", 8)), rank))},
        tensors=tensors,
    )


def _ia3(peft: PeftFolder, name: str, found: dict[str, Tensor]) -> ReadLayer:
    scale = found["ia3_l"]
    _refuse_convolution(peft, name, scale)
    # (1, in) in feedforward modules, (out, 1) in others; a side of 1 is no linear layer worth scaling
    if scale.shape[0] == 1:
        return ReadLayer(method="ssl", tensors={"l_in": scale.reshape(-1)})
    return ReadLayer(method="ia3", tensors={"l_out": scale.reshape(-1)})


def _vera(peft: PeftFolder, name: str, found: dict[str, Tensor]) -> ReadLayer:
    """A plain LoRA: peft's random pair is one for all shapes, ours one a shape."""
    b, d = found["vera_lambda_b"], found["vera_lambda_d"]
    rank = d.shape[0]
    tensors = {"A": found["vera_A"], "B": found["vera_B"] * torch.outer(b, d)}
    return ReadLayer(method="lora", rank=rank, alpha=float(rank), tensors=tensors)


def _projections(peft: PeftFolder, out: int, in_: int, rank: int) -> dict[str, Tensor]:
    """This layer's slices of the two random matrices."""
    keys = {f"vera_{side}": f"base_model.vera_{side}" for side in "AB"}
    if not all(key in peft.tensors for key in keys.values()):
        raise AdapterError(
            f"{peft.folder}: holds no random projections, and which they are would depend on the version of torch",
            "load it with peft and save it with save_projection=True",
        )
    A, B = (peft.tensors[key] for key in keys.values())
    return {"vera_A": A[:rank, :in_].clone(), "vera_B": B[:out, :rank]}


def _delora(peft: PeftFolder, name: str, found: dict[str, Tensor]) -> ReadLayer:
    A = found["delora_A"]
    return ReadLayer(
        method="delora",
        rank=A.shape[0],
        options={
            "eps": DELORA_EPS,
            "lambda_init": float(
                _patterned(peft.config.get("lambda_pattern"), name, peft.config["delora_lambda"])
            ),
        },
        tensors={
            "A": A,
            "B": found["delora_B"],
            "lam": found["delora_lambda"],
            "column_norms": found["delora_w_norm"],
        },
    )


def _hira(peft: PeftFolder, name: str, found: dict[str, Tensor]) -> ReadLayer:
    A = found["hira_A"]
    return ReadLayer(
        method="hira", rank=A.shape[0], alpha=float(A.shape[0]), tensors={"A": A, "B": found["hira_B"]}
    )


Reader = Callable[[PeftFolder, str, dict[str, Tensor]], ReadLayer]
_READERS: dict[str, tuple[Reader, tuple[str, ...]]] = {
    "LORA": (_lora, ("lora_A", "lora_B", "lora_magnitude_vector")),
    "ADALORA": (_adalora, ("lora_A", "lora_B", "lora_E")),
    "IA3": (_ia3, ("ia3_l",)),
    "VERA": (_vera, ("vera_lambda_b", "vera_lambda_d")),
    "DELORA": (_delora, ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")),
    "HIRA": (_hira, ("hira_A", "hira_B")),
}


def _refuse_convolution(peft: PeftFolder, name: str, tensor: Tensor) -> None:
    if tensor.dim() != 2:
        raise AdapterError(
            f"{peft.folder}: {name} is a convolution (its tensor has {tensor.dim()} dimensions); decompft adapts "
            "linear layers", MERGE_HINT,
        )  # fmt: skip


def _patterned(patterns: dict[str, Any] | None, name: str, default: float) -> float:
    """As peft looks it up: the first key that is a regular expression for the end of the name."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return float(value)
    return float(default)


def _positive(peft: PeftFolder, name: str, alpha: float) -> float:
    if alpha > 0 and math.isfinite(alpha):
        return alpha
    raise AdapterError(
        f"{peft.folder}: {name}: lora_alpha is {alpha}", "decompft scales by a positive number"
    )
