"""What a training row is, and how rows are read back from a prepared set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from decompft.launcher.errors import DataError
from decompft.launcher.worker.data.encode import Mask, Tokens

_BLOCK_TOKENS = 1 << 22  # looked at at once


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Row:
    """One row of a batch: one document, or several that must not see each other."""

    id: int  # index in its set; of a stream, its position
    tokens: Tokens  # (T,)
    trained: Mask  # (T,) the token carries loss, when it is a target
    doc_lengths: tuple[int, ...]  # sum T
    segments: Tokens | None = None  # (T,) token types of a pair of texts
    label: int | None = None

    @property
    def num_targets(self) -> int:
        """Targets that carry loss: trained tokens but the first of each document; 1 for a label."""
        if self.label is not None:
            return 1
        firsts = np.cumsum((0, *self.doc_lengths[:-1]))
        return int(self.trained.sum()) - int(self.trained[firsts].sum())


class RowSet:
    """A prepared set, memory-mapped (layout: store.py)."""

    def __init__(self, entry: dict[str, Any]) -> None:
        folder = Path(entry["dir"])
        self.source_rows = [int(source["num_rows"]) for source in entry["sources"]]
        try:
            self._tokens = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r")
            self._trained = np.memmap(folder / "trained.bin", dtype=np.uint8, mode="r")
            paired = (folder / "segments.bin").is_file()
            self._segments = np.memmap(folder / "segments.bin", dtype=np.uint8, mode="r") if paired else None
            self._doc_offsets = _load(folder / "doc_offsets.npy")
            self._row_docs = _load(folder / "row_docs.npy")
            self._row_offsets = _load(folder / "row_offsets.npy")
            self.row_targets = _load(folder / "row_targets.npy")
            labelled = (folder / "labels.npy").is_file()
            self._labels = _load(folder / "labels.npy") if labelled else None
        except (OSError, ValueError) as error:
            raise DataError(
                f"{folder}: the tokenized data cannot be read: {error}",
                "run the launch again; a damaged cache is noticed and rebuilt",
            ) from error
        if int(self._doc_offsets[-1]) != len(self._tokens) or len(self) != entry["num_rows"]:
            raise DataError(
                f"{folder}: the tokenized data does not fit its index", "run the launch again to rebuild it"
            )

    def __len__(self) -> int:
        return len(self._row_offsets) - 1

    def num_trained(self, index: int) -> int:
        """Targets of a row that carry loss, without reading the row."""
        return int(self.row_targets[index])

    def seen(self, ids: Sequence[int]) -> set[int]:
        """Those of some token ids that stand anywhere in the set."""
        found: set[int] = set()
        for start in range(0, len(self._tokens), _BLOCK_TOKENS):
            block = self._tokens[start : start + _BLOCK_TOKENS]
            found |= set(block[np.isin(block, ids)].tolist())
            if len(found) == len(ids):
                break
        return found

    def row(self, index: int) -> Row:
        """Row `index`, its documents joined in order."""
        documents = self._row_docs[self._row_offsets[index] : self._row_offsets[index + 1]]
        pieces = [slice(self._doc_offsets[d], self._doc_offsets[d + 1]) for d in documents]
        return Row(
            id=index,
            tokens=np.concatenate([self._tokens[piece] for piece in pieces]),
            trained=np.concatenate([self._trained[piece] for piece in pieces]).astype(np.bool_),
            doc_lengths=tuple(int(piece.stop - piece.start) for piece in pieces),
            segments=None
            if self._segments is None
            else np.concatenate([self._segments[piece] for piece in pieces]).astype(np.int32),
            label=None if self._labels is None else int(self._labels[documents[0]]),
        )


def open_rows(entry: dict[str, Any]) -> RowSet:
    """The rows of the "train" or "eval" entry of prepared.json."""
    return RowSet(entry)


def _load(path: Path) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.load(path, mmap_mode="r", allow_pickle=False)
