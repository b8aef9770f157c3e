"""A PEFT adapter as a folder that eval, generate, merge and combine load."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decompft.adapters.frozen.base import FrozenLinear
from decompft.launcher.errors import AdapterError, CheckpointError, ModelError, UserError
from decompft.launcher.quantized_checkpoint import read_config_json, stored_format
from decompft.launcher.recipe import AdapterOverride, AdapterSection, ModelSection, QuantizationSection, Task
from decompft.launcher.worker.build import Outline, open_source, outline_of, trained_targets
from decompft.launcher.worker.checkpoint import save_adapter
from decompft.launcher.worker.description import describe_adapter
from decompft.launcher.worker.engines.base import Engine
from decompft.launcher.worker.matching import match_tensors
from decompft.launcher.worker.modelfiles import identity, resolve_model
from decompft.launcher.worker.peft_read import MERGE_HINT, PeftFolder, ReadLayer, open_peft, read_peft
from decompft.launcher.worker.state import place_adapter
from decompft.launcher.worker.tokenizers import load_tokenizer, save_tokenizer

_TASKS: dict[str | None, Task] = {
    None: "causal-lm",
    "CAUSAL_LM": "causal-lm",
    "SEQ_CLS": "sequence-classification",
}
_HEADS = ("score.", "classifier.")


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What was written."""

    peft_type: str
    methods: tuple[str, ...]
    num_layers: int
    train_modules: tuple[str, ...]


def import_peft(folder: Path, out: Path, *, base: str | None, say: Callable[[str], None]) -> Imported:
    """Write our adapter folder `out` from PEFT's `folder`.

    Args:
        base: another place of the model that the PEFT config names.
        say: takes a line for the user before work that lasts.

    Raises:
        UserError: `out` exists; no base is named or found; or the adapter is of a kind, or has a setting, that
            no method here computes.
        RunFailed: the disk is full, or refuses.
    """
    if out.exists():
        raise UserError(f"{out}: exists already", "name a new folder with --out")
    peft = open_peft(folder)
    model = _model(peft, base)
    named = peft.config.get("base_model_name_or_path")
    if base is not None and named and base != named:
        say(f"the PEFT config was saved over {named}; that {base} is the same model cannot be checked")
    model_dir = _base_folder(model, base, say)
    quantization = _quantization(model_dir)
    bare = outline_of(model, quantization, None, model_dir)
    read = read_peft(peft, _linears(bare))
    _refuse_scaled_biases(peft, bare, read.layers)
    rest, train_modules = _whole(peft, bare, read.rest)
    section = _section(bare, read.layers, read.dropout, train_modules)
    tensors = {f"{n}.{own}": t for n, layer in read.layers.items() for own, t in layer.tensors.items()} | rest
    if any(layer.method == "dora" for layer in read.layers.values()):
        tensors |= _row_norms(bare, model, model_dir, read.layers, new=set(rest))
    _check(peft, outline_of(model, quantization, section, model_dir), tensors)
    quantized = quantization.model_dump(mode="json")
    description = {
        **describe_adapter(section),
        "name": out.name,
        "model": model.model_dump(mode="json"),
        "quantization": quantized,
        "seed": 0,
        "base": {
            **identity(model_dir),
            "id": model.id,
            "revision": model.revision,
            "task": model.task,
            "quantization": {key: value for key, value in quantized.items() if key != "cache"},
        },
        "data_formats": [],  # unknown
        "imported": {"peft_type": peft.kind, "folder": str(folder.resolve()), "config": peft.config},
    }
    _save(out, tensors, description, model, folder)
    return Imported(
        peft_type=peft.kind,
        methods=tuple(sorted({layer.method for layer in read.layers.values()})),
        num_layers=len(read.layers),
        train_modules=tuple(train_modules),
    )


def _model(peft: PeftFolder, base: str | None) -> ModelSection:
    config = peft.config
    kind = config.get("task_type")
    if kind not in _TASKS:
        known = ", ".join(str(task) for task in _TASKS if task)
        raise AdapterError(f"{peft.folder}: its task_type is {kind}", f"decompft has models for {known}")
    named = config.get("base_model_name_or_path")
    if not (base or named):
        raise AdapterError(f"{peft.folder}: its config names no base model", "name it with --base MODEL")
    fields: dict[str, Any] = {"id": base or named, "task": _TASKS[kind]}
    if base in (None, named) and config.get("revision"):
        fields["revision"] = config["revision"]
    if _TASKS[kind] == "sequence-classification":
        # the last layer of a head is the narrowest
        sizes = [t.shape[0] for n, t in peft.tensors.items() if n.startswith(_HEADS) and t.dim() == 2]
        if not sizes:
            raise AdapterError(
                f"{peft.folder}: a classifier without the weights of its head",
                "train it with modules_to_save, or with task_type SEQ_CLS given to peft's config",
            )
        fields["num_labels"] = min(sizes)
    return ModelSection(**fields)


def _base_folder(model: ModelSection, base: str | None, say: Callable[[str], None]) -> Path:
    try:
        folder = resolve_model(model, say=say)
    except ModelError as error:
        if base is None:  # often a path of the machine that it was trained on
            raise ModelError(error.message, "name the model it was trained on with --base") from error
        raise
    assert folder is not None, "a model with an id and a checkpoint has a folder"
    return folder


