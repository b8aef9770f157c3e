"""Which held-out rows is a merged model compared on: a file's, or those of the run that the adapter is of?"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from decompft.launcher.errors import DataError
from decompft.launcher.recipe import FORMAT_FIELDS, DataSection, Source
from decompft.launcher.worker.data.encode import Encoder
from decompft.launcher.worker.data.records import iter_records
from decompft.launcher.worker.data.rows import Row, open_rows
from decompft.launcher.worker.data.samples import Counts, iter_samples
from decompft.launcher.worker.inference import Adapter
from decompft.launcher.worker.model import read_config
from decompft.launcher.worker.prepared import FILE, Prepared

_LONGEST = 2048  # tokens of a row of a file
_READ_PER_TARGET = 4  # prompts are read, too: a bound on the work where answers are short


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Rows to compare models on, and where they are from, in words."""

    rows: tuple[Row, ...]
    source: str


def rows_of_file(path: Path, adapter: Adapter, max_targets: int) -> HeldOut:
    """The first rows of a file in any format of a recipe, those that the adapter was trained on first.

    Raises:
        DataError: no such file, no format fits its first record, or no record fits the model.
    """
    source = _source(path, adapter)
    limit = (
        getattr(read_config(adapter.model, adapter.model_dir), "max_position_embeddings", None) or _LONGEST
    )
    data = DataSection(train=[source], sequence_length=min(limit, _LONGEST), packing=False, too_long="drop")
    samples = iter_samples(
        iter_records(source), source, data, Encoder(adapter.tokenizer()), lambda _: Counts()
    )
    rows = (
        Row(
            id=number,
            tokens=sample.tokens,
            trained=sample.trained,
            doc_lengths=(len(sample.tokens),),
            segments=sample.segments,
            label=None if sample.label is None else 0,  # which one does not matter here
        )
        for number, sample in enumerate(samples)
    )
    found = tuple(_cut(rows, max_targets))
    if not found:
        raise DataError(f"{path}: every record is longer than the model's {data.sequence_length} tokens")
    return HeldOut(rows=found, source=str(path))


def rows_of_run(adapter: Adapter, max_targets: int) -> HeldOut | str:
    """Rows of the evaluation split of the adapter's run, or why there are none.

    The run's folder is where an adapter or a checkpoint of it lies.
    """
    run = next((p for p in list(adapter.folder.absolute().parents)[:2] if (p / FILE).is_file()), None)
    if run is None:
        return f"{adapter.folder} stands alone, without the run that it is of"
    entry = Prepared.read(run).eval
    if entry is None:
        return f"{run.name} held no data out (data.eval, data.eval_fraction)"
    try:
        rows = open_rows(entry)
    except DataError:
        return f"the evaluation split of {run.name} is no longer where it was tokenized"
    order = random.Random(0).sample(range(len(rows)), len(rows))
    return HeldOut(
        rows=tuple(_cut(map(rows.row, order), max_targets)), source=f"the evaluation split of {run.name}"
    )


def _source(path: Path, adapter: Adapter) -> Source:
    """The file as a recipe would name it."""
    first = next(iter_records(Source(path=str(path), format="text")))
    is_classifier = adapter.model.task == "sequence-classification"
    for kind in dict.fromkeys((*adapter.formats, *FORMAT_FIELDS)):
        required, _ = FORMAT_FIELDS[kind]
        if all(first.values.get(name) is not None for name in required) and is_classifier == (
            kind == "classification"
        ):
            return Source.model_validate({"path": str(path), "format": kind})
    raise DataError(
        f"{first.where}: has fields {', '.join(first.values)}, which is none of the formats of a recipe",
        "; ".join(f"{kind}: {' and '.join(required)}" for kind, (required, _) in FORMAT_FIELDS.items()),
    )


def _cut(rows: Iterable[Row], max_targets: int) -> Iterator[Row]:
    """The first rows, until there are enough targets, or as many tokens as they may cost."""
    targets = read = 0
    for row in rows:
        if row.num_targets == 0:
            continue
        yield _with_targets(row, max_targets - targets)
        targets += row.num_targets
        read += len(row.tokens)
        if targets >= max_targets or read >= _READ_PER_TARGET * max_targets:
            return


def _with_targets(row: Row, most: int) -> Row:
    """The row with no more than `most` targets with loss, its first ones."""
    if row.num_targets <= most:
        return row
    targets = row.trained.copy()
    targets[np.cumsum((0, *row.doc_lengths[:-1]))] = False
    return replace(row, trained=targets & (np.cumsum(targets) <= most))
