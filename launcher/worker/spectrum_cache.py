"""Singular factors that were made once and need not be again: one file a matrix, under the hash of the matrix.

An entry is a safetensors file of tensors whose rows are directions: U (p, out), S (p,), V (p, in). Every
row has its sha256 beside it, and the table of these has one, so that few rows are read, and checked, without
the others. An entry has its final name only when it is whole; of two processes that write the same one, the
last wins, and both wrote the same. What is damaged is made again; a folder that cannot be used costs a
warning, not the run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from decompft.launcher.errors import ModelError
from decompft.launcher.places import cache_dir
from decompft.launcher.safetensors_header import Stored, read_header
from decompft.launcher.worker.tensorfile import DTYPE_NAMES, DTYPES, Entry, fsync_folder, write_tensors

logger = logging.getLogger(__name__)

_LAYOUT = 1  # raise it when adapters/spectra.py or this file would give other bytes: part of the key
_DIGEST = "sha256"  # uint8 (32,): of the key and of all tables
_TABLE = ".sha256"  # uint8 (rows, 32), one a tensor
_FORGOTTEN_S = 24 * 3600  # a temporary file of this age belongs to a start that was killed
_DTYPE_OF = {code: dtype for dtype, code in DTYPES.values()}


def spectra_dir() -> Path:
    return cache_dir() / "spectra"


def hash_of(weight: Tensor) -> str:
    """sha256 of a tensor's bytes, shape and dtype; without a copy where it lies on the host in one piece."""
    digest = hashlib.sha256(f"{DTYPE_NAMES[weight.dtype]} {list(weight.shape)}".encode())
    digest.update(_bytes_of(weight.detach()))
    return digest.hexdigest()


