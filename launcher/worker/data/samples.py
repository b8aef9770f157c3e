"""A source's documents, tokenized: formats, limits and the checks that every sample passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from decompft.launcher.errors import DataError
from decompft.launcher.recipe import DataSection, Source
from decompft.launcher.worker.data.encode import Encoder, Mask, Tokens
from decompft.launcher.worker.data.formats import read_labelled, render
from decompft.launcher.worker.data.records import Record

_BATCH = 256  # records tokenized in one call


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One document, at most sequence_length tokens."""

    where: str
    record: int  # index of its record in the source
    tokens: Tokens  # (T,)
    trained: Mask  # (T,)
    segments: Tokens | None = None  # (T,) token types of a pair of texts
    label: int | str | None = None  # as written


@dataclass(kw_only=True, slots=True)
class Counts:
    """What became of the records that were read."""

    records: int = 0
    dropped: int = 0
    truncated: int = 0


def iter_samples(
    records: Iterable[Record],
    source: Source,
    data: DataSection,
    encoder: Encoder,
    counts_of: Callable[[int], Counts],
) -> Iterator[Sample]:
    """Samples in the records' order; a text that is too long gives several.

    Args:
        records: of `source`.
        counts_of: record index -> the counts it belongs to.

    Raises:
        DataError: a record that cannot be trained on; the message names file and line.
    """
    iterator = iter(records)
    while batch := list(islice(iterator, _BATCH)):
        for record in batch:
            counts_of(record.index).records += 1
        if source.format == "classification":
            samples = _classification(batch, source, data, encoder, counts_of)
        else:
            samples = _language(batch, source, data, encoder, counts_of)
        yield from samples


def _language(
    batch: list[Record],
    source: Source,
    data: DataSection,
    encoder: Encoder,
    counts_of: Callable[[int], Counts],
) -> Iterator[Sample]:
    rendered = [render(record, source, encoder.tokenizer) for record in batch]
    for record, (tokens, trained) in zip(batch, encoder.encode(rendered), strict=True):
        limit = data.sequence_length
        if len(tokens) > limit and source.format != "text":
            if not _keep_cut(record, len(tokens), data, counts_of(record.index)):
                continue
            tokens, trained = tokens[:limit], trained[:limit]
        _check_trained(record, trained, data)
        # pieces of a long text overlap by one token: the first token of a piece is never a target,
        # and so each token of the text but its first is one exactly once
        for start in range(0, len(tokens) - 1, limit - 1):
            piece = slice(start, start + limit)
            yield Sample(
                where=record.where, record=record.index, tokens=tokens[piece], trained=trained[piece]
            )


def _classification(
    batch: list[Record],
    source: Source,
    data: DataSection,
    encoder: Encoder,
    counts_of: Callable[[int], Counts],
) -> Iterator[Sample]:
    labelled = [read_labelled(record, source) for record in batch]
    for record, item, (tokens, segments) in zip(
        batch, labelled, encoder.encode_pairs(labelled, None), strict=True
    ):
        if len(tokens) > data.sequence_length:
            if not _keep_cut(record, len(tokens), data, counts_of(record.index)):
                continue
            ((tokens, segments),) = encoder.encode_pairs([item], data.sequence_length)
        if not len(tokens):
            raise DataError(f"{record.where}: the text has no tokens", "leave the record out")
        yield Sample(
            where=record.where,
            record=record.index,
            tokens=tokens,
            trained=np.zeros(len(tokens), dtype=np.bool_),
            segments=segments,
            label=item.label,
        )


def _keep_cut(record: Record, length: int, data: DataSection, counts: Counts) -> bool:
    """Whether a record over the limit is kept, to be cut; counts what happens to it."""
    if data.too_long == "error":
        raise DataError(
            f"{record.where}: {length} tokens, but data.sequence_length is {data.sequence_length}",
            "raise data.sequence_length, or set data.too_long to truncate or drop",
        )
    if data.too_long == "drop":
        counts.dropped += 1
        return False
    counts.truncated += 1
    return True


def _check_trained(record: Record, trained: Mask, data: DataSection) -> None:
    if trained[1:].any():
        return
    if data.too_long == "truncate" and len(trained) == data.sequence_length:
        reason = f"its prompt alone fills the {data.sequence_length} tokens of data.sequence_length"
        raise DataError(
            f"{record.where}: no trained token: {reason}",
            "raise data.sequence_length, or set data.too_long: drop",
        )
    raise DataError(f"{record.where}: no trained token: nothing in it carries loss", "leave the record out")
