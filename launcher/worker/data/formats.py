"""What text a record becomes, and which part of that text carries loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from decompft.launcher.errors import DataError
from decompft.launcher.recipe import Source
from decompft.launcher.worker.data.chat import render_chat
from decompft.launcher.worker.data.records import Record, raw_field, text_field
from decompft.launcher.worker.data.rendered import Rendered
from decompft.launcher.worker.data.templates import instruction_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render(record: Record, source: Source, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """The text of a record in its source's format, with the spans that are trained.

    Raises:
        DataError: a field is missing or of the wrong type, or a conversation cannot be rendered.
    """
    if source.format == "chat":
        messages = raw_field(record, "messages", source.fields)
        rendered = render_chat(messages, tokenizer, record.where)
    elif source.format == "text":
        text = text_field(record, "text", source.fields)
        return Rendered(text=text, spans=((0, len(text)),))
    elif source.format == "instruction":
        values = {
            name: text_field(record, name, source.fields, required=name != "input")
            for name in ("instruction", "output", "input")
        }
        rendered = _answered(instruction_prompt(values), values["output"])
    else:
        prompt = text_field(record, "prompt", source.fields)
        rendered = _answered(prompt, text_field(record, "completion", source.fields))
    if source.train_on == "all":
        return rendered.trained_whole()
    if not any(end > start for start, end in rendered.spans):
        raise DataError(
            f"{record.where}: no trained token: what should be learned is empty",
            "give the record an answer, or leave it out",
        )
    return rendered


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """A text, or a pair of them, and its class as written: a number or a name."""

    text: str
    text_pair: str | None
    label: int | str


def read_labelled(record: Record, source: Source) -> Labelled:
    """The text and label of a classification record."""
    label = raw_field(record, "label", source.fields)
    if isinstance(label, str) and label.isascii() and label.isdecimal():
        label = int(label)  # CSV has no numbers
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise DataError(
            f"{record.where}: field {source.fields.get('label', 'label')!r} is {type(label).__name__}, "
            "not a whole number or a name"
        )
    return Labelled(
        text=text_field(record, "text", source.fields),
        text_pair=text_field(record, "text_pair", source.fields, required=False) or None,
        label=label,
    )


def _answered(prompt: str, answer: str) -> Rendered:
    return Rendered(text=prompt + answer, spans=((len(prompt), len(prompt) + len(answer)),))
