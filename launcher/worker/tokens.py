"""Which ids are the tokens of `adapter.train_tokens`, and which of them does the tokenizer get anew?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from decompft.launcher.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTROL = (("<", ">"), ("[", "]"))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedToken:
    """A token whose rows train."""

    text: str  # as the recipe names it
    id: int
    is_added: bool  # the tokenizer did not have it

    def line(self) -> str:
        """What became of it, for the user."""
        how = "added to the tokenizer" if self.is_added else "in the tokenizer already"
        return f"adapter.train_tokens: {self.text!r} is token {self.id}, {how}"


def add_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[TrainedToken, ...]:
    """The tokens of these texts, in their order; those that the tokenizer lacks are added to it.

    A text that is one token already is that token; one that is an entry of the vocabulary as it is written
    there, with its mark for a space, is that entry. All else becomes a token: a special one, which decoding
    may leave out, if it looks like a control token, that is, stands in <> or [].

    Raises:
        AdapterError: two of the texts are one token.
    """
    vocabulary = tokenizer.get_vocab()
    found: dict[int, TrainedToken] = {}
    for text in texts:
        known = _single(tokenizer, text)
        known = vocabulary.get(text) if known is None else known
        token = TrainedToken(
            text=text, id=_add(tokenizer, text) if known is None else known, is_added=known is None
        )
        if token.id in found:
            raise AdapterError(
                f"adapter.train_tokens: {found[token.id].text!r} and {text!r} are one token ({token.id})",
                "name it once",
            )
        found[token.id] = token
    return tuple(found.values())


def _single(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The token that a text is by itself; the token of what is unknown stands for nothing."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    is_unknown = ids == [tokenizer.unk_token_id] and text != tokenizer.unk_token
    return ids[0] if len(ids) == 1 and not is_unknown else None


def _add(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    from tokenizers import AddedToken

    special = any(text.startswith(a) and text.endswith(b) for a, b in _CONTROL)
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False)], special_tokens=special)
    made = tokenizer.convert_tokens_to_ids(text)
    assert isinstance(made, int), made
    return made
