"""What does a safetensors file hold, and is it whole? Its header against its size; no data is read."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decompft.launcher.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_HEADER_LIMIT = 100_000_000  # bytes; what safetensors itself accepts
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Where one tensor lies."""

    path: Path
    dtype: str  # safetensors' code: F32, BF16, U8, ...
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    num_bytes: int


def weight_files(folder: Path) -> dict[Path, tuple[str, ...]]:
    """The files of a checkpoint with the names that the index says each holds (none without an index).

    Raises:
        ModelError: no weights, or a damaged index.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():  # what else lies there is another format of the same weights
        return {folder / SINGLE: ()}
    if index.is_file():
        try:
            places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            found: dict[Path, list[str]] = {}
            for name, file in sorted(places.items()):
                found.setdefault(folder / file, []).append(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: not a weight index: {error}", "fetch it again") from error
        return {path: tuple(found[path]) for path in sorted(found)}
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return {path: () for path in files}
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise ModelError(
            f"{folder}: its weights are pickled ({pickled[0]}), which decompft does not read",
            "load the model with transformers and save it again: save_pretrained writes safetensors",
        )
    raise ModelError(f"{folder}: holds no *.safetensors file", "name the folder that holds the weights")


def read_headers(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint, once all its files were found whole.

    Raises:
        ModelError: as `weight_files` and `read_header`; a shard is missing, or lacks what the index says
            it holds.
    """
    files = weight_files(folder)
    headers = {path: read_header(path) for path in files}
    tensors: dict[str, Stored] = {}
    for path, held in headers.items():
        lost = [name for name in files[path] if name not in held]
        if lost:
            raise ModelError(
                f"{path}: lacks {lost[0]}, which {INDEX} says it holds ({len(lost)} such tensors)",
                "index and shards belong to different checkpoints; copy or fetch the whole folder again",
            )
        tensors |= held
    return tensors


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one file.

    Raises:
        ModelError: missing, cut off, longer than promised, or with a header that contradicts itself.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            # a cut or foreign file makes this number anything: do not read gigabytes for it
            head = file.read(length) if 8 + length <= size and length <= _HEADER_LIMIT else b""
    except FileNotFoundError:
        raise ModelError(
            f"{path}: this shard is in the index but not in the folder",
            "copy or fetch the whole checkpoint again",
        ) from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        header: dict[str, Any] = json.loads(head)
        header.pop("__metadata__", None)
        tensors = {name: _stored(path, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ModelError(
            f"{path}: not a safetensors file, or cut short: its header cannot be read ({size} bytes)",
            "copy or fetch the file again",
        ) from None
    _check(path, tensors, size, 8 + length)
    return tensors


def _stored(path: Path, entry: dict[str, Any], data: int) -> Stored:
    start, stop = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(n) for n in entry["shape"])
    return Stored(
        path=path, dtype=str(entry["dtype"]), shape=shape, start=data + start, num_bytes=stop - start
    )


def _check(path: Path, tensors: dict[str, Stored], size: int, data: int) -> None:
    """Offsets follow each other without gap or overlap, as the format demands, up to the file's end."""
    end = data
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        bits = _BITS.get(stored.dtype)
        expected = stored.num_bytes if bits is None else math.prod(stored.shape) * bits // 8
        if stored.num_bytes != expected or min(stored.shape, default=0) < 0:
            raise _contradiction(
                path, f"{name} is {stored.dtype} {list(stored.shape)} in {stored.num_bytes} bytes"
            )
        if stored.start != end:
            what = "overlaps the one before it" if stored.start < end else "leaves a gap before it"
            raise _contradiction(path, f"{name} {what}")
        end += stored.num_bytes
    if size != end:
        what = "truncated" if size < end else "longer than its header says"
        raise ModelError(
            f"{path}: {what}: {size} bytes, the header promises {end}", "copy or fetch the file again"
        )


def _contradiction(path: Path, what: str) -> ModelError:
    return ModelError(f"{path}: its header contradicts itself: {what}", "the file is damaged; fetch it again")
