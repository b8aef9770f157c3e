"""An adapter folded into its base, written as a plain model: one tensor in memory at a time."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from decompft.adapters.base import Adapter as AdapterLayer
from decompft.adapters.inject import adapters
from decompft.launcher.errors import RunFailed, UserError
from decompft.launcher.worker.build import DTYPES, Outline, open_source, outline_of
from decompft.launcher.worker.inference import Adapter
from decompft.launcher.worker.load import Progress, Want, match_tensors
from decompft.launcher.worker.tensorfile import DTYPE_NAMES, Entry, fsync_folder, write_json, write_tensors
from decompft.launcher.worker.tensors import TensorSource

Into = Literal["dense", "dequantized"]
SHARD_BYTES = 5_000_000_000


def merge(adapter: Adapter, into: Into, out: Path, *, shard_bytes: int = SHARD_BYTES, progress: Progress) -> None:
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
    temporary: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        temporary.chmod(0o755)
        outline = outline_of(adapter.model, adapter.quantization, adapter.adapter, adapter.model_dir)
        entries = list(_entries(adapter, outline, into))
        _write_shards(temporary, entries, shard_bytes, progress)
        _write_config(temporary, adapter, outline, entries)
        adapter.tokenizer().save_pretrained(temporary)
        fsync_folder(temporary)
        os.rename(temporary, out)
    except OSError as error:
        raise RunFailed(f"{out}: not written: {error.strerror or error}", "free some space, or name another disk") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _entries(adapter: Adapter, outline: Outline, into: Into) -> Iterator[Entry]:
    """Every tensor of the merged model under transformers' own name, read when its turn comes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = open_source(adapter.model, adapter.model_dir, adapter.seed, outline.shapes, device)
    hf = outline.hf
    _place(hf, adapter, device)
    layers = {id(layer.base): layer for _, layer in adapters(hf)}
    wants, missing = match_tensors(hf, set(source.names()), hf.base_model_prefix)
    compute = DTYPES[adapter.quantization.compute]
    is_random = adapter.model.weights == "random"
    for want in wants:
        dtype = compute if is_random else source.dtype(want.key)
        if want.name in adapter.tensors:
            read = partial(_converted, adapter.tensors[want.name], dtype)
        else:
            read = partial(_merged, want, source, layers.get(id(want.layer)), into, dtype, device)
        yield Entry(key=want.name, shape=outline.shapes[want.name], dtype=dtype, read=read)
    for name in missing:  # a new head, trained whole
        yield Entry(key=name, shape=outline.shapes[name], dtype=compute, read=partial(_converted, adapter.tensors[name], compute))


def _merged(
    want: Want, source: TensorSource, layer: AdapterLayer | None, into: Into, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """One tensor as the checkpoint would store it: linear weights merged, everything else as it is."""
    num_rows = want.parameters[0].shape[0]
    rows = source.rows(want.key, 0, num_rows, transposed=want.transposed)
    if want.layer is None or (layer is None and into == "dense"):
        return _stored(rows, want.transposed, dtype)
    rows = rows.to(device)
    if into == "dequantized":
        rows = want.layer.unpack(want.layer.pack(rows), torch.float32)
    if layer is not None:
        rows = layer.merged(rows)
    return _stored(rows, want.transposed, dtype)


def _stored(rows: Tensor, transposed: bool, dtype: torch.dtype) -> Tensor:
    return (rows.T if transposed else rows).to(dtype)


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype)


def _place(hf: nn.Module, adapter: Adapter, device: torch.device) -> None:
    """Give the adapter layers, and nothing else of the model on meta, their trained tensors."""
