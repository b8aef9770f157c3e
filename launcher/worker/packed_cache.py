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

_SAMPLE_BYTES = 1024  # of the weight, from the middle of what a piece holds


def packed_cache_dir(
    base_hash: str, quantization: QuantizationSection, source: SafetensorsSource, *, packed_on: str
) -> Path | None:
    """The folder of a base in a format; None where nothing is cached.

    Weights that were replaced have another: the hash covers the ends of files alone, so size and time of
    each file count, too.

    Args:
        base_hash: `modelfiles.identity`'s sha256.
        packed_on: "cuda" or "cpu": bitsandbytes' 4-bit kernels round near a boundary differently there, and
            a run on one must not depend on whether another was here before.
    """
    spec = FORMAT_SPECS[quantization.format]
    if not quantization.cache or not spec.is_quantized:
        return None
    blocks = [quantization.block_size, quantization.double_quant] if spec.has_blocks else []
    # of what a link leads to: the hub's cache keeps links
    stats = {path.name: path.stat() for path in {source.stored(n).path for n in source.names()}}
    files = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in sorted(stats.items())]
    key = hashlib.sha256(
        json.dumps([LAYOUT, base_hash, files, spec.name, blocks, packed_on]).encode()
    ).hexdigest()
    return cache_dir() / "packed" / f"{base_hash[:12]}-{spec.name}-{key[:12]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Held:
    piece: Piece
    file: PackedFile


class PackedCache:
    """The cached rows of one base in one format, as one rank sees them.

    Args:
        source: of the same base. 1 KiB a piece is compared with what the cache was made of: a file may be
            replaced by one of the same size, ends and time.
        writes: whether this rank keeps what it packs.
    """

    def __init__(self, folder: Path, source: SafetensorsSource, *, writes: bool) -> None:
        self.folder = folder
        self.bytes_read = 0
        self.num_damaged = 0  # pieces
        self._source = source
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
        while chosen := self._cover(name, full_shape(storage[0])[0], first, last):
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
                        self.num_damaged += 1
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

    def add(self, name: str, storage: tuple[Tensor, ...], first: int, values: tuple[Tensor, ...]) -> None:
        """Keep packed rows; returns while they are being hashed and written, waits when too many are.

        Args:
            storage: as `find`.
        """
        if self._writer is not None and not self._writer.warning:
            last = first + values[0].shape[0]
            sample = self._sample(name, full_shape(storage[0])[0], first, last)
            self._writer.add(name, first, values, sample)

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

    def _cover(self, name: str, of: int, first: int, last: int) -> list[_Held]:
        """Pieces that together hold the rows, newer files before older; empty if there are none.

        Args:
            of: rows of the whole weight.
        """
        with self._lock:
            held = list(self._held.get(name, ()))
        chosen: list[_Held] = []
        while first < last:
            at = (
                h
                for h in held
                if h.piece.first <= first < h.piece.first + h.piece.num_rows
                and h.piece.sample == self._sample(name, of, h.piece.first, h.piece.first + h.piece.num_rows)
            )
            found = next(at, None)
            if found is None:
                return []
            chosen.append(found)
            first = found.piece.first + found.piece.num_rows
        return chosen

    def _sample(self, name: str, of: int, first: int, last: int) -> str:
        """Hash of bytes of the weight near the middle of rows [first, last), wherever a transposed one has them."""
        num_bytes = self._source.stored(name).num_bytes
        taken = torch.empty(min(_SAMPLE_BYTES, num_bytes), dtype=torch.uint8)
        middle = num_bytes * (first + last) // (2 * of)
        start = min(max(0, middle - taken.numel() // 2), num_bytes - taken.numel())
        self._source.read(name, start, taken)
        return hashlib.sha256(taken.numpy().data).hexdigest()[:16]


def _parts(raw: Tensor, rows: int, widths: list[int]) -> list[Tensor]:
    """Bytes -> (rows, width) a storage tensor."""
    return [part.view(rows, -1) for part in raw.split([rows * w for w in widths])]
