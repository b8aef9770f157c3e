"""Training data that is read, tokenized and packed while training (data.streaming).

Every rank reads the same stream and keeps its own rows of it, so the targets of a step are known to all
without a collective. The price: each rank tokenizes everything, and a resume at step N reads and tokenizes N
steps' worth again before it trains (nothing is stored that could be looked up).

Differences from prepared data: documents are packed greedily, in the order they come; `shuffle` is a buffer
of a thousand documents; `weight` is the share of rows among sources, as no source's length is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from decompft.launcher.errors import DataError
from decompft.launcher.recipe import DataSection, Recipe, Source
from decompft.launcher.worker.data.encode import Encoder
from decompft.launcher.worker.data.feed import StepData
from decompft.launcher.worker.data.records import iter_records, source_name
from decompft.launcher.worker.data.rows import Row
from decompft.launcher.worker.data.sampler import step_indices
from decompft.launcher.worker.data.samples import Counts, Sample, iter_samples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BUFFER = 1000  # documents among which the next one is drawn


class StreamedTrain:
    """Training rows from an endless stream over the sources."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, pad_id: int) -> None:
        assert recipe.train.max_steps is not None, "the recipe demands max_steps of a stream"
        self.total_steps = recipe.train.max_steps
        self.pad_id = pad_id
        self._global_batch = recipe.train.global_batch_size
        self._recipe = recipe
        self._encoder = Encoder(tokenizer)
        self._passes = [0] * len(recipe.data.train)
        self._stream = self._restart()
        self._next = 0  # rows taken from the stream so far
        self._batch: list[Row] = []  # the rows taken last

    @property
    def num_read(self) -> int:
        return self._next

    def epoch_at(self, step: int) -> float:
        """Whole passes over the source that was read least: no part of one can be told in a stream."""
        return float(min(self._passes))

    def step(self, step: int, world_size: int, rank: int, micro_batch: int, accumulation: int) -> StepData:
        """See TrainData. Going forward skips by reading; going back starts over."""
        mine = step_indices(
            step,
            global_batch=self._global_batch,
            world_size=world_size,
            rank=rank,
            micro_batch=micro_batch,
            accumulation=accumulation,
        )
        first = step * self._global_batch
        batch = self._take(first, self._global_batch)
        return StepData(
            micro_batches=[[batch[index - first] for index in micro] for micro in mine],
            num_targets_global=sum(row.num_targets for row in batch),
            sample_ids=[row.id for row in batch],
        )

    def _take(self, first: int, size: int) -> list[Row]:
        if self._batch and self._batch[0].id == first and len(self._batch) == size:
            return self._batch
        if first < self._next:
            self._stream, self._next = self._restart(), 0
        while self._next < first:
            next(self._stream)
            self._next += 1
        self._batch = [next(self._stream) for _ in range(size)]
        self._next += size
        return self._batch

    def _restart(self) -> Iterator[Row]:
        data = self._recipe.data
        streams = [_rows_of(self._documents(source, i), data) for i, source in enumerate(data.train)]
        return _mix(streams, [source.weight for source in data.train])

    def _documents(self, source: Source, index: int) -> Iterator[Sample]:
        """A source's documents, over and over."""
        data, seed = self._recipe.data, self._recipe.train.seed
        for epoch in count():
            self._passes[index] = epoch
            counts = Counts()
            samples = _one_pass(source, data, self._encoder, counts)
            if data.shuffle:
                bits = np.random.PCG64(np.random.SeedSequence([seed, 2, index, epoch]))
                samples = _shuffled(samples, bits)
            for sample in samples:
                _check_label(sample, self._recipe.model.num_labels)
                yield sample
            if counts.records == counts.dropped:
                raise DataError(
                    f"{source_name(source)}: all {counts.dropped} records are longer than "
                    "data.sequence_length and were dropped",
                    "raise data.sequence_length, or set data.too_long: truncate",
                )


def _mix(streams: list[Iterator[Row]], weights: list[float]) -> Iterator[Row]:
    """Rows in proportion to the weights: always from the source that is furthest behind its share."""
    given = [0] * len(streams)
    position = 0
    while True:
        behind = min(range(len(streams)), key=lambda i: ((given[i] + 1) / weights[i], i))
        given[behind] += 1
        yield replace(next(streams[behind]), id=position)
        position += 1


def _rows_of(samples: Iterator[Sample], data: DataSection) -> Iterator[Row]:
    waiting: list[Sample] = []
    room = data.sequence_length
    for sample in samples:
        if waiting and (not data.packing or len(sample.tokens) > room):
            yield _row(waiting)
            waiting, room = [], data.sequence_length
        waiting.append(sample)
        room -= len(sample.tokens)


def _row(samples: list[Sample]) -> Row:
    first = samples[0]
    assert not isinstance(first.label, str), "names are refused when they are read"
    return Row(
        id=0,
        tokens=np.concatenate([sample.tokens for sample in samples]),
        trained=np.concatenate([sample.trained for sample in samples]),
        doc_lengths=tuple(len(sample.tokens) for sample in samples),
        segments=first.segments,
        label=first.label,
    )


def _one_pass(source: Source, data: DataSection, encoder: Encoder, counts: Counts) -> Iterator[Sample]:
    records = iter_records(source, streaming=True)
    return iter_samples(records, source, data, encoder, lambda _: counts)


def _shuffled(samples: Iterator[Sample], bits: np.random.PCG64) -> Iterator[Sample]:
    buffer: list[Sample] = []
    for sample in samples:
        if len(buffer) < _BUFFER:
            buffer.append(sample)
            continue
        place = int(bits.random_raw() % _BUFFER)
        buffer[place], sample = sample, buffer[place]
        yield sample
    order = np.argsort(bits.random_raw(len(buffer)), kind="stable") if buffer else ()
    yield from (buffer[int(place)] for place in order)


def _check_label(sample: Sample, num_labels: int) -> None:
    if sample.label is None:
        return
    if isinstance(sample.label, str):
        raise DataError(
            f"{sample.where}: label {sample.label!r} is a name, while data.streaming is on",
            "names are numbered over the whole training set, which a stream never has: use numbers",
        )
    if not 0 <= sample.label < num_labels:
        raise DataError(
            f"{sample.where}: label {sample.label} is outside 0..{num_labels - 1}",
            "set model.num_labels to the number of classes",
        )
