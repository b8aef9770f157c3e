"""How many steps an epoch takes, where that is known before the data is read whole."""

from __future__ import annotations

from pathlib import Path

from decompft.launcher.recipe import Recipe, Source

# a plan answers in half a second; longer files are counted when they are tokenized
_MAX_BYTES = 64 << 20


def steps_per_epoch(recipe: Recipe) -> float | None:
    """Rows of an epoch over the global batch size.

    Known where a row is a record and records are lines: unpacked, local JSONL without held-out part, long
    samples not dropped. None otherwise.
    """
    data = recipe.data
    if data.packing or data.streaming or data.eval_fraction or data.too_long == "drop":
        return None
    rows = 0
    for source in data.train:
        records = _num_records(source)
        if records is None:
            return None
        rows += max(1, round(source.weight * records))  # as the sampler rounds
    return rows / recipe.train.global_batch_size


def _num_records(source: Source) -> int | None:
    path = Path(source.path) if source.path is not None else None
    if path is None or path.suffix != ".jsonl" or source.format == "text" or not path.is_file():
        return None
    if path.stat().st_size > _MAX_BYTES:
        return None
    with path.open("rb") as lines:
        found = sum(1 for line in lines if line.strip())
    return found if source.max_records is None else min(found, source.max_records)
