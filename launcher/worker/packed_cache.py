"""Rows that were quantized once and need not be again: kept on disk, free of any mesh, each piece under its hash.

A folder a base and format holds files of any number of ranks, runs and meshes; a reader takes their
union. What is missing, damaged or of another checkpoint is read from the source again and written anew.
A file has its final name only when it is whole, and that name is the hash of its index.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from decompft.adapters.formats import FORMAT_SPECS
from decompft.launcher.places import cache_dir
from decompft.launcher.recipe import QuantizationSection
from decompft.launcher.worker.engines.base import full_shape
from decompft.launcher.worker.packed_file import LAYOUT, PackedFile, Piece, Writer
from decompft.launcher.worker.tensors import SafetensorsSource, bytes_of

logger = logging.getLogger(__name__)

_SAMPLE_BYTES = 1024  # of the middle of a tensor


def packed_cache_dir(base_hash: str, quantization: QuantizationSection) -> Path | None:
    """The folder of a base in a format; None where nothing is cached.

    Args:
        base_hash: `modelfiles.identity`'s sha256.
    """
    spec = FORMAT_SPECS[quantization.format]
    if not quantization.cache or not spec.is_quantized:
        return None
    blocks = [quantization.block_size, quantization.double_quant] if spec.has_blocks else []
    key = hashlib.sha256(json.dumps([LAYOUT, base_hash, spec.name, blocks]).encode()).hexdigest()
    return cache_dir() / "packed" / f"{base_hash[:12]}-{spec.name}-{key[:12]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Held:
    piece: Piece
    file: PackedFile


class PackedCache:
    """The cached rows of one base in one format, as one rank sees them.

    Args:
        source: of the same base. 1 KiB of each tensor is compared with what the cache was made of: the
            folder's hash covers the ends of the checkpoint's files alone.
        writes: whether this rank keeps what it packs.
    """

    def __init__(self, folder: Path, source: SafetensorsSource, *, writes: bool) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._source = source
        self._samples: dict[str, str] = {}
        self._lock = threading.Lock()
        self._held: dict[str, list[_Held]] = {}
        for file in PackedFile.all_of(folder):
            for piece in file.pieces:
                self._held.setdefault(piece.name, []).append(_Held(piece=piece, file=file))
        self._writer = Writer(folder) if writes else None

    def find(
        self, name: str, storage: tuple[Tensor, ...], first: int, last: int, *, buffer: Tensor | None
    ) -> tuple[Tensor, ...] | None:
        """Rows [first, last) of every storage tensor, checked by hash; None if they are not all here.

        Args:
            storage: tensors with the dtypes and the shapes (but for rows) that are asked for.
            buffer: bytes on the host that the result may lie in.
        """
        shapes = [full_shape(t)[1:] for t in storage]
        widths = [math.prod(s) * t.dtype.itemsize for s, t in zip(shapes, storage, strict=True)]
        rows = last - first
        while chosen := self._cover(name, first, last):
            out = bytes_of(buffer, rows * sum(widths))
            parts = _parts(out, rows, widths)
            for held in chosen:
                piece = held.piece
                is_exact = (piece.first, piece.num_rows) == (first, rows)
                raw = out if is_exact else torch.empty(piece.num_rows * sum(widths), dtype=torch.uint8)
                if not held.file.read(piece, raw):
                    logger.warning("%s: %s rows %d: damaged", held.file.path, name, piece.first)
                    with self._lock:
                        self._held[name] = [h for h in self._held[name] if h is not held]
                    break
                with self._lock:
                    self.bytes_read += piece.num_bytes
                if not is_exact:
                    low, high = max(first, piece.first), min(last, piece.first + piece.num_rows)
                    for whole, part in zip(_parts(raw, piece.num_rows, widths), parts, strict=True):
                        part[low - first : high - first] = whole[low - piece.first : high - piece.first]
            else:
                return tuple(
                    part.view(-1).view(tensor.dtype).view(rows, *shape)
                    for part, tensor, shape in zip(parts, storage, shapes, strict=True)
                )
        return None

    def add(self, name: str, first: int, values: tuple[Tensor, ...]) -> None:
        """Keep packed rows; returns while they are being hashed and written, waits when too many are."""
        if self._writer is not None:
            self._writer.add(name, first, values, self._sample(name))

    def finish(self) -> None:
        """Wait until all that was added is on disk under its final name."""
        if self._writer is not None:
            self._writer.finish()

    def abandon(self) -> None:
        """Leave nothing of what was added."""
        if self._writer is not None:
            self._writer.abandon()

    @property
    def bytes_written(self) -> int:
        return 0 if self._writer is None else self._writer.bytes_written

    @property
    def warning(self) -> str:
        """Why nothing was kept, or ""."""
        return "" if self._writer is None else self._writer.warning

    def _cover(self, name: str, first: int, last: int) -> list[_Held]:
        """Pieces that together hold the rows, newer files before older; empty if there are none."""
        with self._lock:
            held = list(self._held.get(name, ()))
        if not held:
            return []
        sample = self._sample(name)
        held = [h for h in held if h.file.samples.get(name) == sample]
        chosen: list[_Held] = []
        while first < last:
            at = [h for h in held if h.piece.first <= first < h.piece.first + h.piece.num_rows]
            if not at:
                return []
            chosen.append(at[0])
            first = at[0].piece.first + at[0].piece.num_rows
        return chosen

    def _sample(self, name: str) -> str:
        with self._lock:
            if name not in self._samples:
                stored = self._source.stored(name)
                taken = torch.empty(min(_SAMPLE_BYTES, stored.num_bytes), dtype=torch.uint8)
                self._source.read(name, (stored.num_bytes - taken.numel()) // 2, taken)
                self._samples[name] = hashlib.sha256(taken.numpy().data).hexdigest()[:16]
            return self._samples[name]


def _parts(raw: Tensor, rows: int, widths: list[int]) -> list[Tensor]:
    """Bytes -> (rows, width) a storage tensor."""
    return [part.view(rows, -1) for part in raw.split([rows * w for w in widths])]
