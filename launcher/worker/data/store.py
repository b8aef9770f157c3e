"""How a tokenized set lies on disk: flat files that are memory-mapped, written once by one process.

tokens.bin       int32, all documents one after the other
trained.bin      uint8, 1 where the token carries loss
segments.bin     uint8 token types, only for sets with pairs of texts
doc_offsets.npy  int64 (documents + 1), into the three above
row_docs.npy     int64 (documents), document indices row by row
row_offsets.npy  int64 (rows + 1), into row_docs
row_targets.npy  int64 (rows), targets that carry loss (1 a row for classification)
labels.npy       int64 (documents), only for classification
"""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import numpy as np

from decompft.launcher.worker.data.packing import pack
from decompft.launcher.worker.data.samples import Counts, Sample


class SetWriter:
    """Writes one set, source by source. Call `add`, `end_source` after each source, then `close`."""

    def __init__(self, folder: Path, *, sequence_length: int, packing: bool) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._sequence_length = sequence_length
        self._packing = packing
        self._tokens = open(folder / "tokens.bin", "wb")
        self._trained = open(folder / "trained.bin", "wb")
        self._segments = open(folder / "segments.bin", "wb")
        self._any_segments = False
        self._lengths = array("q")
        self._targets = array("q")
        self._trained_tokens = 0
        self._labels: list[int | str] = []
        self.label_places: dict[int | str, str] = {}  # label -> where it was seen first
        self._rows: list[list[int]] = []
        self._sources: list[dict[str, Any]] = []
        self._first_document = 0

    @property
    def source_documents(self) -> int:
        """Documents added since the last `end_source`."""
        return len(self._lengths) - self._first_document

    @property
    def has_documents(self) -> bool:
        """Whether anything was added at all."""
        return bool(self._lengths)

    def add(self, sample: Sample) -> None:
        """Append a document to the current source."""
        self._tokens.write(sample.tokens.tobytes())
        self._trained.write(sample.trained.astype(np.uint8).tobytes())
        segments = np.zeros(len(sample.tokens), np.uint8) if sample.segments is None else sample.segments
        self._segments.write(segments.astype(np.uint8).tobytes())
        self._any_segments |= sample.segments is not None
        self._lengths.append(len(sample.tokens))
        self._trained_tokens += int(sample.trained.sum())
        if sample.label is None:
            self._targets.append(int(sample.trained[1:].sum()))
        else:
            self._targets.append(1)
            self._labels.append(sample.label)
            self.label_places.setdefault(sample.label, sample.where)

    def end_source(self, name: str, counts: Counts) -> None:
        """Pack the source's documents into rows; sources never share a row, so weights stay exact."""
        lengths = self._lengths[self._first_document :]
        bins = pack(lengths, self._sequence_length) if self._packing else [[i] for i in range(len(lengths))]
        self._sources.append(
            {
                "name": name,
                "first_row": len(self._rows),
                "num_rows": len(bins),
                "num_records": counts.records,
                "num_documents": len(lengths),
                "num_tokens": sum(lengths),
                "num_dropped": counts.dropped,
                "num_truncated": counts.truncated,
            }
        )
        self._rows += [[self._first_document + i for i in documents] for documents in bins]
        self._first_document = len(self._lengths)

    def close(self, label_numbers: dict[int | str, int], label_names: list[str] | None) -> dict[str, Any]:
        """Write the indices; returns the set's entry of prepared.json, without its `dir`."""
        for file in (self._tokens, self._trained, self._segments):
            file.close()
        if not self._any_segments:
            (self._folder / "segments.bin").unlink()
        targets = np.asarray(self._targets, dtype=np.int64)
        row_targets = np.array([targets[documents].sum() for documents in self._rows], dtype=np.int64)
        self._save("doc_offsets", np.concatenate([[0], np.cumsum(np.asarray(self._lengths))]))
        self._save("row_docs", np.array([i for documents in self._rows for i in documents]))
        self._save("row_offsets", np.concatenate([[0], np.cumsum([len(d) for d in self._rows])]))
        self._save("row_targets", row_targets)
        if self._labels:
            self._save("labels", np.array([label_numbers[label] for label in self._labels]))
        tokens = sum(self._lengths)
        return {
            "num_rows": len(self._rows),
            "num_records": sum(s["num_records"] for s in self._sources),
            "num_documents": len(self._lengths),
            "num_tokens": tokens,
            "num_trained_tokens": self._trained_tokens,
            "num_targets": int(row_targets.sum()),
            "num_dropped": sum(s["num_dropped"] for s in self._sources),
            "num_truncated": sum(s["num_truncated"] for s in self._sources),
            "longest_document": max(self._lengths),
            "row_fill": tokens / (len(self._rows) * self._sequence_length),
            "label_names": label_names,
            "sources": self._sources,
        }

    def abandon(self) -> None:
        """Close the files of a set that will not be finished."""
        for file in (self._tokens, self._trained, self._segments):
            file.close()

    def _save(self, name: str, values: np.ndarray[Any, Any]) -> None:
        np.save(self._folder / f"{name}.npy", values.astype(np.int64), allow_pickle=False)
