"""How a recipe's data becomes rows on disk, before any process group exists."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decompft.launcher.errors import DataError
from decompft.launcher.recipe import DataSection, Recipe, Source
from decompft.launcher.worker.data.cache import cached, content_key, data_cache_root
from decompft.launcher.worker.data.encode import Encoder
from decompft.launcher.worker.data.labels import label_ids
from decompft.launcher.worker.data.progress import Progress
from decompft.launcher.worker.data.records import iter_records, source_name
from decompft.launcher.worker.data.samples import Counts, iter_samples
from decompft.launcher.worker.data.store import SetWriter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare_data(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache_root: Path | None = None,
    show_progress: bool = True,
) -> dict[str, dict[str, Any] | None]:
    """The "train" and "eval" entries of prepared.json; None for a set that there is not.

    An entry: dir, num_rows, num_records, num_documents, num_tokens, num_trained_tokens, num_targets,
    num_dropped, num_truncated, longest_document (tokens), row_fill (0..1), label_names, sources (a list with
    name, first_row and the same counts), cache ("hit", "built", "rebuilt").

    Args:
        cache_root: folder of the cache; None: what the recipe says, else the user's.
        show_progress: a bar on a terminal, else a line every few seconds, on stderr.

    Raises:
        DataError: anything wrong with the data.
    """
    for source in recipe.data.eval:
        if source.weight != 1.0:
            raise DataError(
                f"{source_name(source)}: weight {source.weight} on an evaluation set has no effect",
                "evaluation sees each record once; remove the weight",
            )
    if recipe.data.streaming and not recipe.data.eval:
        return {"train": None, "eval": None}

    def build(folder: Path) -> dict[str, Any]:
        return _Preparation(recipe, tokenizer, folder, show_progress).run()

    root = data_cache_root(recipe) if cache_root is None else cache_root
    place, facts, state = cached(root, content_key(recipe, tokenizer), build)
    return {
        name: None if entry is None else {"dir": str(place / name), "cache": state, **entry}
        for name, entry in ((name, facts[name]) for name in ("train", "eval"))  # JSON sorts them
    }


def held_out(seed: int, source_index: int, record_index: int, fraction: float) -> bool:
    """Whether a record belongs to the evaluation part; depends on nothing but these numbers."""
    digest = hashlib.blake2b(f"{seed}/{source_index}/{record_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


class _Preparation:
    """One pass over all sources of a recipe, into a training and an evaluation set."""

    def __init__(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path, show_progress: bool
    ) -> None:
        self._recipe = recipe
        self._data: DataSection = recipe.data
        self._encoder = Encoder(tokenizer)
        self._folder = folder
        self._show_progress = show_progress

    def run(self) -> dict[str, Any]:
        data = self._data
        with ExitStack() as stack:
            train = None if data.streaming else self._writer("train", stack)
            evaluation = self._writer("eval", stack) if data.eval or data.eval_fraction else None
            if train is not None:
                for index, source in enumerate(data.train):
                    self._split(index, source, train, evaluation if data.eval_fraction else None)
            for source in data.eval:
                assert evaluation is not None
                self._read(source, evaluation)
            numbers, names = self._labels(train, evaluation)
            if evaluation is not None and data.eval_fraction:
                self._check_held_out(evaluation)
            return {
                name: None if writer is None else writer.close(numbers, names)
                for name, writer in (("train", train), ("eval", evaluation))
            }

    def _writer(self, name: str, stack: ExitStack) -> SetWriter:
        writer = SetWriter(
            self._folder / name, sequence_length=self._data.sequence_length, packing=self._data.packing
        )
        stack.callback(writer.abandon)
        return writer

    def _split(self, index: int, source: Source, train: SetWriter, held: SetWriter | None) -> None:
        """A training source, part of it held out."""
        counts, held_counts = Counts(), Counts()
        seed, fraction = self._recipe.train.seed, self._data.eval_fraction

        def is_held(record: int) -> bool:
            return held is not None and held_out(seed, index, record, fraction)

        name = source_name(source)
        with Progress(name, source.max_records, self._show_progress) as progress:
            records = iter_records(source)
            for sample in iter_samples(
                records, source, self._data, self._encoder, lambda r: held_counts if is_held(r) else counts
            ):
                writer = held if held is not None and is_held(sample.record) else train
                writer.add(sample)
                progress.advance(sample.record, len(sample.tokens))
        _check_any(train, name, counts)
        train.end_source(name, counts)
        if held is not None and held.source_documents:
            held.end_source(f"{name} (held out)", held_counts)

    def _read(self, source: Source, writer: SetWriter) -> None:
        counts = Counts()
        name = source_name(source)
        with Progress(name, source.max_records, self._show_progress) as progress:
            for sample in iter_samples(
                iter_records(source), source, self._data, self._encoder, lambda _: counts
            ):
                writer.add(sample)
                progress.advance(sample.record, len(sample.tokens))
        _check_any(writer, name, counts)
        writer.end_source(name, counts)

    def _labels(
        self, train: SetWriter | None, evaluation: SetWriter | None
    ) -> tuple[dict[int | str, int], list[str] | None]:
        seen = {} if train is None else train.label_places
        others = {} if evaluation is None else evaluation.label_places
        if not seen and not others:
            return {}, None
        if train is None and any(isinstance(label, str) for label in others):
            where = next(where for label, where in others.items() if isinstance(label, str))
            raise DataError(
                f"{where}: a label that is a name, while data.streaming is on",
                "names are numbered over the whole training set, which a stream never has: use numbers",
            )
        return label_ids(seen or others, others, self._recipe.model.num_labels)

    def _check_held_out(self, evaluation: SetWriter) -> None:
        if not evaluation.has_documents:
            raise DataError(
                f"data.eval_fraction {self._data.eval_fraction} holds out no record of these training sets",
                "raise it, or name an evaluation set with data.eval",
            )


def _check_any(writer: SetWriter, name: str, counts: Counts) -> None:
    if writer.source_documents:
        return
    if counts.dropped:
        raise DataError(
            f"{name}: all {counts.dropped} records are longer than data.sequence_length and were dropped",
            "raise data.sequence_length, or set data.too_long: truncate",
        )
    raise DataError(f"{name}: no record is left for training", "lower data.eval_fraction")
