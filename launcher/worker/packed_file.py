"""One file of the cache of packed rows: pieces, an index behind them, and the thread that writes it.

    piece | piece | ... | index (JSON) | its length (8 bytes) | magic (8 bytes)

A piece holds the rows of all storage tensors of a weight, tensor after tensor. The file's name is the
sha256 of its index, which holds the sha256 of each piece: a flipped byte anywhere is noticed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from decompft.launcher.worker.tensorfile import fsync_folder

logger = logging.getLogger(__name__)

LAYOUT = 2  # raise it when the same rows would be stored as other bytes: part of the cache's key
SUFFIX = ".packed"
_MAGIC = b"dcftpack"
_MOST_PENDING = 4  # pieces that wait for the disk, of a few MiB each
_SYNC_BYTES = 256 << 20  # written between two syncs, so that the last one is short
_FORGOTTEN_S = 24 * 3600  # a temporary file of this age belongs to a start that was killed


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Packed rows [first, first + num_rows) of one weight."""

    name: str  # as the checkpoint names it
    first: int
    num_rows: int
    offset: int  # bytes from the beginning of the file
    num_bytes: int
    sha256: str
    sample: str  # of the weight it was made of


class PackedFile:
    """A whole file, open for reading by any thread.

    Raises:
        ValueError, OSError: it is not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        size = os.fstat(self._file.fileno()).st_size
        tail = os.pread(self._file.fileno(), 16, max(0, size - 16))
        length = int.from_bytes(tail[:8], "little")
        if tail[8:] != _MAGIC or length > size - 16:
            raise ValueError("cut off")
        text = os.pread(self._file.fileno(), length, size - 16 - length)
        if _name_of(text) != path.name:
            raise ValueError("its index is damaged")
        index = json.loads(text)
        self.pieces = [
            Piece(
                name=n,
                first=first,
                num_rows=rows,
                offset=offset,
                num_bytes=size,
                sha256=digest,
                sample=sample,
            )  # fmt: skip
            for n, first, rows, offset, size, digest, sample in index["pieces"]
        ]

    @classmethod
    def all_of(cls, folder: Path) -> Iterator[PackedFile]:
        """The whole files of a folder, newest first; others are passed over."""
        try:
            paths = sorted(folder.glob(f"*{SUFFIX}"), key=lambda p: p.stat().st_mtime_ns, reverse=True)
        except OSError:  # one was replaced between listing and looking
            paths = list(folder.glob(f"*{SUFFIX}"))
        for path in paths:
            try:
                yield cls(path)
            except (ValueError, OSError):
                continue

    def read(self, piece: Piece, into: Tensor) -> bool:
        """Fill `into` (uint8) with a piece; False if it is damaged or does not fit."""
        if piece.num_bytes != into.numel():
            return False
        rest, place = into.numpy().data, piece.offset
        try:
            while rest:
                got = os.preadv(self._file.fileno(), [rest], place)
                if got == 0:
                    return False
                rest, place = rest[got:], place + got
        except OSError:
            return False
        return hashlib.sha256(into.numpy().data).hexdigest() == piece.sha256


class Writer:
    """Writes pieces in a thread of its own; a disk that refuses ends the writing, never the run."""

    def __init__(self, folder: Path) -> None:
        self.bytes_written = 0  # under the final name
        self.warning = ""
        self._folder = folder
        self._queue: queue.Queue[tuple[str, int, list[Tensor], str] | None] = queue.Queue(
            maxsize=_MOST_PENDING
        )
        self._is_wanted = True
        self._thread: threading.Thread | None = None

    def add(self, name: str, first: int, values: tuple[Tensor, ...], sample: str) -> None:
        if self.warning:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="cache", daemon=True)
            self._thread.start()
        self._queue.put((name, first, [v.detach().to("cpu").contiguous() for v in values], sample))

    def finish(self) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def abandon(self) -> None:
        self._is_wanted = False
        self.finish()

    def _run(self) -> None:
        temporary = self._folder / f".{os.getpid()}-{uuid.uuid4().hex}.tmp"
        more = True
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remove_forgotten()
            with temporary.open("wb") as file:
                pieces = []
                while (item := self._queue.get()) is not None:
                    if self._is_wanted:
                        pieces.append(_append(file, *item))
                more = False
                if self._is_wanted:
                    self._commit(file, temporary, pieces)
        except Exception as error:  # whatever it is: without this thread, the load would wait for ever
            reason = error.strerror if isinstance(error, OSError) else None
            if not isinstance(error, OSError):
                logger.warning("%s: a defect in writing the cache", self._folder, exc_info=True)
            self.warning = (
                f"quantized rows are not cached: {self._folder}: {reason or error or type(error).__name__}; "
                "DECOMPFT_CACHE names another folder, quantization.cache: false asks for none"
            )
            while more and self._queue.get() is not None:
                pass  # the load must not wait for a place in the queue
        finally:
            try:
                temporary.unlink(missing_ok=True)
            except OSError:
                pass

    def _commit(self, file: BinaryIO, temporary: Path, pieces: list[Piece]) -> None:
        rows = [[p.name, p.first, p.num_rows, p.offset, p.num_bytes, p.sha256, p.sample] for p in pieces]
        text = json.dumps({"layout": LAYOUT, "pieces": rows}, sort_keys=True).encode()
        file.write(text + len(text).to_bytes(8, "little") + _MAGIC)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
        os.rename(temporary, self._folder / _name_of(text))
        fsync_folder(self._folder)
        self.bytes_written = size

    def _remove_forgotten(self) -> None:
        for path in self._folder.glob(".*.tmp"):
            try:
                if time.time() - path.stat().st_mtime > _FORGOTTEN_S:
                    path.unlink()
            except OSError:
                continue


def _append(file: BinaryIO, name: str, first: int, values: list[Tensor], sample: str) -> Piece:
    start, digest = file.tell(), hashlib.sha256()
    for value in values:
        data = value.view(-1).view(torch.uint8).numpy().data
        digest.update(data)
        file.write(data)
    end = file.tell()
    if end // _SYNC_BYTES != start // _SYNC_BYTES:
        file.flush()
        os.fdatasync(file.fileno())
    return Piece(
        name=name, first=first, num_rows=values[0].shape[0], offset=start, num_bytes=end - start,
        sha256=digest.hexdigest(), sample=sample,
    )  # fmt: skip


def _name_of(index: bytes) -> str:
    return hashlib.sha256(index).hexdigest()[:32] + SUFFIX
