"""Where the base's tensors come from: rows of safetensors files, or of nothing but (seed, name)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from decompft.launcher.errors import ModelError
from decompft.launcher.worker.tensorfile import DTYPES

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_FLOATS = {code: dtype for dtype, code in DTYPES.values() if dtype.is_floating_point}


class TensorSource(Protocol):
    """Any rows of any tensor of a checkpoint."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype:
        """Raises ModelError if it is no floating-point tensor of at least 16 bits."""
        ...

    def rows(self, name: str, start: int, stop: int, *, transposed: bool = False) -> Tensor:
        """Rows [start, stop) of dimension 0; of the transposed matrix if `transposed`."""
        ...


class SafetensorsSource:
    """A folder of safetensors files, with or without an index. Only the rows asked for are read.

    Raises:
        ModelError: a file is missing, cut off or is not safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self._files = {path: _open(path) for path in _weight_files(folder)}
        self._where = {name: handle for handle in self._files.values() for name in handle.keys()}  # noqa: SIM118

    def names(self) -> Iterable[str]:
        return self._where.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        code = self._where[name].get_slice(name).get_dtype()
        if code not in _FLOATS:
            raise ModelError(
                f"{name} is stored as {code}: this checkpoint is quantized already",
                "give the original checkpoint; decompft quantizes it while loading (quantization.format)",
            )
        return _FLOATS[code]

    def rows(self, name: str, start: int, stop: int, *, transposed: bool = False) -> Tensor:
        part = self._where[name].get_slice(name)
        tensor: Tensor = part[:, start:stop].T if transposed else part[start:stop]
        return tensor


class RandomSource:
    """Weights that are a pure function of (seed, name, index), equal on every device.

    Uniform with the standard deviation of transformers' default init (0.02), by an integer hash:
    a normal would need transcendental functions, whose last bits differ between devices.
    """

    def __init__(self, seed: int, shapes: dict[str, tuple[int, ...]], device: torch.device) -> None:
        self._seed, self._shapes, self._device = seed, shapes, device

    def names(self) -> Iterable[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def rows(self, name: str, start: int, stop: int, *, transposed: bool = False) -> Tensor:
        shape = self._shapes[name]
        out: tuple[int, ...]
        if len(shape) == 1:  # norms start at 1, biases at 0
            return torch.full((stop - start,), 0.0 if name.endswith("bias") else 1.0)
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        key = int.from_bytes(digest[:8], "little", signed=True)
        if transposed:
            column = torch.arange(start, stop, dtype=torch.int64, device=self._device)
            row = torch.arange(shape[0], dtype=torch.int64, device=self._device) * shape[1]
            index, out = column[:, None] + row[None, :], (stop - start, shape[0])
        else:
            width = math.prod(shape[1:])
            index = torch.arange(start * width, stop * width, dtype=torch.int64, device=self._device)
            out = (stop - start, *shape[1:])
        return ((_uniform(index.reshape(-1), key) - 0.5) * (0.02 * math.sqrt(12))).view(out)


def _uniform(index: Tensor, key: int) -> Tensor:
    """int64 (n,) -> float32 (n,) in [0, 1): splitmix64's finaliser, 24 of its bits."""
    x = index.add_(key)
    for multiplier in (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):
        x.mul_(multiplier)
        x.bitwise_xor_((x >> 31) & 0x1FFFFFFFF)
    return ((x >> 40) & 0xFFFFFF).float().mul_(2.0**-24)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if (folder / SINGLE).is_file():  # what else lies there is another format of the same weights
        return [folder / SINGLE]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: not a weight index: {error}", "copy or download it again") from error
        missing = [n for n in names if not (folder / n).is_file()]
        if missing:
            raise ModelError(
                f"{folder}: shard {missing[0]} named by {INDEX} is missing",
                "copy or download the whole checkpoint again",
            )
        return [folder / n for n in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{folder}: no .safetensors file",
            "decompft reads safetensors only, never pickled .bin weights; convert the checkpoint first",
        )
    return files


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ModelError(
            f"{path}: not a whole safetensors file ({error})",
            "it was cut off or damaged while copying; copy or download it again",
        ) from error