def rows_of(triplets: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """(U, S, V) as an entry holds them: U (k, out), S (k,), V (k, in)."""
    U, S, V = triplets
    return {"U": U.T, "S": S, "V": V.T}


class SpectrumCache:
    """Factors by (weight, kind, k), in a folder; None for no folder: everything is made."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.num_hits = 0
        self.num_made = 0
        self.num_damaged = 0
        self.seconds_making = 0.0
        self.warning = ""  # why nothing is kept any more; "" while all is well

    def get(
        self, weight: Tensor, *, kind: str, k: int, make: Callable[[Tensor], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The factors of a full-precision weight, on its device; made and kept where they are not here.

        Args:
            kind: what they are: "top", "bottom", "full", ...; with k, everything besides the weight that
                `make` depends on.
            make: the weight to tensors whose first dimension counts directions.
        """
        key = None if self.folder is None else _key(hash_of(weight), kind, k)
        if key is not None and (found := self._read(key, None)) is not None:
            self.num_hits += 1
            return {name: tensor.to(weight.device) for name, tensor in found.items()}
        begin = time.perf_counter()
        made = {name: tensor.detach().contiguous() for name, tensor in make(weight).items()}
        if weight.is_cuda:
            torch.cuda.synchronize(weight.device)
        self.seconds_making += time.perf_counter() - begin
        self.num_made += 1
        if key is not None and not self.warning:
            self._write(key, made)
        return made

    def get_rows(
        self, weight_hash: str, *, kind: str, k: int, indices: Sequence[int] | None = None
    ) -> dict[str, Tensor] | None:
        """Rows `indices` of every tensor of an entry (None: all rows), on the host; no others are read.

        None if the entry is not here, or is damaged: then `get`, with the weight, makes it again.

        Args:
            weight_hash: `hash_of` the weight, which need not be in memory any more.
        """
        found = self._read(_key(weight_hash, kind, k), indices)
        self.num_hits += found is not None
        return found

    def _read(self, key: str, indices: Sequence[int] | None) -> dict[str, Tensor] | None:
        if self.folder is None:
            return None
        path = self.folder / f"{key}.safetensors"
        try:
            if not path.exists():
                return None
            return _Opened(path, key).rows(indices)
        # RuntimeError: torch refuses a view; ModelError: the header's reader
        except (OSError, ValueError, KeyError, RuntimeError, ModelError) as error:
            logger.warning("%s: damaged, made again: %s", path, error)
            self.num_damaged += 1
            return None

    def _write(self, key: str, made: Mapping[str, Tensor]) -> None:
        assert self.folder is not None
        temporary = self.folder / f".{os.getpid()}-{uuid.uuid4().hex}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _remove_forgotten(self.folder)
            tensors = _with_digests(key, {name: tensor.cpu() for name, tensor in made.items()})
            write_tensors(temporary, [_entry(name, tensor) for name, tensor in tensors.items()])
            os.rename(temporary, self.folder / f"{key}.safetensors")
            fsync_folder(self.folder)
        except OSError as error:
            self.warning = (
                f"singular factors are not cached: {self.folder}: {error.strerror or error}; "
                "DECOMPFT_CACHE names another folder"
            )
            logger.warning("%s", self.warning)
        finally:
            try:
                temporary.unlink(missing_ok=True)
            except OSError:
                pass


@dataclass(frozen=True, kw_only=True, slots=True)
class _Table:
    """A tensor of an entry and the hashes of its rows."""

    stored: Stored
    hashes: Tensor  # uint8 (rows, 32)


class _Opened:
    """An entry whose tables are checked; its rows are when they are read.

    Raises:
        ValueError, KeyError, OSError, ModelError: damaged, or of another key.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        stored = read_header(path)
        with path.open("rb", buffering=0) as file:
            digest = _read_all(file, stored.pop(_DIGEST))
            hashes = {
                n: _read_all(file, stored.pop(n + _TABLE)) for n in sorted(stored) if n + _TABLE in stored
            }
        self._tables = {
            name: _Table(stored=place, hashes=hashes[name].view(-1, 32)) for name, place in stored.items()
        }
        shapes = {n: (_DTYPE_OF[t.stored.dtype], t.stored.shape) for n, t in self._tables.items()}
        if bytes(digest.numpy().data) != _digest(key, shapes, {n: t.hashes for n, t in self._tables.items()}):
            raise ValueError("its tables are damaged or belong to another entry")

    def rows(self, indices: Sequence[int] | None) -> dict[str, Tensor]:
        """Raises ValueError if a row is damaged, IndexError if there is none of that index."""
        with self._path.open("rb", buffering=0) as file:
            return {name: _read_rows(file, table, indices) for name, table in self._tables.items()}


def _read_rows(file: BinaryIO, table: _Table, indices: Sequence[int] | None) -> Tensor:
    stored = table.stored
    num_rows, *rest = stored.shape
    dtype = _DTYPE_OF[stored.dtype]
    width = math.prod(rest) * dtype.itemsize
    wanted = range(num_rows) if indices is None else indices
    out = torch.empty((len(wanted), *rest), dtype=dtype)
    data = _bytes_of(out)
    if indices is None:
        _fill(file, stored.start, data)
    for place, row in enumerate(wanted):
        if not 0 <= row < num_rows:
            raise IndexError(f"{file.name}: row {row} of {num_rows}")
        cut = data[place * width : (place + 1) * width]
        if indices is not None:
            _fill(file, stored.start + row * width, cut)
        if hashlib.sha256(cut).digest() != bytes(table.hashes[row].numpy().data):
            raise ValueError(f"row {row} is damaged")
    return out


def _read_all(file: BinaryIO, stored: Stored) -> Tensor:
    out = torch.empty(stored.num_bytes, dtype=torch.uint8)
    _fill(file, stored.start, out.numpy().data)
    return out


def _fill(file: BinaryIO, offset: int, into: memoryview) -> None:
    while into:
        got = os.preadv(file.fileno(), [into], offset)
        if got == 0:
            raise ValueError("cut off")
        into, offset = into[got:], offset + got


def _key(weight_hash: str, kind: str, k: int) -> str:
    return hashlib.sha256(json.dumps([_LAYOUT, weight_hash, kind, k]).encode()).hexdigest()


def _with_digests(key: str, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    hashes = {name: _row_hashes(tensor) for name, tensor in made.items()}
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in made.items()}
    tables = {name + _TABLE: table for name, table in hashes.items()}
    digest = torch.frombuffer(bytearray(_digest(key, shapes, hashes)), dtype=torch.uint8)
    return {**made, **tables, _DIGEST: digest}


def _row_hashes(tensor: Tensor) -> Tensor:
    data, num_rows = _bytes_of(tensor), tensor.shape[0]
    width = len(data) // num_rows
    hashes = b"".join(
        hashlib.sha256(data[row * width : (row + 1) * width]).digest() for row in range(num_rows)
    )
    return torch.frombuffer(bytearray(hashes), dtype=torch.uint8).view(num_rows, 32)


def _digest(
    key: str, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], hashes: Mapping[str, Tensor]
) -> bytes:
    digest = hashlib.sha256(key.encode())
    for name in sorted(shapes):
        dtype, shape = shapes[name]
        digest.update(json.dumps([name, DTYPE_NAMES[dtype], shape]).encode())
        digest.update(_bytes_of(hashes[name]))
    return digest.digest()


def _entry(name: str, tensor: Tensor) -> Entry:
    return Entry(key=name, shape=tuple(tensor.shape), dtype=tensor.dtype, read=lambda: tensor)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _remove_forgotten(folder: Path) -> None:
    for path in folder.glob(".*.tmp"):
        try:
            if time.time() - path.stat().st_mtime > _FORGOTTEN_S:
                path.unlink()
        except OSError:
            continue
