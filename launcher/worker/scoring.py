"""Which label a model gives a record: by the likelihood of each label's sentence, or by what it writes.

likelihood: the label with the largest sum of log-probabilities of the tokens of
`the correct answer is LABEL` after the instruction prompt; no length normalisation, ties to the first.
first-match: the papers' rule (METHODS.md 4.1): the first label word, case-sensitive, in what is written
after the prompt; no match is wrong. Theirs used 4 beams; here decoding is greedy.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from decompft.launcher.errors import DataError
from decompft.launcher.recipe import Source
from decompft.launcher.worker.data.encode import Encoder
from decompft.launcher.worker.data.records import Record, iter_records, text_field
from decompft.launcher.worker.data.rendered import Rendered
from decompft.launcher.worker.data.templates import instruction_prompt
from decompft.launcher.worker.generation import encode_prompts, generate, positions
from decompft.launcher.worker.inference import Loaded
from decompft.launcher.worker.loss import CHUNK_TOKENS
from decompft.launcher.worker.tokenizers import pad_id

ANSWER = "the correct answer is {label}"
NEW_TOKENS = 32  # of a first-match answer
Report = Callable[[int, int], None]  # records done, records in all

T = TypeVar("T")

_FORMAT_LINE = re.compile(r"^Answer format:[ \t]*(\S.*)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A record that can be scored."""

    where: str
    prompt: str
    labels: tuple[str, ...]  # of its own 'Answer format' line
    answer: str


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One sequence of a forward pass, and the labels whose scores are read from it."""

    tokens: tuple[int, ...]
    # (place, target token) -> the labels, by number, that the log-probability counts for
    reads: dict[tuple[int, int], list[int]] = field(default_factory=dict)


def read_questions(path: str, limit: int | None) -> tuple[list[Question], list[str]]:
    """The first `limit` records of a file, and the label words of the whole file.

    Raises:
        DataError: no such file, or a record without 'Answer format' line or answer among its labels.
    """
    every = [_question(record) for record in iter_records(Source(path=path))]
    words = sorted({label for question in every for label in question.labels})
    return every[:limit], words


def likelihoods(
    loaded: Loaded, questions: Sequence[Question], *, batch_size: int | None, report: Report
) -> list[list[float]]:
    """The score of each label of each question.

    Labels that differ in their last token only share one row; others get a row each. Rows are
    padded at the right, where causality keeps the padding from being read.

    Args:
        batch_size: rows of a forward pass at most; None: what fits a budget of tokens.

    Raises:
        DataError: a record is longer than the positions that the model has.
    """
    rows, starts = _rows(loaded, questions)
    totals = torch.zeros(starts[-1], dtype=torch.float64)
    done = 0
    with torch.inference_mode():
        for batch in _batches(rows, lambda row: len(row.tokens), loaded, batch_size):
            values, labels = _read(loaded, batch)
            totals.index_add_(0, labels, values.double().cpu())  # the one wait for the device
            done += len(batch)
            report(done, len(rows))
    return [totals[first:last].tolist() for first, last in zip(starts, starts[1:], strict=False)]


def first_matches(
    loaded: Loaded,
    questions: Sequence[Question],
    words: Sequence[str],
    *,
    batch_size: int | None,
    report: Report,
) -> list[str | None]:
    """The first of `words` in what the model writes after each prompt.

    Raises:
        DataError: a record is longer than the positions that the model has.
    """
    # longest first, so that a word is not cut to another that it begins with
    pattern = re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)))
    prompts = encode_prompts([question.prompt for question in questions], loaded.tokenizer)
    for question, ids in zip(questions, prompts, strict=True):
        _check_length(loaded, len(ids) + NEW_TOKENS, question)
    found: list[str | None] = [None] * len(questions)
    done = 0
    for batch in _batches(
        range(len(prompts)), lambda place: len(prompts[place]) + NEW_TOKENS, loaded, batch_size
    ):
        answers = generate(loaded, [prompts[place] for place in batch], max_new_tokens=NEW_TOKENS)
        for place, ids in zip(batch, answers, strict=True):
            match = pattern.search(loaded.tokenizer.decode(ids, skip_special_tokens=True))
            found[place] = match[0] if match else None
        done += len(batch)
        report(done, len(prompts))
    return found


def best_label(question: Question, scores: Sequence[float]) -> str:
    """The label with the largest score, the first of equals."""
    return question.labels[max(range(len(scores)), key=scores.__getitem__)]


def _question(record: Record) -> Question:
    instruction = text_field(record, "instruction", {})
    answer = text_field(record, "answer", {})
    lines = _FORMAT_LINE.findall(instruction)
    if not lines:
        raise DataError(
            f"{record.where}: no line 'Answer format: a/b/c' in its instruction",
            "a task's records name their labels in such a line; see decompft eval in the README",
        )
    labels = tuple(label.strip() for label in lines[-1].split("/"))
    if answer not in labels or len(labels) < 2 or not all(labels):
        raise DataError(
            f"{record.where}: its answer {answer!r} is none of the labels of its 'Answer format' line: "
            f"{', '.join(labels)}",
            "field answer holds one label, as it is written there",
        )
    fields = {"instruction": instruction, "input": text_field(record, "input", {}, required=False)}
    return Question(where=record.where, prompt=instruction_prompt(fields), labels=labels, answer=answer)


def _rows(loaded: Loaded, questions: Sequence[Question]) -> tuple[list[_Row], list[int]]:
    """The rows of all questions, and each question's first label by number, one past the last at the end."""
    items = []
    for question in questions:
        for label in question.labels:
            text = question.prompt + ANSWER.format(label=label)
            items.append(Rendered(text=text, spans=((len(question.prompt), len(text)),), add_eos=False))
    encoded = Encoder(loaded.tokenizer).encode(items)
    rows: list[_Row] = []
    starts = [0]
    for question in questions:
        own: dict[tuple[int, ...], _Row] = {}
        for number in range(starts[-1], starts[-1] + len(question.labels)):
            ids, trained = encoded[number]
            _check_length(loaded, len(ids), question)
            # the last token is only predicted, never read
            row = own.setdefault(tuple(ids[:-1].tolist()), _Row(tokens=tuple(ids[:-1].tolist())))
            for place in trained.nonzero()[0].tolist():
                row.reads.setdefault((place - 1, int(ids[place])), []).append(number)
        rows += own.values()
        starts.append(starts[-1] + len(question.labels))
    return rows, starts


