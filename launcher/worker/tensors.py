"""Where the base's tensors come from: rows of safetensors files, or of nothing but (seed, name)."""

from __future__ import annotations

import math
import os
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from decompft.adapters.frozen.base import FrozenLinear
from decompft.adapters.hashed import key_of, uniform
from decompft.launcher.errors import ModelError
from decompft.launcher.safetensors_header import INDEX as INDEX
from decompft.launcher.safetensors_header import Stored, read_headers
from decompft.launcher.worker.tensorfile import DTYPES

_FLOATS = {code: dtype for dtype, code in DTYPES.values() if dtype.is_floating_point}


class TensorSource(Protocol):
    """Any rows of any tensor of a checkpoint."""

    is_file: bool  # reading waits for a medium: several threads may read at once, each its own rows

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype:
        """Raises ModelError if it is no floating-point tensor of at least 16 bits."""
        ...

    def is_packed(self, name: str) -> bool:
        """Whether `packed` gives it in a frozen format, as it is stored."""
        ...

    def rows(
        self, name: str, start: int, stop: int, *, transposed: bool = False, buffer: Tensor | None = None
    ) -> Tensor:
        """Rows [start, stop) of dimension 0; of the transposed matrix if `transposed`.

        Args:
            buffer: bytes on the host that the result may lie in.
        """
        ...

    def packed(
        self, name: str, layer: FrozenLinear, start: int, stop: int, *, buffer: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Storage tensors of rows [start, stop) of a tensor that `is_packed`."""
        ...


class SafetensorsSource:
    """A folder of safetensors files, with or without an index. Only the rows asked for are read.

    `bytes_read` counts them, a tensor. Read with pread, not mapped: threads then wait for the medium
    apart from each other, and nothing is copied that is not asked for.

    Raises:
        ModelError: a file is missing, cut off or is not safetensors.
    """

    is_file = True

    def __init__(self, folder: Path) -> None:
        self._stored = read_headers(folder)
        self._files = {s.path: s.path.open("rb", buffering=0) for s in self._stored.values()}
        self.bytes_read: Counter[str] = Counter()
        self._counting = threading.Lock()

    def names(self) -> Iterable[str]:
        return self._stored.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        code = self._stored[name].dtype
        if code not in _FLOATS:
            raise ModelError(
                f"{name} is stored as {code}: this checkpoint is quantized already, in a way that decompft does "
                "not read",
                "give the original checkpoint; decompft quantizes it while loading (quantization.format)",
            )
        return _FLOATS[code]

    def is_packed(self, name: str) -> bool:
        return False

    def rows(
        self, name: str, start: int, stop: int, *, transposed: bool = False, buffer: Tensor | None = None
    ) -> Tensor:
        stored, dtype = self._stored[name], self.dtype(name)
        if transposed:
            height, width = stored.shape
            cut = bytes_of(buffer, height * (stop - start) * dtype.itemsize)
            length = (stop - start) * dtype.itemsize
            for row in range(height):
                self.read(
                    name, (row * width + start) * dtype.itemsize, cut[row * length : (row + 1) * length]
                )
            return cut.view(dtype).view(height, stop - start).T
        width = math.prod(stored.shape[1:]) * dtype.itemsize
        cut = bytes_of(buffer, (stop - start) * width)
        self.read(name, start * width, cut)
        return cut.view(dtype).view(stop - start, *stored.shape[1:])

    def packed(
        self, name: str, layer: FrozenLinear, start: int, stop: int, *, buffer: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        raise NotImplementedError  # never asked: is_packed says no

    def stored(self, name: str) -> Stored:
        return self._stored[name]

    def read(self, name: str, offset: int, into: Tensor) -> None:
        """Fill `into` (uint8) with a tensor's bytes from `offset` on."""
        stored = self._stored[name]
        file, place = self._files[stored.path], stored.start + offset
        rest = into.numpy().data
        try:
            while rest:
                got = os.preadv(file.fileno(), [rest], place)
                if got == 0:
                    raise ModelError(
                        f"{stored.path}: became shorter while it was read", "copy or fetch the file again"
                    )
                rest, place = rest[got:], place + got
        except OSError as error:
            raise ModelError(f"{stored.path}: cannot be read: {error.strerror}") from error
        with self._counting:
            self.bytes_read[name] += into.numel()


def bytes_of(buffer: Tensor | None, num_bytes: int) -> Tensor:
    """uint8 (num_bytes,) in `buffer` if it is large enough, else in new memory."""
    if buffer is None or buffer.numel() < num_bytes:
        return torch.empty(num_bytes, dtype=torch.uint8)
    return buffer[:num_bytes]


class RandomSource:
    """Weights that are a pure function of (seed, name, index), equal on every device.

    Uniform with the standard deviation of transformers' default init (0.02), by an integer hash:
    a normal would need transcendental functions, whose last bits differ between devices.
    """

    is_file = False

    def __init__(self, seed: int, shapes: dict[str, tuple[int, ...]], device: torch.device) -> None:
        self._seed, self._shapes, self._device = seed, shapes, device

    def names(self) -> Iterable[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def is_packed(self, name: str) -> bool:
        return False

    def packed(
        self, name: str, layer: FrozenLinear, start: int, stop: int, *, buffer: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        raise NotImplementedError  # never asked: is_packed says no

    def rows(
        self, name: str, start: int, stop: int, *, transposed: bool = False, buffer: Tensor | None = None
    ) -> Tensor:
        shape = self._shapes[name]
        out: tuple[int, ...]
        if len(shape) == 1:  # norms start at 1, biases at 0
            return torch.full((stop - start,), 0.0 if name.endswith("bias") else 1.0)
        key = key_of(f"{self._seed}:{name}")
        if transposed:
            column = torch.arange(start, stop, dtype=torch.int64, device=self._device)
            row = torch.arange(shape[0], dtype=torch.int64, device=self._device) * shape[1]
            index, out = column[:, None] + row[None, :], (stop - start, shape[0])
        else:
            width = math.prod(shape[1:])
            index = torch.arange(start * width, stop * width, dtype=torch.int64, device=self._device)
            out = (stop - start, *shape[1:])
        return ((uniform(index.reshape(-1), key) - 0.5) * (0.02 * math.sqrt(12))).view(out)
