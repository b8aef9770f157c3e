"""How are tensors written to disk one at a time, hashed on the way and forced out to the medium?"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPES: dict[str, tuple[torch.dtype, str]] = {  # name in a manifest -> dtype, code in a safetensors header
    "float64": (torch.float64, "F64"),
    "float32": (torch.float32, "F32"),
    "float16": (torch.float16, "F16"),
    "bfloat16": (torch.bfloat16, "BF16"),
    "int64": (torch.int64, "I64"),
    "int32": (torch.int32, "I32"),
    "int8": (torch.int8, "I8"),
    "uint8": (torch.uint8, "U8"),
}
DTYPE_NAMES = {dtype: name for name, (dtype, _) in DTYPES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One tensor of a file that is yet to be written."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]  # called when its turn comes; any device
    multiple: int = 1  # of how many bytes its size is known to be: it then lies among types as wide


def write_tensors(path: Path, entries: Iterable[Entry]) -> dict[str, Any]:
    """Writes a safetensors file and returns its {"size", "sha256"}.

    safetensors' own save_file wants all tensors in host memory at once; here it is one at a time.
    """
    # wide types first keeps all aligned
    entries = sorted(entries, key=lambda e: (-max(e.dtype.itemsize, e.multiple), e.key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # other tools ask for it
    end = 0
    for e in entries:
        start, end = end, end + torch.Size(e.shape).numel() * e.dtype.itemsize
        code = DTYPES[DTYPE_NAMES[e.dtype]][1]
        header[e.key] = {"dtype": code, "shape": list(e.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in (len(text).to_bytes(8, "little"), text):
            digest.update(chunk)
            file.write(chunk)
        for e in entries:
            tensor = e.read().detach().to("cpu").contiguous()
            assert tuple(tensor.shape) == e.shape and tensor.dtype == e.dtype, (e, tensor.shape, tensor.dtype)
            data = tensor.reshape(-1).view(torch.uint8).numpy().data
            digest.update(data)
            file.write(data)
        _force_out(file)
    return {"size": 8 + len(text) + end, "sha256": digest.hexdigest()}


def write_json(path: Path, value: Any) -> dict[str, Any]:
    """Writes sorted, indented JSON and returns its {"size", "sha256"}."""
    content = json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"
    write_bytes(path, content)
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file that is on the medium when this returns."""
    with path.open("wb") as file:
        file.write(content)
        _force_out(file)


def fsync_folder(folder: Path) -> None:
    """Makes the names in a folder (new files, renames) survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _force_out(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    # so that reading back reads the medium, not the page cache
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
