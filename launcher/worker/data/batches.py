"""How rows become the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch

from decompft.launcher.worker.data.documents import Documents
from decompft.launcher.worker.data.rows import Row

IGNORE = -100  # a target without loss

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One micro batch of int64 tensors. T is a multiple of collate's pad_multiple."""

    input_ids: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T): already shifted, -100 without loss; all -100 where there are labels
    # (num_targets,) places of the targets with loss in targets.reshape(-1); None: all are looked at, -100 counts 0
    target_index: torch.Tensor | None
    position_ids: torch.Tensor | None  # (B, T), from 0 in each document; None when each row is one document
    num_tokens: int  # without padding
    num_targets: int  # targets with loss; rows with a label for classification
    attention_mask: torch.Tensor | None = None  # (B, T), with labels only
    token_type_ids: torch.Tensor | None = None  # (B, T), only for pairs of texts
    labels: torch.Tensor | None = None  # (B,), -100 for a dummy row; classification only
    documents: Documents | None = (
        None  # those of position_ids; without them each row is one, padding included
    )

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        moved: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Documents):
                value = value.to(device)
            moved[item.name] = value.to(device, non_blocking=True) if torch.is_tensor(value) else value
        return type(self)(**moved)


def collate(rows: Sequence[Row | None], pad_id: int, pad_multiple: int = 8) -> Batch:
    """Rows side by side, padded at the right; None gives a dummy row without targets.

    Language rows need no attention mask: padding lies after all that is read, and where positions are given
    it is a document of its own. The target at t is token t + 1 if that is trained and of the same document.
    A batch of dummies alone has labels (all -100) and a mask besides, so that it serves either task.
    """
    real = [row for row in rows if row is not None]
    longest = max((len(row.tokens) for row in real), default=1)
    shape = (len(rows), -(-longest // pad_multiple) * pad_multiple)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    targets = np.full(shape, IGNORE, dtype=np.int64)
    positions = np.tile(np.arange(shape[1]), (shape[0], 1))
    for place, row in enumerate(rows):
        if row is None:
            continue
        size = len(row.tokens)
        input_ids[place, :size] = row.tokens
        targets[place, :size] = _row_targets(row)
        positions[place] = np.concatenate([np.arange(n) for n in (*row.doc_lengths, shape[1] - size)])
    packed = any(len(row.doc_lengths) > 1 for row in real)
    ends = [() if row is None else row.doc_lengths for row in rows] if packed else [()] * len(rows)
    documents = Documents.of([(*lengths, shape[1] - sum(lengths)) for lengths in ends])
    labels = mask = types = None
    if all(row.label is not None for row in real):
        labels = np.array([IGNORE if row is None else row.label for row in rows], dtype=np.int64)
        # a dummy row keeps one visible token: attention over nothing is NaN
        sizes = np.array([1 if row is None else len(row.tokens) for row in rows])
        mask = (np.arange(shape[1]) < sizes[:, None]).astype(np.int64)
        types = _segments(rows, shape)
    target_index = np.flatnonzero(targets != IGNORE)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        targets=torch.from_numpy(targets),
        target_index=torch.from_numpy(target_index),
        position_ids=torch.from_numpy(positions) if packed else None,
        num_tokens=sum(len(row.tokens) for row in real),
        num_targets=sum(row.num_targets for row in real),
        attention_mask=_tensor(mask),
        token_type_ids=_tensor(types),
        labels=_tensor(labels),
        documents=documents,
    )


def _row_targets(row: Row) -> Ints:
    targets = np.full(len(row.tokens), IGNORE, dtype=np.int64)
    targets[:-1] = np.where(row.trained[1:], row.tokens[1:], IGNORE)
    targets[np.cumsum(row.doc_lengths) - 1] = IGNORE  # what follows a document's last token is not its own
    return targets


def _segments(rows: Sequence[Row | None], shape: tuple[int, int]) -> Ints | None:
    if not any(row is not None and row.segments is not None for row in rows):
        return None
    types = np.zeros(shape, dtype=np.int64)
    for place, row in enumerate(rows):
        if row is not None and row.segments is not None:
            types[place, : len(row.segments)] = row.segments
    return types


def _tensor(values: Ints | None) -> torch.Tensor | None:
    return None if values is None else torch.from_numpy(values)
