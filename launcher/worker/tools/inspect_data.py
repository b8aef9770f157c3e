"""What a model is really trained on: samples as tokens, the trained ones marked, and the set's counts."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from decompft.launcher.checking import check_data
from decompft.launcher.packaged import is_packaged
from decompft.launcher.recipe import Recipe
from decompft.launcher.source import load
from decompft.launcher.worker.data.feed import PreparedTrain
from decompft.launcher.worker.data.prepare import prepare_data
from decompft.launcher.worker.data.rows import Row, open_rows
from decompft.launcher.worker.data.stream import StreamedTrain
from decompft.launcher.worker.tokenizers import load_tokenizer, pad_id
from decompft.launcher.worker.tokens import add_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TRAINED_SHADES = ("green", "bold bright_green")  # two in turn, so that the borders of tokens show
_PLAIN_SHADES = ("dim", "")
_WINDOW = 8  # tokens of context that settle how a token is written


def main(argv: list[str]) -> None:
    """Show the first samples of a recipe's training set, in training order.

    Args:
        argv: RECIPE [KEY=VALUE ...] [--num N].
    """
    parser = argparse.ArgumentParser(prog="decompft inspect data")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--num", type=int, default=3, help="samples to show")
    args = parser.parse_args(argv)
    recipe = load(args.recipe, args.overrides)
    check_data(recipe, strict=True)  # before transformers takes its seconds
    tokenizer = load_tokenizer(recipe.model, _model_dir(recipe))
    add_tokens(tokenizer, recipe.adapter.train_tokens)
    console = Console()
    entries = prepare_data(recipe, tokenizer)
    train: PreparedTrain | StreamedTrain
    if entries["train"] is None:
        train = StreamedTrain(recipe, tokenizer, pad_id(tokenizer))
    else:
        train = PreparedTrain(recipe, open_rows(entries["train"]), pad_id(tokenizer))
    samples = _samples(train, recipe.train.global_batch_size)
    for number, (row, document, tokens, trained) in zip(range(1, args.num + 1), samples, strict=False):
        of_row = f"document {document + 1} of {len(row.doc_lengths)} in row {row.id}"
        label = "" if row.label is None else f", label {row.label}"
        console.print(
            f"-- sample {number}: {len(tokens)} tokens, {int(trained[1:].sum())} targets with loss, "
            f"{of_row}{label}",
            style="bold",
            highlight=False,
            soft_wrap=True,
        )
        console.print(_marked(tokenizer, tokens.tolist(), trained.tolist(), console), soft_wrap=True)
    for name, entry in entries.items():
        if entry is not None:
            console.print(_counts(name, entry))
    if entries["train"] is None:
        console.print("the training set is streamed: its counts show only while it is read", highlight=False)


def _model_dir(recipe: Recipe) -> Path | None:
    """The folder with the model's tokenizer; only what is converted or packaged has to be resolved for it."""
    model = recipe.model
    if model.tokenizer is not None or model.id is None:
        return None
    if not (is_packaged(model.id) or model.id.endswith(".gguf")):
        return None
    from decompft.launcher import planner
    from decompft.launcher.worker.modelfiles import resolve

    return resolve(planner.make(recipe))


def _samples(
    train: PreparedTrain | StreamedTrain, global_batch: int
) -> Iterator[tuple[Row, int, np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """(row, document in it, tokens, trained) in training order."""
    for step in range(train.total_steps):
        for micro in train.step(step, 1, 0, global_batch, 1).micro_batches:
            for row in filter(None, micro):
                cuts = np.cumsum(row.doc_lengths)[:-1]
                pairs = zip(np.split(row.tokens, cuts), np.split(row.trained, cuts), strict=True)
                for document, (tokens, trained) in enumerate(pairs):
                    yield row, document, tokens, trained


def _marked(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], trained: list[bool], console: Console
) -> Text:
    """The text token by token: colours on a terminal, trained stretches in [[ ]] elsewhere."""
    colours = console.is_terminal and not console.no_color
    out = Text()
    inside = False
    for number, (piece, carries_loss) in enumerate(_pieces(tokenizer, ids, trained)):
        if colours:
            shades = _TRAINED_SHADES if carries_loss else _PLAIN_SHADES
            out.append(piece, style=shades[number % 2])
            continue
        if carries_loss != inside:
            out.append("[[" if carries_loss else "]]")
            inside = carries_loss
        out.append(piece)
    if inside:
        out.append("]]")
    return out


def _pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], trained: Sequence[bool]
) -> Iterator[tuple[str, bool]]:
    """How each token is written where it stands; tokens that share a character come together."""
    start = 0
    for end in range(1, len(ids) + 1):
        first = max(0, start - _WINDOW)
        before = tokenizer.decode(list(ids[first:start]))
        text = tokenizer.decode(list(ids[first:end]))
        is_whole = not text.endswith("\ufffd") or end - start >= 4  # no character takes more than four bytes
        if is_whole or end == len(ids):
            yield text[len(before) :], trained[end - 1]
            start = end


def _counts(name: str, entry: dict[str, Any]) -> Table:
    table = Table(title=f"{name}: rows {entry['row_fill']:.1%} full", title_justify="left")
    columns = ("rows", "records", "documents", "tokens", "dropped", "truncated")
    table.add_column("source", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    total = {"name": "all", **entry}
    for source in [*entry["sources"], total] if len(entry["sources"]) > 1 else entry["sources"]:
        numbers = (f"{source[f'num_{column}']:,}" for column in columns)
        table.add_row(source["name"].rsplit("/", 1)[-1], *numbers)
    table.caption = (
        f"{entry['num_targets']:,} targets with loss; longest document {entry['longest_document']:,} tokens"
    )
    if entry["label_names"] is not None:
        table.caption += "; labels " + ", ".join(f"{i} {n}" for i, n in enumerate(entry["label_names"]))
    return table


if __name__ == "__main__":
    import sys

    from decompft.launcher.worker.tools.main import run_tool

    run_tool(main, sys.argv[1:])
