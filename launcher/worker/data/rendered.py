"""What passes between a format and the tokenizer: a text and the characters in it that carry loss."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """A document before it is tokenized."""

    text: str
    spans: tuple[tuple[int, int], ...]  # trained characters: half-open, ascending, apart
    add_bos: bool = True  # begin as the tokenizer begins; False where the text brings its own
    add_eos: bool = True  # append the end token, trained

    def trained_whole(self) -> Rendered:
        """The same document with loss on all of it."""
        return replace(self, spans=((0, len(self.text)),))