def _read(loaded: Loaded, rows: Sequence[_Row]) -> tuple[Tensor, Tensor]:
    """(log-probabilities on the device, label numbers on the host), to be summed by label."""
    width = max(len(row.tokens) for row in rows)
    pad = pad_id(loaded.tokenizer)
    ids = torch.tensor([[*row.tokens, *[pad] * (width - len(row.tokens))] for row in rows])
    places: dict[int, int] = {}  # place in the batch -> row of the logits: each is made once
    picks, targets, labels = [], [], []
    for number, row in enumerate(rows):
        for (place, target), counted in row.reads.items():
            logits_row = places.setdefault(number * width + place, len(places))
            for label in counted:
                picks.append(logits_row)
                targets.append(target)
                labels.append(label)
    index = torch.tensor(list(places)).to(loaded.device)
    pairs = torch.tensor([picks, targets]).to(loaded.device)
    model, ids = loaded.model, ids.to(loaded.device)
    if not model.plain_head:
        logits = model.logits(ids, None)
        return _chosen(logits.reshape(-1, logits.shape[-1])[index], pairs), torch.tensor(labels)
    hidden = model.hidden(ids, None)
    hidden = hidden.reshape(-1, hidden.shape[-1])[index]
    values = []
    for start in range(0, len(index), CHUNK_TOKENS):
        stop = start + CHUNK_TOKENS
        inside = slice(bisect_left(picks, start), bisect_left(picks, stop))  # picks ascend
        shift = torch.tensor([[start], [0]], device=loaded.device)
        values.append(_chosen(model.head(hidden[start:stop]), pairs[:, inside] - shift))
    return torch.cat(values), torch.tensor(labels)


def _check_length(loaded: Loaded, num_tokens: int, question: Question) -> None:
    limit = positions(loaded)
    if num_tokens > limit:
        raise DataError(
            f"{question.where}: {num_tokens} tokens with its answer, and the model has {limit} positions",
            "leave the record out, or shorten it",
        )


def _chosen(logits: Tensor, pairs: Tensor) -> Tensor:
    """log p of pairs (2, n) of (row, token) under float32 logits (rows, V)."""
    rows, tokens = pairs
    return logits[rows, tokens] - torch.logsumexp(logits, dim=-1)[rows]


def _batches(
    items: Iterable[T], length: Callable[[T], int], loaded: Loaded, batch_size: int | None
) -> Iterator[list[T]]:
    """Items of like length side by side, the longest first: what does not fit shows at once."""
    budget = 65_536 if loaded.device.type == "cuda" else 4_096  # tokens, padding included
    if not loaded.model.plain_head:
        budget //= 16  # all logits are made
    batch: list[T] = []
    widest = 0
    for item in sorted(items, key=length, reverse=True):
        widest = max(widest, length(item))
        if batch and (len(batch) == batch_size or widest * (len(batch) + 1) > budget):
            yield batch
            batch, widest = [], length(item)
        batch.append(item)
    if batch:
        yield batch
