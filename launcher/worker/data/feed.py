"""What the training loop sees of data: the rows of a step for a rank, prepared or streamed alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from decompft.launcher.recipe import Recipe
from decompft.launcher.worker.data.rows import Row, RowSet, open_rows
from decompft.launcher.worker.data.sampler import Sampler, step_indices
from decompft.launcher.worker.prepared import Prepared

DUMMY = -1  # sample id of a row beyond the end of the data


@dataclass(frozen=True, kw_only=True, slots=True)
class StepData:
    """One optimizer step as a rank sees it."""

    micro_batches: list[list[Row | None]]  # this rank's; None is a dummy row without targets
    num_targets_global: int  # targets with loss over all ranks and micro batches
    sample_ids: list[int]  # row ids of the whole global batch in order, the same on every rank


class TrainData(Protocol):
    """Rows by step. The only state is the step, so resuming is asking for another one."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, from max_steps or epochs."""

    @property
    def pad_id(self) -> int:
        """Token to fill rows with."""

    @property
    def num_read(self) -> int:
        """Rows read so far: what moves while a resumed stream is read up to its place."""

    def epoch_at(self, step: int) -> float:
        """Epochs seen after `step` steps; whole ones only, of what was read so far, for a stream."""

    def step(self, step: int, world_size: int, rank: int, micro_batch: int, accumulation: int) -> StepData:
        """The rows of a step; `step` counts the optimizer steps taken before it (the first is 0)."""


def open_train(recipe: Recipe, prepared: Prepared) -> TrainData:
    """The training data of a run."""
    if prepared.train is not None:
        return PreparedTrain(recipe, open_rows(prepared.train), prepared.pad_id)
    # the tokenizer's library takes seconds to import, and only a stream needs it on a rank
    from decompft.launcher.worker.data.stream import StreamedTrain
    from decompft.launcher.worker.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(recipe.model.model_copy(update={"tokenizer": None}), prepared.tokenizer_dir)
    return StreamedTrain(recipe, tokenizer, prepared.pad_id)


def open_eval(recipe: Recipe, prepared: Prepared, micro_batch: int) -> EvalData | None:
    """The evaluation data of a run, None if it has none.

    Args:
        micro_batch: rows a forward pass on one rank.
    """
    if prepared.eval is None:
        return None
    return EvalData(open_rows(prepared.eval), micro_batch, prepared.pad_id)


class PreparedTrain:
    """Training rows from a prepared set, in the sampler's order."""

    num_read = 0  # any row is read at once

    def __init__(self, recipe: Recipe, rows: RowSet, pad_id: int) -> None:
        train = recipe.train
        self.pad_id = pad_id
        self._rows = rows
        self._global_batch = train.global_batch_size
        sampler = Sampler(
            rows.source_rows,
            [source.weight for source in recipe.data.train],
            seed=train.seed,
            shuffle=recipe.data.shuffle,
            epochs=train.epochs,
        )
        self._sampler = sampler
        if train.max_steps is not None:
            self.total_steps = train.max_steps
        else:
            assert sampler.total_rows is not None, "a recipe has max_steps or epochs"
            self.total_steps = math.ceil(sampler.total_rows / self._global_batch)

    def epoch_at(self, step: int) -> float:
        """See TrainData."""
        rows = step * self._global_batch
        if self._sampler.total_rows is not None:
            rows = min(rows, self._sampler.total_rows)
        return rows / self._sampler.rows_per_epoch

    def step(self, step: int, world_size: int, rank: int, micro_batch: int, accumulation: int) -> StepData:
        """See TrainData."""
        mine = step_indices(
            step,
            global_batch=self._global_batch,
            world_size=world_size,
            rank=rank,
            micro_batch=micro_batch,
            accumulation=accumulation,
        )
        first = step * self._global_batch
        batch = [self._sampler.row_at(first + place) for place in range(self._global_batch)]
        return StepData(
            micro_batches=[[self._row(batch[index - first]) for index in micro] for micro in mine],
            num_targets_global=sum(self._rows.num_trained(row) for row in batch if row is not None),
            sample_ids=[DUMMY if row is None else row for row in batch],
        )

    def _row(self, index: int | None) -> Row | None:
        return None if index is None else self._rows.row(index)


class EvalData:
    """Evaluation rows, each once, spread over the ranks in equal numbers of micro batches."""

    def __init__(self, rows: RowSet, micro_batch: int, pad_id: int) -> None:
        self._rows = rows
        self._micro_batch = micro_batch
        self.pad_id = pad_id
        self.num_rows = len(rows)
        self.num_targets = int(rows.row_targets.sum())  # of all ranks

    def micro_batches(self, world_size: int, rank: int) -> Iterator[list[Row | None]]:
        """A rank's micro batches; dummy rows (None) fill the last ones, so that all ranks have as many."""
        size = self._micro_batch
        for round_ in range(math.ceil(self.num_rows / (world_size * size))):
            first = (round_ * world_size + rank) * size
            yield [
                self._rows.row(index) if index < self.num_rows else None
                for index in range(first, first + size)
            ]
