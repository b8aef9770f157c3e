"""An adapter as a folder that the peft library loads over the plain transformers model."""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.inject import is_linear
from decompft.adapters.spec import ADAPTER_SPECS
from decompft.launcher.errors import AdapterError, RunFailed, UserError
from decompft.launcher.packaged import is_packaged
from decompft.launcher.worker.combining_parts import Part, open_parts
from decompft.launcher.worker.inference import Adapter
from decompft.launcher.worker.peft_forms import PREFIX, Form, form_of
from decompft.launcher.worker.tensorfile import Entry, fsync_folder, write_json, write_tensors

_TASKS = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}


def export_peft(adapter: Adapter, out: Path) -> Form:
    """Write adapter_config.json and adapter_model.safetensors into the new folder `out`.

    Raises:
        UserError: `out` exists.
        AdapterError: PEFT has nothing that computes what this adapter computes.
        RunFailed: the disk is full, or refuses; `out` does not exist then.
    """
    if out.exists():
        raise UserError(f"{out}: exists already", "name a new folder with --out")
    _refuse(adapter)
    (part,) = open_parts([adapter], torch.device("cpu"))
    layers = {name.removesuffix(".weight"): layer for name, layer in part.layers.items()}
    with torch.no_grad():
        form = form_of(layers)
    modules, whole = _whole_modules(part)
    config = {
        "peft_type": form.peft_type,
        "task_type": _TASKS[adapter.model.task],
        "inference_mode": True,
        **_base(adapter),
        **form.fields,
        "target_modules": _targets(part, list(layers)),
        "modules_to_save": modules or None,
    }
    if form.peft_type == "IA3":
        # PEFT wants them to be a subset of the targets, letter by letter
        config["target_modules"] = list(layers)
    _write(out, config, form.tensors | whole)
    return form


def _refuse(adapter: Adapter) -> None:
    section = adapter.adapter
    for method in (section.method, *(o.method for o in section.overrides if o.method)):
        if not ADAPTER_SPECS[method].mergeable:
            raise AdapterError(
                f"{adapter.folder}: {method} is no change of weights, and PEFT has no layer that computes it",
                "use it as an adapter: decompft generate, eval",
            )
    if adapter.model.weights == "random":
        raise AdapterError(
            f"{adapter.folder}: was trained over random weights that no checkpoint holds, so that peft has no base "
            "to load it over",
            "decompft merge ADAPTER --into dense --out DIR writes base and adapter as one model",
        )


def _base(adapter: Adapter) -> dict[str, Any]:
    """What peft loads by itself in AutoPeftModel; a path is that of this machine."""
    model, folder = adapter.model, adapter.model_dir
    assert model.id is not None and folder is not None, "the checkpoint of a model that has weights"
    if is_packaged(model.id) or Path(model.id).expanduser().exists():
        return {"base_model_name_or_path": str(folder.resolve()), "revision": None}
    return {"base_model_name_or_path": model.id, "revision": model.revision}


def _targets(part: Part, names: list[str]) -> list[str]:
    """Last parts of names, if these mean the adapted layers alone; else whole names."""
    last = {name.rpartition(".")[2] for name in names}
    linears = {
        name.removesuffix(".base")
        for name, module in part.outline.hf.named_modules()
        if is_linear(module) or isinstance(module, FrozenLinear)
    }
    meant = {name for name in linears if name.rpartition(".")[2] in last}
    return sorted(last) if meant == set(names) else names


def _whole_modules(part: Part) -> tuple[list[str], dict[str, Tensor]]:
    """Modules that were trained whole, and their tensors by PEFT's keys."""
    hf = part.outline.hf
    first = {
        id(parameter): name for name, parameter in hf.named_parameters()
    }  # a tied one under its first name
    tensors: dict[str, Tensor] = {}
    for module in sorted(part.outline.whole):
        for own, parameter in hf.get_submodule(module).named_parameters(recurse=False):
            # PEFT would untie them: each of a tied pair gets its own copy
            tensors[f"{PREFIX}{module}.{own}"] = part.whole[first[id(parameter)]]
    # a head of several layers is one module there
    heads = part.outline.new_heads
    inside = {m for m in part.outline.whole if any(m == h or m.startswith(h + ".") for h in heads)}
    return sorted({*heads, *(part.outline.whole - inside)}), tensors


def _write(out: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    temporary: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        temporary.chmod(0o755)
        write_tensors(temporary / "adapter_model.safetensors", [_entry(n, t) for n, t in tensors.items()])
        write_json(temporary / "adapter_config.json", config)
        fsync_folder(temporary)
        os.rename(temporary, out)
    except OSError as error:
        raise RunFailed(
            f"{out}: not written: {error.strerror or error}", "free some space, or name another disk"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _entry(key: str, tensor: Tensor) -> Entry:
    return Entry(
        key=key, shape=tuple(tensor.shape), dtype=torch.float32, read=partial(tensor.to, torch.float32)
    )
