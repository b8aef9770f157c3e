"""An adapter folded into its base, written as a plain model: one tensor in memory at a time."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from decompft.adapters.base import Adapter as AdapterLayer
from decompft.adapters.inject import adapters
from decompft.adapters.spec import ADAPTER_SPECS
from decompft.launcher.errors import AdapterError, RunFailed, UserError
from decompft.launcher.worker.build import DTYPES, Outline, open_source, outline_of, trained_targets
from decompft.launcher.worker.engines.base import Engine
from decompft.launcher.worker.inference import Adapter
from decompft.launcher.worker.load import Progress
from decompft.launcher.worker.matching import Want, match_tensors
from decompft.launcher.worker.state import place_adapter
from decompft.launcher.worker.tensorfile import Entry, fsync_folder, write_json, write_tensors
from decompft.launcher.worker.tensors import INDEX, SafetensorsSource, TensorSource

Into = Literal["dense", "dequantized"]
SHARD_BYTES = 5_000_000_000


def merge(
    adapter: Adapter, into: Into, out: Path, *, shard_bytes: int = SHARD_BYTES, progress: Progress
) -> None:
    """Write config, tokenizer and weights of the merged model into the new folder `out`.

    Args:
        into: dense: onto the base's own weights; dequantized: onto the weights as training used them,
            quantized and back, so that the result computes what was trained.
        shard_bytes: of one safetensors file at most, unless a single tensor is larger.

    Raises:
        UserError: `out` exists.
        CheckpointError: the adapter does not fit the base.
        RunFailed: the disk is full, or refuses; `out` does not exist then.
    """
    if out.exists():
        raise UserError(f"{out}: exists already", "name a new folder with --out")
    if not ADAPTER_SPECS[adapter.adapter.method].mergeable:
        raise AdapterError(
            f"{adapter.folder}: {adapter.adapter.method} is no change of weights: it cannot be merged"
        )
    temporary: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        temporary.chmod(0o755)
        outline = outline_of(adapter.model, adapter.quantization, adapter.adapter, adapter.model_dir)
        entries = list(_entries(adapter, outline, into))
        _write_shards(temporary, entries, shard_bytes, progress)
        _write_config(temporary, adapter, outline)
        adapter.tokenizer().save_pretrained(temporary)
        fsync_folder(temporary)
        os.rename(temporary, out)
    except OSError as error:
        raise RunFailed(
            f"{out}: not written: {error.strerror or error}", "free some space, or name another disk"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _entries(adapter: Adapter, outline: Outline, into: Into) -> Iterator[Entry]:
    """Every tensor of the merged model under transformers' own name, read when its turn comes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = open_source(adapter.model, adapter.model_dir, adapter.seed, outline.shapes, device)
    layers = _adapter_layers(adapter, outline, device)
    new = set(adapter.tensors)
    wants, missing = match_tensors(outline.hf, source, prefix=outline.hf.base_model_prefix, new=new)
    compute = DTYPES[adapter.quantization.compute]
    for want in wants:
        dtype = source.dtype(want.key) if isinstance(source, SafetensorsSource) else compute
        if want.name in adapter.tensors:  # a module that was trained whole
            read = partial(adapter.tensors[want.name].to, dtype)
        else:
            read = partial(_merged, want, source, layers.get(id(want.layer)), into, dtype, device)
        yield Entry(key=want.name, shape=outline.shapes[want.name], dtype=dtype, read=read)
    for name in missing:  # a new head
        read = partial(adapter.tensors[name].to, compute)
        yield Entry(key=name, shape=outline.shapes[name], dtype=compute, read=read)


@torch.no_grad()
def _merged(
    want: Want,
    source: TensorSource,
    layer: AdapterLayer | None,
    into: Into,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """One tensor of the base as its checkpoint stores it: linear weights merged, all else as it is."""
    rows = source.rows(want.key, 0, want.parameters[0].shape[0], transposed=want.transposed)
    if want.layer is not None:
        rows = rows.to(device)
        # a packed weight was read dequantized already, in the very numbers of training
        if into == "dequantized" and not source.is_packed(want.key):
            rows = want.layer.unpack(want.layer.pack(rows), torch.float32)
        if layer is not None:
            rows = layer.merged(rows)
    return (rows.T if want.transposed else rows).to(dtype)


def _adapter_layers(adapter: Adapter, outline: Outline, device: torch.device) -> dict[int, AdapterLayer]:
    """The adapter layers with their trained tensors, by the id of their base, which stays on meta."""
    for _, layer in adapters(outline.hf):
        for name, parameter in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, nn.Parameter(torch.empty_like(parameter, device=device)))
        for name, buffer in list(layer.named_buffers(recurse=False)):
            setattr(layer, name, torch.empty_like(buffer, device=device))
    place_adapter(trained_targets(outline.hf), adapter.tensors, Engine(device, timeout_s=60))
    adapter.settle(outline.hf)
    return {id(layer.base): layer for _, layer in adapters(outline.hf)}


def _write_shards(folder: Path, entries: list[Entry], shard_bytes: int, progress: Progress) -> None:
    """model.safetensors, or several of them with an index."""
    shards: list[list[Entry]] = [[]]
    filled = done = 0
    for entry in entries:
        if shards[-1] and filled + _num_bytes(entry) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += _num_bytes(entry)
    total = sum(map(_num_bytes, entries))

    def counted(entry: Entry) -> Tensor:
        nonlocal done
        tensor = entry.read()
        done += _num_bytes(entry)
        progress(done, total)
        return tensor

    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        write_tensors(folder / name, [replace(entry, read=partial(counted, entry)) for entry in shard])
        places |= {entry.key: name for entry in shard}
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _write_config(folder: Path, adapter: Adapter, outline: Outline) -> None:
    """config.json of the base, with what the merge changed, and the files that go with it."""
    model, source = adapter.model, adapter.model_dir
    changed: dict[str, Any] = {"architectures": [type(outline.hf).__name__]}
    if model.weights == "random":
        changed["dtype"] = adapter.quantization.compute
    if model.task == "sequence-classification":
        changed["id2label"] = {str(i): f"LABEL_{i}" for i in range(model.num_labels)}
        changed["label2id"] = {name: int(i) for i, name in changed["id2label"].items()}
    if source is None:
        from transformers import AutoConfig

        fields = dict(model.config or {})
        fresh: dict[str, Any] = AutoConfig.for_model(fields.pop("model_type"), **fields).to_dict()
        write_json(folder / "config.json", fresh | changed)
        return
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)  # the weights that are written are plain floats
    write_json(folder / "config.json", config | changed)
    kept = ["generation_config.json", *(("*.py",) if model.trust_remote_code else ())]
    for path in (found for pattern in kept for found in source.glob(pattern)):
        shutil.copyfile(path, folder / path.name)


def _num_bytes(entry: Entry) -> int:
    return math.prod(entry.shape) * entry.dtype.itemsize
