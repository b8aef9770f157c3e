"""How is a plain model's folder written: safetensors in shards, one tensor in memory at a time, and config.json?"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from decompft.launcher.worker.inference import Adapter
from decompft.launcher.worker.load import Progress
from decompft.launcher.worker.tensorfile import Entry, write_json, write_tensors
from decompft.launcher.worker.tensors import INDEX


def write_shards(folder: Path, groups: Iterable[list[Entry]], shard_bytes: int, progress: Progress) -> None:
    """model.safetensors, or several of them with an index.

    Args:
        groups: tensors that belong into one file, as the parts of a quantized weight do.
        shard_bytes: of one file at most, unless a single group is larger.
    """
    shards: list[list[Entry]] = [[]]
    filled = done = 0
    for group in groups:
        size = sum(map(_num_bytes, group))
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1] += group
        filled += size
    total = sum(_num_bytes(entry) for shard in shards for entry in shard)

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


def write_config(
    folder: Path,
    adapter: Adapter,
    architecture: str,
    quantization: dict[str, Any] | None,
    *,
    num_new_rows: int = 0,
) -> None:
    """config.json of the adapter's base, with what a merge changed, and the files that go with it.

    Args:
        quantization: `quantization_config`, None for weights that are plain floats.
        num_new_rows: tokens past the base's vocabulary.
    """
    model, source = adapter.model, adapter.model_dir
    changed: dict[str, Any] = {"architectures": [architecture]}
    if quantization is not None:
        changed["quantization_config"] = quantization
    if model.weights == "random":
        changed["dtype"] = adapter.quantization.activations
    if model.task == "sequence-classification":
        changed["id2label"] = {str(i): f"LABEL_{i}" for i in range(model.num_labels)}
        changed["label2id"] = {name: int(i) for i, name in changed["id2label"].items()}
    if source is None:
        from transformers import AutoConfig

        fields = dict(model.config or {})
        fresh: dict[str, Any] = AutoConfig.for_model(fields.pop("model_type"), **fields).to_dict()
        fresh["vocab_size"] += num_new_rows
        write_json(folder / "config.json", fresh | changed)
        return
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)  # of a base that was quantized before
    if num_new_rows:
        config["vocab_size"] += num_new_rows
    write_json(folder / "config.json", config | changed)
    kept = ["generation_config.json", *(("*.py",) if model.trust_remote_code else ())]
    for path in (found for pattern in kept for found in source.glob(pattern)):
        shutil.copyfile(path, folder / path.name)


def _num_bytes(entry: Entry) -> int:
    return math.prod(entry.shape) * entry.dtype.itemsize
