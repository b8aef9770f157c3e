"""How a rendered document becomes token ids and a mask of the tokens that carry loss.

A document is tokenized whole, as a model would meet it, and the mask is found by tokenizing the text up to
each border of a trained span: tokens from the first one that differs on belong to the span. So the text is
never changed by being cut, and a token that straddles the border of prompt and answer is trained. (Character
offsets would be cheaper, but tokenizers trim white space from them, and not all tokenizers have them.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from decompft.launcher.errors import DataError
from decompft.launcher.worker.data.formats import Labelled
from decompft.launcher.worker.data.rendered import Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = np.ndarray[tuple[int], np.dtype[np.int32]]
Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]


class Encoder:
    """A tokenizer with what documents need of it. Batches run on all cores in the tokenizer's own threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        started = tokenizer("a")["input_ids"]
        starts = bool(started) and tokenizer.bos_token_id is not None and started[0] == tokenizer.bos_token_id
        self._bos = [int(tokenizer.bos_token_id)] if starts else []
        self._has_types = "token_type_ids" in tokenizer.model_input_names

    def encode(self, items: Sequence[Rendered]) -> list[tuple[Tokens, Mask]]:
        """(token ids (T,), trained (T,)) of each document, with its begin and end tokens."""
        borders = [_inner_borders(item) for item in items]
        texts = [item.text for item in items]
        texts += [item.text[:at] for item, cuts in zip(items, borders, strict=True) for at in cuts]
        ids = self._ids(texts)
        prefixes = iter(ids[len(items) :])
        return [
            self._assemble(item, whole, {at: next(prefixes) for at in cuts})
            for item, whole, cuts in zip(items, ids, borders, strict=False)
        ]

    def encode_pairs(
        self, items: Sequence[Labelled], max_length: int | None
    ) -> list[tuple[Tokens, Tokens | None]]:
        """(token ids (T,), segment of each token (T,) or None) of texts to classify.

        Args:
            max_length: cut to this many tokens, keeping the tokenizer's closing tokens; None: no cut.
        """
        out: list[tuple[Tokens, Tokens | None]] = []
        for item in items:
            encoded = self.tokenizer(
                item.text,
                item.text_pair,
                truncation=max_length is not None,
                max_length=max_length,
                verbose=False,
            )
            types = encoded["token_type_ids"] if self._has_types and item.text_pair is not None else None
            tokens = np.asarray(encoded["input_ids"], dtype=np.int32)
            out.append((tokens, None if types is None else np.asarray(types, dtype=np.int32)))
        return out

    def _ids(self, texts: list[str]) -> list[Tokens]:
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]

    def _assemble(self, item: Rendered, whole: Tokens, prefixes: dict[int, Tokens]) -> tuple[Tokens, Mask]:
        trained = np.zeros(len(whole), dtype=np.bool_)
        for start, end in item.spans:
            first, _ = _token_at(whole, prefixes.get(start), start)
            last, straddles = _token_at(whole, prefixes.get(end), end)
            trained[first : last + straddles] = True
        bos = self._bos if item.add_bos else []
        eos = [self._eos_id()] if item.add_eos else []
        tokens = np.concatenate([np.asarray(bos, np.int32), whole, np.asarray(eos, np.int32)])
        mask = np.concatenate([np.zeros(len(bos), np.bool_), trained, np.ones(len(eos), np.bool_)])
        return tokens, mask

    def _eos_id(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end token, so nothing would teach the model to stop",
                "use a tokenizer with an eos_token (model.tokenizer)",
            )
        return int(self.tokenizer.eos_token_id)


def _inner_borders(item: Rendered) -> list[int]:
    """Borders of spans where the token is not known without tokenizing: not the text's own ends."""
    return sorted({at for span in item.spans for at in span if 0 < at < len(item.text)})


def _token_at(whole: Tokens, prefix: Tokens | None, at: int) -> tuple[int, bool]:
    """Index of the first token that is not wholly before a border, and whether it straddles the border."""
    if prefix is None:
        return (0 if at == 0 else len(whole)), False
    length = min(len(whole), len(prefix))
    differing = np.flatnonzero(whole[:length] != prefix[:length])
    common = int(differing[0]) if len(differing) else length
    return common, common < len(prefix)