def _quantization(model_dir: Path) -> QuantizationSection:
    """The base as its checkpoint stores it."""
    config = read_config_json(model_dir)
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    section = QuantizationSection(format="none", compute="float32" if dtype == "float32" else "bfloat16")
    if stored := stored_format(config):
        section = section.model_copy(update={"format": stored})
    return section


def _linears(bare: Outline) -> dict[str, tuple[int, int]]:
    return {
        n: (m.out_features, m.in_features) for n, m in bare.hf.named_modules() if isinstance(m, FrozenLinear)
    }


def _refuse_scaled_biases(peft: PeftFolder, bare: Outline, layers: dict[str, ReadLayer]) -> None:
    for name, layer in layers.items():
        if layer.method == "ia3" and bare.hf.get_submodule(name).bias is not None:
            raise AdapterError(
                f"{peft.folder}: {name} has a bias, which PEFT's IA3 scales with the output; ia3 here scales W x alone",
                MERGE_HINT,
            )


def _whole(peft: PeftFolder, bare: Outline, rest: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of modules that were trained whole, under the names of our file, and those modules but new heads."""
    hf = bare.hf
    names = [(n, id(p)) for n, p in hf.named_parameters(remove_duplicate=False)]
    twins: dict[int, list[str]] = {}
    for name, number in names:
        twins.setdefault(number, []).append(name)
    places = dict(names)
    frozen = {f"{n}.{own}" for n in _linears(bare) for own in ("weight", "bias")}
    tensors: dict[str, Tensor] = {}
    for name, tensor in rest.items():
        if name in frozen or name not in places:
            what = "a linear layer that is frozen here" if name in frozen else "no parameter of the base"
            raise AdapterError(f"{peft.folder}: holds {name}, {what}", _HINT)
        same = twins[places[name]]
        if not all(twin in rest and torch.equal(rest[twin], tensor) for twin in same):
            raise AdapterError(
                f"{peft.folder}: {' and '.join(same)} are one tensor in the base, and two in this adapter",
                _HINT,
            )
        tensors[same[0]] = tensor
    modules = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    return tensors, [m for m in modules if m not in bare.whole]


_HINT = "name the model it was trained on with --base, or merge it with peft (merge_and_unload) and use that model"


def _section(
    bare: Outline, layers: dict[str, ReadLayer], dropout: float, train_modules: list[str]
) -> AdapterSection:
    """The commonest settings as the section's own, the others as overrides."""
    keys = {name: _settings(layer) for name, layer in layers.items()}
    common = Counter(keys.values()).most_common(1)[0][0]
    first = next(layer for name, layer in layers.items() if keys[name] == common)
    overrides = []
    for key in dict.fromkeys(keys.values()):
        names = [name for name in layers if keys[name] == key]
        layer = layers[names[0]]
        if key != common:
            overrides.append(
                AdapterOverride(
                    targets=_targets(names, list(layers)),
                    method=layer.method,
                    rank=layer.rank,
                    alpha=layer.alpha,
                    options=layer.options,
                )
            )
    linears = list(_linears(bare))
    return AdapterSection(
        method=first.method,
        rank=first.rank,
        alpha=first.alpha,
        dropout=dropout,
        targets="all-linear" if set(linears) == set(layers) else _targets(list(layers), linears),
        train_modules=train_modules,
        options=first.options,
        overrides=overrides,
    )


def _settings(layer: ReadLayer) -> tuple[Any, ...]:
    return layer.method, layer.rank, layer.alpha, tuple(sorted(layer.options.items()))


def _targets(names: Sequence[str], among: Iterable[str]) -> list[str]:
    """Last parts of names, if these mean no other layer; else whole names."""
    last = {name.rpartition(".")[2] for name in names}
    meant = {name for name in among if name.rpartition(".")[2] in last}
    return sorted(last) if meant == set(names) else list(names)


def _row_norms(
    bare: Outline, model: ModelSection, model_dir: Path, layers: dict[str, ReadLayer], *, new: set[str]
) -> dict[str, Tensor]:
    """DoRA's squared row norms of the weights that are used, which PEFT takes anew in every pass.

    Args:
        new: parameters that the checkpoint need not have.
    """
    source = open_source(model, model_dir, 0, bare.shapes, torch.device("cpu"))
    wants, _ = match_tensors(bare.hf, source, prefix=bare.hf.base_model_prefix, new=new)
    found = {}
    for want in wants:
        name = want.name.removesuffix(".weight")
        if want.layer is None or name not in layers:
            continue
        rows = source.rows(want.key, 0, want.layer.out_features, transposed=want.transposed)
        if not source.is_packed(want.key):
            rows = want.layer.unpack(want.layer.pack(rows), torch.float32)
        found[f"{name}.rn2"] = torch.sum(rows.double().square(), dim=1).float()
    return found


def _check(peft: PeftFolder, outline: Outline, tensors: dict[str, Tensor]) -> None:
    """Names and shapes against the model, on meta."""
    try:
        place_adapter(trained_targets(outline.hf), tensors, Engine(torch.device("cpu"), timeout_s=60))
    except CheckpointError as error:
        raise AdapterError(f"{peft.folder}: {error.message}", error.hint) from error


def _save(
    out: Path, tensors: dict[str, Tensor], description: dict[str, Any], model: ModelSection, folder: Path
) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if not (folder / "tokenizer_config.json").is_file():
        save_adapter(out, whole, description)
        return
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = Path(temporary) / "tokenizer"
        save_tokenizer(load_tokenizer(model.model_copy(update={"tokenizer": None}), folder), tokenizer)
        save_adapter(out, whole, description, tokenizer=tokenizer)
