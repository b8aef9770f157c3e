"""Which characters of a conversation are the assistant's, by the tokenizer's own chat template.

A template with `{% generation %}` marks says it itself. Without marks, each assistant turn is found by
rendering twice: up to the turn (with the prompt that asks for it), and up to and with it. That works only
while each rendering is a prefix of the whole conversation's; a template that rewrites earlier turns
(drops their reasoning, say) is refused in words rather than trained wrongly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from decompft.launcher.errors import DataError
from decompft.launcher.worker.data.rendered import Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_chat(messages: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> Rendered:
    """A conversation as the chat template writes it; trained are the assistant's turns.

    Each trained span ends with the token that ends the turn. A template that has none gets the
    tokenizer's end token after the last turn.

    Raises:
        DataError: no template, malformed messages, no assistant turn, or a template that does not let
            the turns be found.
    """
    _check_messages(messages, where)
    if not tokenizer.chat_template:
        raise DataError(
            f"{where}: the tokenizer has no chat template, which format chat needs",
            "use a chat model's tokenizer (model.tokenizer), or format instruction or completion",
        )
    full, marked = _render(tokenizer, messages, where, marks=True)
    specials = _special_texts(tokenizer)
    if marked:
        spans = tuple((start, _with_end_token(full, end, specials)) for start, end in marked)
    else:
        spans = tuple(
            _turn_span(tokenizer, messages, turn, full, specials, where)
            for turn, message in enumerate(messages)
            if message["role"] == "assistant"
        )
    stops = any(full.rstrip().endswith(text) for text in specials)
    ends_in_answer = messages[-1]["role"] == "assistant"
    return Rendered(text=full, spans=spans, add_bos=False, add_eos=ends_in_answer and not stops)


def _check_messages(messages: Any, where: str) -> None:
    hint = 'messages is a list like [{"role": "user", "content": "..."}, {"role": "assistant", ...}]'
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages is not a list with at least one message", hint)
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise DataError(f"{where}: message {number} is {type(message).__name__}, not an object", hint)
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise DataError(f"{where}: message {number} has no text {key!r}", hint)
    if all(message["role"] != "assistant" for message in messages):
        roles = ", ".join(sorted({message["role"] for message in messages}))
        raise DataError(
            f"{where}: no trained token: no message of role assistant among {roles}",
            "the turns that are learned have the role 'assistant'",
        )


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Any, where: str, *, ask: bool = False, marks: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """Text, and the generation marks if the template has them (else an empty list)."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template()
    has_marks = marks and "generation" in template.replace("add_generation_prompt", "")
    try:
        texts, spans = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            add_generation_prompt=ask,
            return_assistant_tokens_mask=has_marks,
            **tokenizer.special_tokens_map,
        )
    except TemplateError as error:
        raise DataError(
            f"{where}: the chat template refuses this conversation: {error}",
            "most templates want user and assistant in turn, after at most one system message",
        ) from error
    return texts[0], [(start, end) for start, end in spans[0]] if has_marks else []


def _turn_span(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    turn: int,
    full: str,
    specials: tuple[str, ...],
    where: str,
) -> tuple[int, int]:
    before, _ = _render(tokenizer, messages[:turn], where, ask=True)
    after, _ = _render(tokenizer, messages[: turn + 1], where)
    eos = tokenizer.eos_token or ""
    if eos and not full.startswith(after):
        after = after.removesuffix(eos)  # Phi-3 closes whatever it has rendered with the end token
    if not (full.startswith(after) and after.startswith(before) and len(after) > len(before)):
        raise DataError(
            f"{where}: the chat template writes message {turn + 1} differently when other messages follow, "
            "so its tokens cannot be told from the rest",
            "use a template with {% generation %} marks, or cut conversations to one answer each",
        )
    end = len(after)
    if any(after.rstrip().endswith(text) for text in specials):
        end = len(after.rstrip())  # the line break after the end token belongs to the next turn
    return len(before), end


def _with_end_token(full: str, end: int, specials: tuple[str, ...]) -> int:
    """A mark's end, moved over the end token when the template leaves that outside of the mark."""
    if any(full[:end].rstrip().endswith(text) for text in specials):
        return end
    return max((end + len(text) for text in specials if full.startswith(text, end)), default=end)


def _special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple({*added, *tokenizer.all_special_tokens} - {""})
