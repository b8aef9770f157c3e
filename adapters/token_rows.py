"""Rows of an embedding and of an output head that train, while all other rows stay frozen.

The frozen tensor keeps its shape, dtype and sharding. Beside it lies a float32 parameter with the rows of
some tokens, and what the frozen rows of those tokens would give is left out. A token whose id is past the
frozen tensor's last row has a trained row only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TokenRows(nn.Module):
    """A frozen module of V rows of width H, and the trained rows of n of its ids.

    `added` are those of the ids that no one has ever trained: not the tokenizer's before.
    """

    def __init__(self, base: nn.Module, ids: Sequence[int], rows: nn.Parameter | None) -> None:
        super().__init__()
        assert list(ids) == sorted(set(ids)), ids
        self.base = base
        self.ids = tuple(ids)
        self.num_new = sum(i >= self.weight.shape[0] for i in self.ids)  # ids past the frozen rows
        if rows is None:
            shape = (len(self.ids), self.weight.shape[1])
            rows = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=self.weight.device))
        self.rows = rows
        self.added: frozenset[int] = frozenset()
        # no buffer, which engines and transformers' initialiser would want to fill
        self._sorted: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen rows (V, H)."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]  # an embedding's, or a linear layer's
        return weight

    def sorted_ids(self, device: torch.device) -> Tensor:
        """(n,) int64, ascending: the order of `rows`."""
        if self._sorted is None or self._sorted.device != device:
            self._sorted = torch.tensor(self.ids, device=device)
        return self._sorted


class TokenEmbedding(TokenRows):
    """An embedding, some of whose rows train. `embed_scale` of Gemma's kind scales them, too."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """(...) ids -> (..., H) in the frozen embedding's dtype."""
        ids = self.sorted_ids(input_ids.device)
        place = torch.searchsorted(ids, input_ids).clamp_(max=len(self.ids) - 1)
        is_trained = ids[place] == input_ids
        frozen: Tensor = self.base(input_ids.masked_fill(is_trained, 0))
        # looked up in float32, so that the gradients of a token that stands often are added up in it
        trained = F.embedding(place, self.rows).to(frozen.dtype)
        scale = getattr(self.base, "embed_scale", None)
        if scale is not None:
            trained = trained * torch.as_tensor(scale).to(trained)
        return torch.where(is_trained.unsqueeze(-1), trained, frozen)


class TokenHead(TokenRows):
    """An output head, some of whose rows train. A token past the frozen rows has no bias."""

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias (V,)."""
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., H) -> logits (..., V + the ids past V)."""
        ids = self.sorted_ids(hidden.device)
        return with_columns(
            self.base(hidden), column_logits(hidden, self.rows, ids, self.bias), ids, self.num_new
        )


def column_logits(hidden: Tensor, rows: Tensor, ids: Tensor, bias: Tensor | None) -> Tensor:
    """(..., H) and rows (n, H) of these ids -> logits (..., n) in the dtype of `hidden`."""
    return F.linear(
        hidden, rows.to(hidden.dtype), None if bias is None else _bias_of(bias, ids, hidden.dtype)
    )


def with_columns(logits: Tensor, columns: Tensor, ids: Tensor, num_new: int) -> Tensor:
    """Logits (..., V) with the columns (..., n) of these ids in place, and the last `num_new` appended."""
    num_known = len(ids) - num_new
    columns = columns.to(logits.dtype)
    logits = logits.index_copy(-1, ids[:num_known], columns[..., :num_known])
    return torch.cat([logits, columns[..., num_known:]], -1) if num_new else logits


def token_rows(model: nn.Module) -> Iterator[tuple[str, TokenRows]]:
    """The modules of a model whose rows train in part, with their names; the embedding comes first."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, TokenRows))


def only_looked_up(model: nn.Module) -> set[str]:
    """Names of rows that get a gradient only where one of their tokens is read: no head shares them."""
    shared = {id(m.rows) for _, m in token_rows(model) if isinstance(m, TokenHead)}
    return {f"{n}.rows" for n, m in token_rows(model) if id(m.rows) not in shared}


def _bias_of(bias: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Of each id; 0 past the last."""
    return torch.cat([bias, bias.new_zeros(1)])[ids.clamp(max=len(bias))].to(dtype)
